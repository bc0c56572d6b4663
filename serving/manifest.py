"""The manifest of an ONNX directory: what each task reads of it, and what must hold before its graph opens."""

import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from serving.directory import BadInput, check_files, read_manifest
from serving.proofs import require_verified
from serving.session import check_provider, onnxruntime_version

Manifest = dict[str, Any]

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


class _Fields(BaseModel):
    """What those who open a directory read of its manifest."""

    model_config = ConfigDict(strict=True)

    dtype: Literal["fp32", "fp16", "bf16"]
    source: dict[str, Any]


class _Decoder(_Fields):
    vocab_size: PositiveInt
    num_layers: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    context_length: PositiveInt
    end_token_ids: list[int]


class _OfTexts(_Fields):
    inputs: list[str]
    max_length: PositiveInt
    context_length: PositiveInt
    pad_token_id: int
    empty_text_ids: list[int]


class _Labelled(_OfTexts):
    labels: list[str]


class _Masked(_OfTexts):
    mask_token: str
    mask_token_id: int


class _Module(_Fields):
    inputs: list[str]
    outputs: list[str]
    row_shapes: dict[str, list[int]]
    row_types: dict[str, str]


FIELDS: dict[str, type[_Fields]] = {
    "causal_lm": _Decoder,
    "classification": _Labelled,
    "token_classification": _Labelled,
    "masked_lm": _Masked,
    "embedding": _OfTexts,
    "module": _Module,
}
COMMANDS = {
    "causal_lm": "trivet generate",
    **dict.fromkeys(("classification", "token_classification", "masked_lm", "embedding"), "trivet predict"),
    "module": "serving.module.Module.open, in Python, for",
}


def proven_manifest(folder: Path, provider: str, task: str) -> Manifest:
    """Return the manifest of an ONNX directory that may be served on `provider` for `task`.

    Raises BadInput when the provider is not there, and when the directory is altered, has no passed verification for
    this provider and this onnxruntime, or is of another task.
    """
    manifest = read_manifest(folder, "onnx")
    check_provider(provider)
    check_files(folder, manifest)
    require_verified(folder, provider, onnxruntime_version())
    found = manifest.get("task")
    if found != task and found in COMMANDS:
        raise BadInput(f"{folder}: its task is {found}, not {task}; use: {COMMANDS[found]} {shlex.quote(str(folder))}")
    check_fields(folder, manifest)
    return manifest


def without_endpoint(manifest: Manifest) -> str:
    """Return what a directory answers that the HTTP server has no endpoint for; nothing where it has one."""
    task = manifest.get("task") or "causal_lm"
    problem, pairs = manifest.get("problem_type", SINGLE), manifest.get("text_pair") == "always"
    if task != "classification":
        return "" if task == "causal_lm" or task not in COMMANDS else task
    return f"{task} ({problem} of {'pairs' if pairs else 'texts'})" if pairs or problem != SINGLE else ""


def check_fields(folder: Path, manifest: Manifest) -> None:
    """Raise BadInput unless the manifest names a task and has what is read of it for that task."""
    task = manifest.get("task")
    if task is None:
        raise BadInput(f"{folder}: its manifest has no task; export the model again")
    if task not in FIELDS:
        raise BadInput(
            f"{folder}: its task is {task!r}; this Trivet knows {', '.join(FIELDS)}: upgrade, or export again"
        )
    try:
        FIELDS[task].model_validate(manifest)
    except ValidationError as error:
        wrong = [_said(each) for each in error.errors(include_url=False)]
        raise BadInput(f"{folder}: its manifest has {', '.join(wrong)}; export the model again") from None


def _said(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    return f"no {name}" if error["type"] == "missing" else f"{name} {error['input']!r} ({error['msg']})"
