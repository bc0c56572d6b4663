"""Where rows come from: the embedded corpus, or the user's files. Rows are plain dicts, read once, checked early."""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from trainer import corpus
from trainer.config import EmbeddedData, FileData
from trainer.corpus import Row

_LARGEST_FIELD_BYTES = 2**30  # of a csv file: Python's own limit, 128 KiB, is shorter than many documents


class DataError(BadInput):
    """Data that cannot be trained on: missing, empty, broken, or without a needed column."""


class FileRow(dict[str, Any]):
    """A row that knows its file and line, so that an error about it can say where it stands."""

    def __init__(self, values: dict[str, Any], path: Path, line: int) -> None:
        super().__init__(values)
        self.place = f"{path}, line {line}"


@dataclass(frozen=True)
class Splits:
    """Training and held-out rows, and a hash of both in order."""

    train: list[Row]
    held_out: list[Row]
    fingerprint: str


def read_splits(data: EmbeddedData | FileData, objective: str) -> Splits:
    """Return the rows of a run. Raises DataError for missing or empty files and rows that cannot be read."""
    if isinstance(data, EmbeddedData):
        train, held_out = corpus.split(corpus.VIEWS[objective](corpus.read_items()))
        train = train[: data.max_rows]
    elif data.validation is not None:
        train, held_out = list(read_rows(data.train)), list(read_rows(data.validation))
    else:
        rows = list(read_rows(data.train))
        train, held_out = _split_by_content(rows, data.validation_fraction)
        if rows and not (train and held_out):
            raise DataError(
                f"data.validation_fraction: {data.validation_fraction} leaves {len(train)} of the {len(rows)} rows of "
                f"{data.train} for training; change it, or name a file as data.validation"
            )
    for name, rows in (("train", train), ("validation", held_out)):
        if not rows:
            raise DataError(f"data.{name}: no rows in {_describe(data, name)}; at least one is needed")
    return Splits(train, held_out, _fingerprint(train, held_out))


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv or .txt file (one text a line), also gzipped."""
    name = path.name.removesuffix(".gz")
    reader = READERS.get(Path(name).suffix)
    if reader is None:
        raise DataError(f"data: {path} has an unknown ending; accepted: {', '.join(READERS)}, each also with .gz")
    if not path.is_file():
        raise DataError(f"data: {path}: no such file; check the path (it is relative to where you stand)")
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, values in reader(_lines(file), path):
                yield FileRow(values, path, line)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"data: {path}, after line {line}: cannot be read ({error}); mend the file") from None
    except _NotUTF8 as error:
        raise DataError(f"data: {path}, line {error}: not UTF-8 text; convert the file to UTF-8") from None


class _NotUTF8(Exception):
    """Carries the number of the line."""


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file in UTF-8, with or without the mark that some editors put before the first."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _NotUTF8(number) from None


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
            expected = len(reader.fieldnames or ())
            raise DataError(
                f"data: {path}, line {reader.line_num}: not {expected} fields, as in its first line; mend it"
            )
        yield reader.line_num, row


def _read_txt(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Row]]:
    yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1) if line.strip())


READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}


def _split_by_content(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Hold out rows by the hash of their content, so that equal rows never stand on both sides."""
    held = [int.from_bytes(_digest(row)[:8]) < fraction * 2**64 for row in rows]
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _digest(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).digest()


def _fingerprint(train: list[Row], held_out: list[Row]) -> str:
    total = hashlib.sha256()
    for row in (*train, {}, *held_out):
        total.update(_digest(row))
    return total.hexdigest()


def _describe(data: EmbeddedData | FileData, name: str) -> str:
    if isinstance(data, EmbeddedData):
        return "the embedded corpus"
    return str(data.validation if name == "validation" and data.validation else data.train)
