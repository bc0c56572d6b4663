# Trains, sweeps, reports and exports; every `trivet` command. From the repository's root:
#
#   docker build -f containers/train.Dockerfile -t trivet-train .
#   docker run --rm --init --user "$(id -u):$(id -g)" -v "$PWD:/work" trivet-train train configs/pretrain_tiny.yaml
#
# - torch comes from the package index as it is: with CUDA, several GB. An index with the CPU build, where you reach
#   one: --build-arg PIP_EXTRA_INDEX_URL=... (it stays readable in the image's history: no password in it)
# - NVIDIA GPUs (never run on one): build with --build-arg DEVICE=gpu; run with --gpus all
# - Several processes (--nproc): run with --shm-size=2g, or --ipc=host
# - `docker stop --time 120`: on SIGTERM a run saves a checkpoint at the end of its step; the same command goes on.
#
# Linted. No engine was at hand that could fetch the base image below: built and run with buildah on a plain Debian 12
# with its Python 3.11 in its place, never with Docker, never on a GPU.

# A mirror, or a digest for a build that can be repeated to the byte: --build-arg BASE=...@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/trivet/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch and DeepSpeed compile small extensions at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.* \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/trivet
WORKDIR /build
COPY requirements.lock requirements-gpu.lock ./
RUN pip install "$(grep '^torch==' requirements.lock)"
COPY pyproject.toml ./
# What Trivet needs, without Trivet: a change in the code leaves this layer as it is.
RUN mkdir configs launch serving trainer \
    && touch LICENSE README.md trivet.py \
    && DS_BUILD_OPS=0 pip install --constraint requirements.lock --constraint requirements-gpu.lock \
        ".[train,sweep,serve-${DEVICE}]" \
    && pip uninstall --yes trivet \
    && rm -r /build/*

FROM packages AS wheel
COPY . .
RUN pip wheel --no-deps --wheel-dir /dist .

FROM packages
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl
# Any user id will do (`--user`): there is no home, and USER is for ids without a name.
ENV HOME=/tmp USER=trivet NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["trivet"]
CMD ["--help"]
