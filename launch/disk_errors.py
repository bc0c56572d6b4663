"""What a user can mend on a disk, told from what only we can: no space, no permission, a file system that is read-only.

Each command checks at its start that it can write where it must; this is about what only shows midway.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from serving.directory import BadInput

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Let an error about a disk name `place`, as the user knows it, for `explain`; that of an open file names none."""
    try:
        yield
    except Exception as error:
        if number := _disk_number(error):
            raise OSError(number, os.strerror(number), str(place)) from None
        raise


def explain(error: Exception) -> str:
    """Return one line with the reason and the next step, or nothing if the error is not about a disk."""
    number = _disk_number(error)
    if number is None:
        return ""
    name = getattr(error, "filename", None)
    where = f"{name}: " if name else ""
    fix = (
        "free some space, or write to another disk, and run it again"
        if number in _NO_SPACE
        else "choose another place, or mend its permissions"
    )
    return f"{where}cannot be written ({os.strerror(number)}); nothing half-written was left; {fix}"


def _disk_number(error: Exception) -> int | None:
    if isinstance(error, BadInput):  # says it better already
        return None
    number = error.errno if isinstance(error, OSError) else _number_in(error)
    return number if number in _NO_SPACE + _NO_ENTRY else None


def _number_in(error: Exception) -> int | None:
    """The number in the text of an error from a library in Rust (safetensors, tokenizers): `... (os error 28)`."""
    _, found, rest = str(error).partition("(os error ")
    return int(rest.partition(")")[0]) if found else None
