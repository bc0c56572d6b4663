"""Which files `trivet init --from` means, and their rows, read once."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.init.folders import files_in
from serving.directory import BadInput
from trainer.corpus import Row
from trainer.data_files import ENDINGS, READERS, DataError, TxtUnit, ending, read_rows

_LOOK_AT_LINES = 2_000
_FEWEST_BLOCKS = 20

# What reads other formats, for the advice to convert.
_PANDAS = {".xlsx": "read_excel", ".tsv": "read_table"}


@dataclass(frozen=True)
class Found:
    """The files of a data set, their rows, and remarks for the user."""

    source: Path
    train: Path
    validation: Path | None
    split_txt: TxtUnit
    train_rows: list[Row]
    validation_rows: list[Row] | None
    remarks: list[str]


def find(source: Path) -> Found:
    """Return the data that `source` names: a file, a folder of .txt files or of classes, or a folder with a train
    file or folder and perhaps a held-out one.

    Raises BadInput if there is none, or if it is broken, empty or ambiguous.
    """
    if not source.exists():
        raise BadInput(f"--from: {source}: no such file or folder; check the path")
    train, validation, remarks = files_in(source) if source.is_dir() else (source, None, [])
    if not train.is_dir() and ending(train) not in READERS:
        raise BadInput(f"--from: {train} has an unknown ending; accepted: {ENDINGS}{_convert(train)}")
    split_txt: TxtUnit = "lines"
    if train.is_file() and ending(train) == ".txt" and _stands_in_blocks(train):
        split_txt = "blocks"
        remarks.append("its lines stand in blocks: a text is what lies between blank lines (data.split_txt)")
    try:
        rows = list(read_rows(train, split_txt))
        held_out = list(read_rows(validation, split_txt)) if validation else None
    except DataError as error:
        raise BadInput(f"--from: {str(error).removeprefix('data: ')}") from None
    for path, some in ((train, rows), (validation, held_out)):
        if some is not None and not some:
            raise BadInput(f"--from: {path} holds no rows; at least a few dozen are needed to learn anything")
    return Found(source, train, validation, split_txt, rows, held_out, remarks)


def _stands_in_blocks(path: Path) -> bool:
    """Whether the first lines of a .txt file stand in blocks of short lines, as verses and speeches do."""
    sizes: list[int] = []  # of blocks, in lines
    before = 0
    for count, row in enumerate(read_rows(path), 1):  # gives the lines that are not blank
        line = int(row.place.rpartition(" ")[2])  # type: ignore[attr-defined]
        if line > before + 1 or not sizes:
            sizes.append(0)
        sizes[-1] += 1
        before = line
        if count >= _LOOK_AT_LINES:
            break
    return len(sizes) >= _FEWEST_BLOCKS and sum(sizes) > len(sizes)


def _convert(path: Path) -> str:
    reader = _PANDAS.get(path.suffix.lower())
    if reader is None:
        return ""
    to = path.with_suffix(".jsonl")
    code = f"import pandas; pandas.{reader}({str(path)!r}).to_json({str(to)!r}, orient='records', lines=True)"
    return f"; convert it: python -c {shlex.quote(code)}"
