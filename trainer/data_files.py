"""Files of rows: .jsonl, .csv, .txt, .json, .parquet, and folders of texts. A broken one is named with its line."""

import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer import table_files, text_files
from trainer.config.data import Files
from trainer.corpus import Row
from trainer.rows import Facts, Position, Rows, hash_of
from trainer.text_files import DataError, Found, Lines, TxtUnit, is_packed, wrong_separator

__all__ = [
    "ENDINGS", "READERS", "DataError", "FileRow", "FileRows", "TxtUnit", "ending", "read_rows", "shown", "texts_in",
    "wrong_separator",
]  # fmt: skip

READERS = text_files.READERS | table_files.READERS

ENDINGS = f"{', '.join(text_files.READERS)}, each also with .gz, and {', '.join(table_files.READERS)}"
_GLANCE_BYTES = 2**16
_OTHER_UNITS = {".json": "row", ".parquet": "row"}


class FileRow(Row):
    """A row that knows its file and line (None: the whole file), so that an error about it can say where it stands."""

    def __init__(self, values: Row, path: Path, number: int | None, unit: str = "line") -> None:
        super().__init__(values)
        self.place = str(path) if number is None else f"{path}, {unit} {number}"


class FileRows(Rows):
    """The rows of files, one file after the other. A position is a file's number and where reading stands in it.

    Raises DataError for a file that is missing, of an unknown kind or broken, or that changes between two passes.
    """

    def __init__(self, paths: Files, split_txt: TxtUnit = "lines") -> None:
        self.files = [found for path in _each(paths) for found in _found(path, split_txt)]
        self._states: dict[Path, tuple[int, int, int]] = {}

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        first, *inner = position or [0]
        for number, (path, read) in enumerate(self.files[first:], first):
            self._check_unchanged(path)
            for after, row in read(inner or None):
                yield [number, *after], row
            self._check_unchanged(path)
            inner = []

    def glance(self) -> Facts:
        """Return what tells these files from others without reading them: their sizes, first and last bytes."""
        return Facts(None, hash_of([_glance(path) for path, _ in self.files]))

    def states(self) -> list[tuple[str, int, int, int]]:
        """Return each file's path, size, time of its last change, and number on the disk."""
        return [(str(path.resolve()), *self._check_unchanged(path)) for path, _ in self.files]

    def _check_unchanged(self, path: Path) -> tuple[int, int, int]:
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"data: {path}: cannot be read ({error.strerror}); mend the file") from None
        state = (found.st_size, found.st_mtime_ns, found.st_ino)
        if self._states.setdefault(path, state) != state:
            raise DataError(f"data: {path}: has changed while the run was reading it; start the run again")
        return state


def read_rows(paths: Files, split_txt: TxtUnit = "lines") -> Iterator[Row]:
    """Yield the rows of data files, or of a folder of .txt files (see `texts_in`): one row a file, whole.

    A text of a .txt file is a line, or a block between blank lines, as `split_txt` says. Raises DataError.
    """
    yield from FileRows(paths, split_txt)


def shown(paths: Files | str) -> str:
    """Return the paths as a message names them."""
    return ", ".join(map(str, paths)) if isinstance(paths, tuple) else str(paths)


def ending(path: Path) -> str:
    """Return what names the format, in small letters: the last ending before .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def texts_in(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the .txt (.txt.gz) files of a folder, or of its sub-folders with their names as labels.

    The order is that of a hash of the names: the same everywhere, and no class or period stands first.
    Raises DataError if there are none, or both kinds.
    """
    plain = [file for file in folder.iterdir() if _is_text(file)]
    labelled = [file for sub in folder.iterdir() if _is_class(sub) for file in sub.iterdir() if _is_text(file)]
    if plain and labelled:
        raise DataError(
            f"data: {folder} holds .txt files ({min(plain).name}) and folders of them ({min(labelled).parent.name}): "
            f"documents or classes? move one kind elsewhere"
        )
    if not plain and not labelled:
        raise DataError(
            f"data: {folder} is a folder without texts; accepted: .txt files, or a folder of them for each class "
            f"(.txt.gz too); or name a file in it, or a pattern such as {folder / '*.jsonl'}"
        )
    files = sorted(plain or labelled, key=lambda file: _name_hash(file.relative_to(folder)))
    return [(file, file.parent.name if labelled else None) for file in files]


# --- which files, and how each is read -------------------------------------------------------------------------------

_Reader = Callable[[Position | None], Iterator[tuple[Position, Row]]]


def _each(paths: Files) -> list[Path]:
    """The files and folders that are meant, those of a pattern in the order of their names."""
    found: list[Path] = []
    for path in paths if isinstance(paths, tuple) else (paths,):
        is_pattern = glob.has_magic(str(path)) and not path.exists()
        matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))] if is_pattern else [path]
        if not matches:
            raise DataError(f"data: {path}: no file matches the pattern (it is relative to where you stand)")
        found += matches
    if twice := next((path for path in found if found.count(path) > 1), None):
        raise DataError(f"data: {twice}: named twice; a file is read once: leave one out")
    return found


def _found(path: Path, split_txt: TxtUnit) -> list[tuple[Path, _Reader]]:
    """The files at a path, each with what reads it from a position."""
    if path.is_dir():
        return [(file, functools.partial(_whole, file, label)) for file, label in texts_in(path)]
    reader = READERS.get(ending(path))
    if reader is None or (is_packed(path) and ending(path) in table_files.READERS):
        raise DataError(f"data: {path} has an unknown ending; accepted: {ENDINGS}")
    if not path.is_file():
        raise DataError(f"data: {path}: no such file; check the path (it is relative to where you stand)")
    if reader is text_files.read_txt and split_txt == "blocks":
        reader = text_files.read_blocks
    return [(path, functools.partial(_placed, path, reader))]


def _placed(path: Path, reader: Callable[..., Found], position: Position | None) -> Iterator[tuple[Position, Row]]:
    unit = _OTHER_UNITS.get(ending(path), "line")
    for after, number, values in reader(path, position):
        yield after, FileRow(values, path, number, unit)


def _whole(path: Path, label: str | None, position: Position | None) -> Iterator[tuple[Position, Row]]:
    """One row, the whole file. After it the position is [1]."""
    if position is None:
        text = {"text": "".join(Lines(path))}
        yield [1], FileRow(text if label is None else text | {"label": label}, path, None)


def _glance(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        ends = b""
        for start in (0, max(0, size - _GLANCE_BYTES)):
            file.seek(start)
            ends += file.read(_GLANCE_BYTES)
    return hashlib.sha256(size.to_bytes(8) + ends).hexdigest()


def _is_text(path: Path) -> bool:
    return ending(path) == ".txt" and not path.name.startswith(".") and path.is_file()


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _name_hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()
