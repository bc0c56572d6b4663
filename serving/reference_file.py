"""reference.safetensors of an ONNX directory, opened in one place: whoever reads it says the same of a broken one.

Its metadata holds JSON: `manifest`, what trivet.json says of the model, and what the task's checks ask for.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serving.directory import REFERENCE, DirectoryError

FACTS = "manifest"  # of the metadata; an older Trivet wrote none


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """Yield the folder's reference.safetensors, open for numpy.

    Raises DirectoryError where it cannot be read, or has not what the block looks for.
    """
    path = folder / REFERENCE
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DirectoryError(f"{path}: is not what an export writes ({reason}); export the model again") from error


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return what trivet.json said of the model when the source was asked; None of an older Trivet. Like `opened`."""
    with opened(folder) as file:
        return metadata(file).get(FACTS)


def metadata(file: Any) -> dict[str, Any]:
    """Return what the metadata of an opened reference.safetensors holds."""
    return {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
