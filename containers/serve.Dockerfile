# Serves an ONNX directory over HTTP: no torch, no compiler, no root, nothing written. From the repository's root:
#
#   docker build -f containers/serve.Dockerfile -t trivet-serve .
#   docker run --rm --init --read-only -p 127.0.0.1:8000:8000 -v "$PWD/onnx/assistant:/model:ro" trivet-serve
#
# - API keys, for other machines than this one:  -v "$PWD/keys.txt:/run/secrets/keys:ro" ... trivet-serve --api-key-file /run/secrets/keys
# - NVIDIA GPUs (never run on one): build with --build-arg DEVICE=gpu; run with --gpus all ... trivet-serve --provider cuda
# - `docker stop --time 60`: on SIGTERM the running requests get up to 30 s to finish; Docker alone waits 10 s.
# - The model's name in requests is `model`, the folder where it is mounted.
#
# Linted. No engine was at hand that could fetch the base image below: built and run with buildah on a plain Debian 12
# with its Python 3.11 in its place, never with Docker, never on a GPU.

# A mirror, or a digest for a build that can be repeated to the byte: --build-arg BASE=...@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/trivet/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/trivet
WORKDIR /build
COPY pyproject.toml requirements.lock requirements-gpu.lock ./
# What Trivet needs, without Trivet: a change in the code leaves this layer as it is.
RUN mkdir configs launch serving trainer \
    && touch LICENSE README.md trivet.py \
    && pip install --constraint requirements.lock --constraint requirements-gpu.lock ".[serve-${DEVICE}]" \
    && pip uninstall --yes trivet \
    && rm -r /build/*

FROM packages AS wheel
COPY . .
RUN pip wheel --no-deps --wheel-dir /dist .

FROM packages
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl
# Any user id will do (`--user`): there is no home, and USER is for ids without a name.
ENV HOME=/tmp USER=trivet NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["trivet", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
