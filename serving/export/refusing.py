"""What a user's files make other libraries raise, as one line that names the file."""

import contextlib
from collections.abc import Iterator

from serving.directory import BadInput
from serving.export_paths import ExportError


@contextlib.contextmanager
def refusing(found: str, fix: str) -> Iterator[None]:
    """Turn whatever is raised in the block into an ExportError: what was found, the reason, the fix.

    It is for reading a user's files alone: transformers raises of every kind for a file that it did not expect.
    """
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:
        raise ExportError(f"{found} ({reason(error)}); {fix}") from error


def reason(error: Exception) -> str:
    """Return what an error says in one line, with its type where that says more."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()] or [""]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}"
