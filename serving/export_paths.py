"""The model folder that an export is of, and the folder that it goes to: looked at before torch is loaded."""

import json
from pathlib import Path

from serving.directory import BadInput, DirectoryError, current, inside_of, read_manifest, unlisted
from serving.exportable import instead_of_onnx

LORA_CONFIG = "adapter_config.json"


class ExportError(BadInput):
    """A model that cannot be exported, with the reason."""


def is_lora(folder: Path) -> bool:
    """Whether a folder is an adapter without the weights that it adapts."""
    return (folder / LORA_CONFIG).is_file() and not (folder / "config.json").is_file()


def find_model(path: Path) -> Path:
    """Return the model directory that `path` is, or that the run or the winner of the sweep at `path` holds."""
    if path.is_file():
        raise ExportError(f"{path}: is a file; give the folder that it is in")
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; expected a model directory, a run or a sweep")
    if (path / "config.json").is_file() or is_lora(path):
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "result.json").is_file():
        run = _best_run(path / "result.json")
        for candidate in (run / "model", path / run / "model", path / run.name / "model"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ExportError(f"{path}: its best run {run} has no model directory; train it to the end")
    if (path / "status.json").is_file():
        raise ExportError(f"{path}: the run has not finished; finish it: trivet train {path / 'config.yaml'}")
    raise ExportError(
        f"{path}: has no config.json, model/ or result.json; expected a model directory, a run or a sweep"
    )


def _best_run(result: Path) -> Path:
    try:
        return Path(current(result, json.loads(result.read_text(encoding="utf-8")))["ranking"][0]["run"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ExportError(f"{result}: has no ranking of runs; expected a sweep's; run the sweep again") from None


def check_target(onnx_dir: Path, model_dir: Path | None = None) -> None:
    """Raise ExportError where `onnx_dir` holds anything else than an older export, or overlaps with the model."""
    if model_dir and (onnx_dir == model_dir or model_dir in onnx_dir.parents or onnx_dir in model_dir.parents):
        raise ExportError(f"{onnx_dir}: holds, is or lies in the source {model_dir}; give a folder beside it")
    if onnx_dir == Path.cwd() or onnx_dir in Path.cwd().parents:
        raise ExportError(f"{onnx_dir}: is or holds the current folder, which an export replaces; give a new folder")
    if holder := inside_of(onnx_dir):
        raise ExportError(f"{onnx_dir}: lies in {holder}, which allows no other files; give a folder beside it")
    try:
        is_other, is_used = onnx_dir.exists() and not onnx_dir.is_dir(), onnx_dir.is_dir() and any(onnx_dir.iterdir())
    except OSError as error:
        raise ExportError(f"{onnx_dir}: cannot be written ({error.strerror}); give another place") from None
    if is_other:
        raise ExportError(f"{onnx_dir}: is a file; give a folder to write to")
    if is_used:
        try:
            manifest = read_manifest(onnx_dir, "onnx")
        except DirectoryError as error:
            found = str(error).removesuffix(instead_of_onnx(onnx_dir))
            raise ExportError(f"{found}; only an older ONNX directory is replaced: give a new folder") from None
        for path in unlisted(onnx_dir, manifest):
            raise ExportError(f"{path}: no part of the export that is there, and would be lost; move it elsewhere")
