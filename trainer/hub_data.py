"""Data sets of the hub, and folders that `datasets.load_dataset` reads. Code that comes with one is never run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from serving.directory import BadInput
from trainer import hub
from trainer.config import HubSource
from trainer.corpus import Row
from trainer.data_files import DataError
from trainer.rows import Facts, Position, Rows, hash_of

# Features that a text model cannot learn from, and that need further packages to be decoded.
_MEDIA = {"Image", "Audio", "Video", "Pdf", "Nifti"}


class HubRow(Row):
    """A row that knows its split and number."""

    def __init__(self, values: Row, place: str) -> None:
        super().__init__(values)
        self.place = place


class HubRows(Rows):
    """The rows of a split: from the Arrow files that `datasets` keeps in its cache, or as they come down (streaming).

    Classes that the data set numbers are given by their names. A position is the number of rows before it; a stream
    is read again up to there.
    """

    def __init__(self, data: HubSource, split: str, *, streaming: bool) -> None:
        self.where = f"{data.path}, split {split}"
        self._rows = _load(data, split, streaming=streaming)
        self._seen = [data.path, str(data.subset), str(data.revision), split]
        self._names = {name: found for name, f in (self._rows.features or {}).items() if (found := _class_names(f))}

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        first = position[0] if position else 0
        rows = self._rows.skip(first) if first else self._rows
        number = first
        try:
            for number, row in enumerate(rows, first + 1):
                yield [number], HubRow(self._named(row), f"{self.where}, row {number}")
        except GeneratorExit:
            raise
        except Exception as error:  # whatever the library that reads the files says
            raise DataError(f"data.path: {self.where}, after row {number}: cannot be read ({_said(error)})") from None

    def glance(self) -> Facts:
        return Facts(None, hash_of(self._seen))

    def states(self) -> list[tuple[str, int, str]]:
        """Return the name, the size in memory and the library's own hash of the Arrow files; not of a stream."""
        return [(self.where, self._rows.data.nbytes, self._rows._fingerprint)]

    def _named(self, row: Row) -> Row:
        return row | {name: _names_of(row[name], names) for name, names in self._names.items()}


def _load(data: HubSource, split: str, *, streaming: bool) -> Any:
    """The split, without columns of pictures and sounds. Raises DataError, within seconds where the hub is offline."""
    check_source(data.path)
    import datasets

    shown = data.path if data.subset is None else f"{data.path} ({data.subset})"
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(data.path, data.subset, split=split, revision=data.revision, streaming=streaming)
    except Exception as error:  # of the hub, of file systems, of pandas and Arrow: all say why
        raise DataError(f"data.path: {shown}, split {split}: cannot be loaded ({_said(error)})") from None
    media = [name for name, feature in (rows.features or {}).items() if type(feature).__name__ in _MEDIA]
    return rows.remove_columns(media) if media else rows


def check_source(path: str) -> None:
    """Raise DataError, within seconds, for what is no folder, and no data set that this machine can get at."""
    if Path(path).is_file():
        raise DataError(f"data.path: {path}: is a file; use data.type: files with train: {path}, or name its folder")
    is_cached = _is_cached(path)
    if is_cached and constants.HF_HUB_OFFLINE:
        return
    try:
        hub.check_reachable(path, "data.path")
    except BadInput as error:
        raise DataError(f"{error}{'; or set HF_HUB_OFFLINE=1 to use the copy in the cache' * is_cached}") from None


def _is_cached(path: str) -> bool:
    """Whether the data set was loaded before: its folder is named after it in small letters and underscores."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    wanted = path.replace("/", "").replace("_", "").lower()
    return folder.is_dir() and any(each.name.replace("_", "").lower() == wanted for each in folder.iterdir())


def _class_names(feature: Any) -> list[str] | None:
    """The names of a class feature, also of one inside a list."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if isinstance(names, list) else None


def _names_of(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_names_of(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _said(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
