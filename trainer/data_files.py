"""Files of rows: .jsonl, .csv, .txt, gzipped or not, and folders of texts. A broken one is named with its line."""

import csv
import gzip
import hashlib
import json
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from serving.directory import BadInput
from trainer.corpus import Row

TxtUnit = Literal["lines", "blocks"]

_LARGEST_FIELD_BYTES = 2**30  # of a csv file: Python's own limit, 128 KiB, is shorter than many documents

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # that are not commas, and their names

# What the csv module says -> what is wrong, in a user's words.
_CSV_ERRORS = {
    "new-line character": "a carriage return without a line feed; convert the line ends: tr '\\r' '\\n' < OLD > NEW",
    "unexpected end": "a quote is opened and never closed (unexpected end of data); mend the file",
    "expected after": "a quote is closed inside a field; double the quotes that belong to the text",
}


class DataError(BadInput):
    """Data that cannot be trained on: missing, empty, broken, or without a needed column."""


class FileRow(Row):
    """A row that knows its file and line (None: the whole file), so that an error about it can say where it stands."""

    def __init__(self, values: Row, path: Path, line: int | None) -> None:
        super().__init__(values)
        self.place = str(path) if line is None else f"{path}, line {line}"


def read_rows(path: Path, split_txt: TxtUnit = "lines") -> Iterator[Row]:
    """Yield the rows of a data file, or of a folder of .txt files (see `texts_in`): one row a file, whole.

    A text of a .txt file is a line, or a block between blank lines, as `split_txt` says. Raises DataError.
    """
    if path.is_dir():
        for file, label in texts_in(path):
            text = {"text": "".join(_read(file))}
            yield FileRow(text if label is None else text | {"label": label}, file, None)
        return
    reader = READERS.get(ending(path))
    if reader is None:
        raise DataError(f"data: {path} has an unknown ending; accepted: {', '.join(READERS)}, each also with .gz")
    if not path.is_file():
        raise DataError(f"data: {path}: no such file; check the path (it is relative to where you stand)")
    if reader is _read_txt and split_txt == "blocks":
        reader = _read_blocks
    line = 0
    try:
        for line, values in reader(_read(path), path):
            yield FileRow(values, path, line)
    except csv.Error as error:
        what = next((said for words, said in _CSV_ERRORS.items() if words in str(error)), f"{error}; mend the file")
        raise DataError(f"data: {path}, after line {line}: cannot be read: {what}") from None


def ending(path: Path) -> str:
    """Return what names the format, in small letters: the last ending before .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def wrong_separator(path: Path, names: list[str]) -> str | None:
    """Say that a csv file seems to have another separator than commas, and how to convert it; None if it does not."""
    mark = next((mark for mark in _SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if mark is None or ending(path) != ".csv":
        return None
    to = path.with_name(path.name[: path.name.lower().rindex(".csv")] + ".commas.csv")
    opened = f"gzip.open({str(path)!r}, 'rt'" if _is_packed(path) else f"open({str(path)!r}"
    code = (
        f"import csv, gzip; csv.writer(open({str(to)!r}, 'w', newline='', encoding='utf-8')).writerows("
        f"csv.reader({opened}, newline='', encoding='utf-8-sig'), delimiter={mark!r}))"
    )
    return (
        f"fields must be separated by commas, and here are {_SEPARATORS[mark]}; convert it: python -c {_quoted(code)}"
    )


def _quoted(code: str) -> str:
    """The code as a shell takes it: in double quotes where nothing in it speaks against that."""
    return shlex.quote(code) if any(mark in code for mark in ('"', "$", "`", "!", "\\\\")) else f'"{code}"'


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
            f"(.txt.gz too); or name a file in it"
        )
    files = sorted(plain or labelled, key=lambda file: _name_hash(file.relative_to(folder)))
    return [(file, file.parent.name if labelled else None) for file in files]


def _is_text(path: Path) -> bool:
    return ending(path) == ".txt" and not path.name.startswith(".") and path.is_file()


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _name_hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()


def _read(path: Path) -> Iterator[str]:
    """Yield the lines of a file in UTF-8, with or without the mark that some editors put before the first.

    Raises DataError, with the line, where it cannot be read or is no text.
    """
    number = 0
    try:
        with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise DataError(f"data: {path}, line {number}: holds a zero byte; convert the file to UTF-8 text")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data: {path}, after line {number}: cannot be read ({error}); mend the file") from None
    except UnicodeDecodeError:
        raise DataError(f"data: {path}, line {number}: not UTF-8 text; convert the file to UTF-8") from None


def _read_jsonl(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            kind = "not Unicode text" if isinstance(error, UnicodeEncodeError) else "not JSON"
            raise DataError(f"data: {path}, line {number}: {kind} ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"data: {path}, line {number}: a {type(row).__name__}; expected an object per line")
        yield number, row


def _read_csv(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_LARGEST_FIELD_BYTES)
    reader = csv.DictReader(lines, strict=True)
    names = list(reader.fieldnames or ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"data: {path}, line 1: two columns are named {twice[0]!r}; rename one")
    for row in reader:
        if None in row or None in row.values():
            where, separator = f"data: {path}, line {reader.line_num}", wrong_separator(path, names)
            if separator:
                raise DataError(f"{where}: not one field, as in its first line: {separator}")
            raise DataError(f"{where}: not {len(names)} fields, as in its first line; mend it")
        yield reader.line_num, row


def _read_txt(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1) if line.strip())


def _read_blocks(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    """A row's line is the first of its block."""
    first, block = 0, ""
    for number, line in enumerate(lines, 1):
        if line.strip():
            first, block = (first, block + line) if block else (number, line)
        elif block:
            yield first, {"text": block.rstrip("\r\n")}
            block = ""
    if block:
        yield first, {"text": block.rstrip("\r\n")}


READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}
