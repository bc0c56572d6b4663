"""Rows of .parquet files, a few at a time, and of .json files, which are read whole."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.corpus import Row
from trainer.text_files import DataError, Found

_ROWS_AT_ONCE = 256


def read_parquet(path: Path, position: list[int] | None = None) -> Found:
    """Row groups before `position` are passed over unread, and of the others a few hundred rows are in memory."""
    import pyarrow

    first = position[0] if position else 0
    number = 0
    try:
        for number, row in _after(path, first):
            yield [number], number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        what = str(error).strip().partition("\n")[0]
        raise DataError(f"data: {path}, after row {max(number, first)}: cannot be read ({what}); mend it") from None


def _after(path: Path, first: int) -> Iterator[tuple[int, Row]]:
    """The rows after the first so many, with their 1-based numbers."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        _check_names(path, file.schema_arrow.names)
        stands = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if stands + size <= first:
                stands += size
                continue
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group]):
                for stands, row in enumerate(batch.to_pylist(), stands + 1):  # noqa: B020 - counts on
                    if stands > first:
                        yield stands, row


def _check_names(path: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"data: {path}: two columns are named {twice[0]!r}; rename one")


def read_json(path: Path, position: list[int] | None = None) -> Found:
    """A list of objects, or an object whose `data` is one."""
    rows = _listed(path)
    for number in range(position[0] if position else 0, len(rows)):
        if not isinstance(rows[number], dict):
            kind = type(rows[number]).__name__
            raise DataError(f"data: {path}, row {number + 1}: a {kind}; expected a list of objects")
        yield [number + 1], number + 1, rows[number]


def _listed(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except OSError as error:
        raise DataError(f"data: {path}: cannot be read ({error}); mend the file") from None
    except (ValueError, RecursionError) as error:
        hint = "; with an object per line, name it .jsonl" if "Extra data" in str(error) else "; mend it"
        raise DataError(f"data: {path}: not JSON ({error}){hint}") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f'data: {path}: holds no list of rows; expected [...] or {{"data": [...]}}, or use .jsonl')
    return rows


READERS: dict[str, Callable[..., Found]] = {".json": read_json, ".parquet": read_parquet}
