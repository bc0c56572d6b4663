"""Examples on disk: a flat array for each of their fields, and where each example starts in it.

`examples.json` names the columns; `<field>.values` holds numbers, the whole ones in the smallest unsigned type that
fits once `base` is taken off; `<field>.starts` holds int64. Values are read with pread and not through a memory map:
pages of a map count as this process's memory, and a file cut short under it would be a signal instead of an error.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from trainer.packing import Example

INDEX = "examples.json"
_FIELDS = [field.name for field in fields(Example)]
_OPTIONAL = {field.name for field in fields(Example) if field.default is None}
_NOTHING = np.zeros(0, np.int32)
_COPY_BYTES = 2**24


@dataclass(frozen=True)
class Column:
    """How the values of one field lie in their file: value = `base` + what is `stored`, as `dtype`."""

    dtype: np.dtype
    low: int = 0
    high: int = 0

    @cached_property
    def base(self) -> int:
        return min(self.low, 0)

    @cached_property
    def stored(self) -> np.dtype:
        if self.dtype.kind == "f":
            return self.dtype
        return np.min_scalar_type(self.high - self.base)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return the values as they are stored."""
        if self.dtype.kind == "f":
            return values.astype(self.stored)
        return (values.astype(np.int64) - self.base).astype(self.stored)

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """Return the values again, as they were."""
        values = stored.astype(self.dtype)
        if self.dtype.kind != "f" and self.base:
            values += self.base
        return values

    def widened(self, values: np.ndarray) -> "Column":
        """Return the column that also holds these values."""
        dtype = np.result_type(self.dtype, values.dtype)
        if dtype.kind == "f":
            return Column(dtype)
        return Column(dtype, min(self.low, int(values.min())), max(self.high, int(values.max())))


class ExampleStore(Sequence[Example]):
    """The examples of a folder that `write_examples` wrote. Raises OSError or ValueError where it is no such folder."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._num_examples: int = index["num_examples"]
        self._columns = {
            name: Column(np.dtype(column["dtype"]), column["low"], column["high"])
            for name, column in index["columns"].items()
        }
        self._starts = self._read_starts(folder)
        self._files = {name: (folder / f"{name}.values").open("rb", buffering=0) for name in self._columns}

    def _read_starts(self, folder: Path) -> dict[str, np.ndarray]:
        """Where the values of each field start; one array in memory for those that are alike, as they mostly are."""
        found: dict[str, np.ndarray] = {}
        for name in self._columns:
            starts = np.fromfile(folder / f"{name}.starts", np.int64)
            found[name] = next((known for known in found.values() if np.array_equal(known, starts)), starts)
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, shape [N]."""
        return np.diff(self._starts["input_ids"]).astype(np.int32) if self._columns else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._num_examples

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        values: dict[str, Any] = {name: self._read(name, index % len(self)) for name in self._columns}
        return Example(**values)

    def _read(self, name: str, index: int) -> np.ndarray | None:
        column = self._columns[name]
        start, stop = self._starts[name][index : index + 2].tolist()
        if start == stop and name in _OPTIONAL:
            return None
        size = column.stored.itemsize
        found = os.pread(self._files[name].fileno(), (stop - start) * size, start * size)
        if len(found) != (stop - start) * size:
            raise OSError(f"{self._files[name].name}: cut short since the run started; start the run again")
        return column.unpack(np.frombuffer(found, column.stored))


def write_examples(folder: Path, parts: Iterable[Sequence[Example]]) -> int:
    """Write the examples into an existing folder, a part at a time; return how many there are.

    No more than a part is in memory. Fields are one-dimensional arrays; where an example lacks one, it has no values.
    """
    writers: dict[str, _ColumnWriter] = {}
    num_examples = 0
    for part in parts:
        for name in _FIELDS:
            arrays = [getattr(example, name) for example in part]
            if name not in writers and any(array is not None for array in arrays):
                writers[name] = _ColumnWriter(folder, name)
                writers[name].add([_NOTHING] * num_examples)
            if name in writers:
                writers[name].add([_NOTHING if array is None else array for array in arrays])
        num_examples += len(part)
    columns = {name: writer.close() for name, writer in writers.items()}
    index = {"num_examples": num_examples, "columns": columns}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return num_examples


class _ColumnWriter:
    """The files of one field while they are written. What is too narrow for new values is written again, wider."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.values"
        self.column: Column | None = None
        self.values: IO[bytes] = self.path.open("wb")
        self.starts: IO[bytes] = (folder / f"{name}.starts").open("wb")
        self.starts.write(np.zeros(1, np.int64).tobytes())
        self.stop = 0

    def add(self, arrays: list[np.ndarray]) -> None:
        stops = self.stop + np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self.starts.write(stops.tobytes())
        filled = [array for array in arrays if len(array)]
        if not filled:
            return
        flat = np.concatenate(filled)
        column = (self.column or Column(flat.dtype)).widened(flat)
        if self.column and (column.stored, column.base) != (self.column.stored, self.column.base):
            self._write_again(self.column, column)
        self.column, self.stop = column, int(stops[-1])
        self.values.write(column.pack(flat).tobytes())

    def close(self) -> dict[str, Any]:
        self.values.close()
        self.starts.close()
        column = self.column or Column(np.dtype(np.int32))
        about = {"dtype": column.dtype.str, "low": column.low, "high": column.high}
        return {**about, "stored": column.stored.str, "base": column.base, "num_values": self.stop}

    def _write_again(self, old: Column, new: Column) -> None:
        self.values.close()
        wider = self.path.with_suffix(".wider")
        with wider.open("wb") as file:
            for chunk in _chunks(self.path, old.stored):
                file.write(new.pack(old.unpack(chunk)).tobytes())
        wider.replace(self.path)
        self.values = self.path.open("ab")


def _chunks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while data := file.read(_COPY_BYTES):
            yield np.frombuffer(data, dtype)
