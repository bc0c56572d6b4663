"""Where the rows of a command go: standard output, or a file that appears whole."""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from serving.directory import BadInput, inside_of


@contextlib.contextmanager
def writing(output: Path | None, source: Path | None) -> Iterator[TextIO]:
    """Yield standard output, or a file that becomes `output` when the block ends well and is removed otherwise.

    What cannot be encoded, half a surrogate pair in a row's id, is written as its escape.
    Raises BadInput, before the block, when `output` cannot be written, or is the file `source` that the rows come from.
    """
    if output is not None and source is not None and output.exists() and output.samefile(source):
        raise BadInput(f"--output: {output} is the file of --input, which would be lost; give another file")
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield sys.stdout
        return
    if holder := inside_of(output):
        raise BadInput(f"--output: {output} lies in {holder}, which allows no other files; choose another place")
    if output.is_dir():
        raise BadInput(f"--output: {output} is a folder; give a file")
    if output.exists() and not output.is_file():  # a device or a pipe is written to, never replaced
        with output.open("w", encoding="utf-8", errors="backslashreplace") as device:
            yield device
        return
    partial = output.with_name(f".{output.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise BadInput(f"--output: {output} cannot be written ({error.strerror}); choose another place") from None
    try:
        with file:
            yield file
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
