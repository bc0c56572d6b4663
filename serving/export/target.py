"""Where an export goes, and what every export says of how it was made."""

from importlib.metadata import version
from pathlib import Path

from serving.directory import DirectoryError, inside_of, read_manifest, unlisted
from serving.export.attention import ExportError
from serving.exportable import instead_of_onnx
from serving.session import onnxruntime_version


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


def versions() -> dict[str, str]:
    """Return the versions of what made the graph and of what ran it."""
    # The distribution may be onnxruntime or onnxruntime-gpu; the module is the same.
    makers = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    return {**makers, "onnxruntime": onnxruntime_version()}
