"""The key file of `trivet serve`."""

from pathlib import Path

from serving.directory import BadInput


def read_keys(path: Path | None) -> list[str] | None:
    """Return the API keys in a file, one a line, blank lines apart. Raises BadInput if it is missing or holds none."""
    if path is None:
        return None
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"--api-key-file: {path} cannot be read ({why}); give a text file with one key a line") from None
    if not keys:
        raise BadInput(f"--api-key-file: {path} holds no key; write one a line")
    return keys
