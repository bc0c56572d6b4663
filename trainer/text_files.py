"""Rows of text files, line by line: .jsonl, .csv and .txt, gzipped or not, also from where an earlier reading stood."""

import csv
import gzip
import json
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from serving.directory import BadInput
from trainer.corpus import Row

TxtUnit = Literal["lines", "blocks"]
Found = Iterator[tuple[list[int], int, Row]]  # the position after a row, its number in the file, what it holds

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


class Lines:
    """The lines of a file in UTF-8, with or without the mark that some editors put before the first.

    `position` says where reading stands: the bytes (unpacked) and the lines that were read. Raises DataError, with
    the line, where the file cannot be read or is no text.
    """

    def __init__(self, path: Path, position: list[int] | None = None) -> None:
        self.path, self.position = path, list(position or (0, 0))

    def __iter__(self) -> Iterator[str]:
        try:
            with gzip.open(self.path) if is_packed(self.path) else self.path.open("rb") as file:
                file.seek(self.position[0])
                for line in file:
                    yield self._decoded(line)
        except (OSError, EOFError, zlib.error) as error:
            where = f"data: {self.path}, after line {self.position[1]}"
            raise DataError(f"{where}: cannot be read ({error}); mend the file") from None

    def _decoded(self, line: bytes) -> str:
        self.position = [self.position[0] + len(line), self.position[1] + 1]
        where = f"data: {self.path}, line {self.position[1]}"
        if b"\0" in line:
            raise DataError(f"{where}: holds a zero byte; convert the file to UTF-8 text")
        try:
            return line.decode("utf-8-sig" if self.position[1] == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8 text; convert the file to UTF-8") from None


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def read_jsonl(path: Path, position: list[int] | None = None) -> Found:
    lines = Lines(path, position)
    for line in lines:
        if line.strip():
            yield lines.position, lines.position[1], _object(line, f"data: {path}, line {lines.position[1]}")


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        kind = "not Unicode text" if isinstance(error, UnicodeEncodeError) else "not JSON"
        raise DataError(f"{where}: {kind} ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}; expected an object per line")
    return row


def read_csv(path: Path, position: list[int] | None = None) -> Found:
    """A row's number is that of its last line. Needs the names of the first line, wherever reading goes on."""
    csv.field_size_limit(_LARGEST_FIELD_BYTES)
    lines = Lines(path)
    line = 0
    try:
        names = next(csv.reader(iter(lines), strict=True), [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"data: {path}, line 1: two columns are named {twice[0]!r}; rename one")
        lines = Lines(path, position or lines.position)
        for row in csv.DictReader(iter(lines), names, strict=True):
            line = lines.position[1]
            yield lines.position, line, _fields(row, names, path, line)
    except csv.Error as error:
        what = next((said for words, said in _CSV_ERRORS.items() if words in str(error)), f"{error}; mend the file")
        raise DataError(f"data: {path}, after line {line}: cannot be read: {what}") from None


def _fields(row: dict[Any, Any], names: list[str], path: Path, line: int) -> Row:
    if None in row or None in row.values():
        where, separator = f"data: {path}, line {line}", wrong_separator(path, names)
        if separator:
            raise DataError(f"{where}: not one field, as in its first line: {separator}")
        raise DataError(f"{where}: not {len(names)} fields, as in its first line; mend it")
    return row


def read_txt(path: Path, position: list[int] | None = None) -> Found:
    lines = Lines(path, position)
    for line in lines:
        if line.strip():
            yield lines.position, lines.position[1], {"text": line.rstrip("\r\n")}


def read_blocks(path: Path, position: list[int] | None = None) -> Found:
    """A text is what stands between blank lines; a row's number is that of its first line."""
    lines = Lines(path, position)
    first, block = 0, ""
    for line in lines:
        if line.strip():
            first, block = (first, block + line) if block else (lines.position[1], line)
        elif block:
            yield lines.position, first, {"text": block.rstrip("\r\n")}
            block = ""
    if block:
        yield lines.position, first, {"text": block.rstrip("\r\n")}


READERS: dict[str, Callable[..., Found]] = {".jsonl": read_jsonl, ".csv": read_csv, ".txt": read_txt}


def wrong_separator(path: Path, names: list[str]) -> str | None:
    """Say that a csv file seems to have another separator than commas, and how to convert it; None if it does not."""
    mark = next((mark for mark in _SEPARATORS if len(names) == 1 and mark in names[0]), None)
    if mark is None or path.name.lower().removesuffix(".gz")[-4:] != ".csv":
        return None
    to = path.with_name(path.name[: path.name.lower().rindex(".csv")] + ".commas.csv")
    opened = f"gzip.open({str(path)!r}, 'rt'" if is_packed(path) else f"open({str(path)!r}"
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
