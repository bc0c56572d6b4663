"""The manifest of an ONNX directory: what each task reads of it, and what must hold before its graph opens."""

from pathlib import Path
from typing import Any

from serving.directory import BadInput, check_files, read_manifest
from serving.proofs import require_verified
from serving.session import check_provider, onnxruntime_version

Manifest = dict[str, Any]

_OF_TEXTS = ("inputs", "max_length", "context_length", "pad_token_id", "empty_text_ids", "source")

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"

# What those who open a directory read of its manifest.
FIELDS = {
    "causal_lm": (
        "vocab_size",
        "num_layers",
        "num_kv_heads",
        "head_dim",
        "dtype",
        "context_length",
        "end_token_ids",
        "source",
    ),
    "classification": ("labels", *_OF_TEXTS),
    "token_classification": ("labels", *_OF_TEXTS),
    "masked_lm": ("mask_token", "mask_token_id", *_OF_TEXTS),
    "embedding": _OF_TEXTS,
    "module": ("inputs", "outputs", "row_shapes", "row_types", "source"),
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
        raise BadInput(f"{folder}: its task is {found}, not {task}; use: {COMMANDS[found]} {folder}")
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
    if task is not None and task not in FIELDS:
        raise BadInput(
            f"{folder}: its task is {task!r}; this Trivet knows {', '.join(FIELDS)}: upgrade, or export again"
        )
    needed = ("task", *FIELDS.get(task or "", ()))
    if missing := [name for name in needed if name not in manifest]:
        raise BadInput(f"{folder}: its manifest has no {', '.join(missing)}; export the model again")
