"""What the files and sub-folders of a data folder are for: a train file, splits, classes, or texts."""

import re
import shlex
from pathlib import Path

from serving.directory import BadInput
from trainer.data_files import READERS, DataError, ending, texts_in

_TRAIN_NAMES = ("train", "training")
_HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "eval", "test", "testing")  # the first that is there is used
_IS_TEST = re.compile(r"(.*[_. -])?test(ing)?", re.IGNORECASE)
_NAMED = 6  # files or folders that a message names

Split = tuple[Path, Path | None, list[str]]  # what is trained on, what is held out, remarks


def files_in(folder: Path) -> Split:
    """Return the training file and the held-out file of a folder, or the folders that are made of texts.

    Raises BadInput where it is not clear which they are, or nothing there can be read.
    """
    files = sorted(path for path in folder.iterdir() if _is_data(path))
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if train := _named(_TRAIN_NAMES, files):
        held_out = _first_named(_HELD_OUT_NAMES, files)
        return train, held_out, _not_used([path for path in (*files, *folders) if path not in (train, held_out)])
    if split := _split_folders(folder, files, folders):
        return split
    if len(files) == 1 and not folders:
        return files[0], None, [f"{files[0].name} is the only data file there"]
    if any(ending(file) != ".txt" or _stem(file) in _HELD_OUT_NAMES for file in files):
        raise BadInput(f"--from: {folder} has no train file; it has: {_names(files)}; {_advice(files)}")
    return folder, None, _ignored(folder)


def _split_folders(folder: Path, files: list[Path], folders: list[Path]) -> Split | None:
    """The sub-folders named like train and test; None where the sub-folders are rather classes."""
    full = [path for path in folders if _holds_data(path)]
    train, held_out = _named(_TRAIN_NAMES, full), _first_named(_HELD_OUT_NAMES, full)
    if train is None:
        if full and all(_stem(path) in _HELD_OUT_NAMES for path in full):
            raise BadInput(f"--from: {folder} has no train folder; it has: {_names(full)}; {_advice(full)}")
        return None
    if held_out is None and len(full) > 1 and not any(map(_holds_data, train.iterdir())):
        return None  # a class that happens to be called train
    used = [path for path in (train, held_out) if path is not None]
    said = f"the folder {train.name} is trained on" + (f", {held_out.name} held out" if held_out else "")
    rest = [path for path in (*files, *folders) if path not in used]
    files_used = [_file_or_folder(path) for path in used]
    ignored = [remark for path in files_used if path.is_dir() for remark in _ignored(path)]
    return files_used[0], files_used[1] if held_out else None, [said, *_not_used(rest), *ignored]


def _holds_data(path: Path) -> bool:
    """Whether a path is a folder with data files in it, or in its sub-folders."""
    return (
        path.is_dir()
        and not path.name.startswith(".")
        and any(_is_data(file) for pattern in ("*", "*/*") for file in path.glob(pattern))
    )


def _file_or_folder(folder: Path) -> Path:
    """The one table of a folder; the folder itself where it is made of texts."""
    tables = sorted(path for path in folder.iterdir() if _is_data(path) and ending(path) != ".txt")
    if len(tables) > 1:
        raise BadInput(f"--from: {folder} has several data files: {_names(tables)}; {_advice(tables)}")
    return tables[0] if tables else folder


def _ignored(folder: Path) -> list[str]:
    """What of a folder of texts is not read, and the sub-folders that hold none. Raises BadInput if no text is there.

    Texts are read in the folder itself or, as classes, in its sub-folders, and no deeper.
    """
    try:
        texts = {path for path, _ in texts_in(folder)}
    except DataError as error:
        raise BadInput(f"--from: {str(error).removeprefix('data: ')}") from None
    every = [path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder))]
    others = [path for path in every if path.is_file() and path not in texts]
    used = {path.parent for path in texts}
    deeper = sorted({path.parent for path in others} - used - {folder})
    empty = [path for path in folder.iterdir() if path.is_dir() and path in every and path not in used]
    within = f" (also in {_names(deeper, folder)})" if deeper else ""
    remarks = [f"other files there, which are ignored: {len(others):,}{within}"] if others else []
    return remarks + ([f"folders without texts, which are ignored: {_names(sorted(empty))}"] if empty else [])


def _is_data(path: Path) -> bool:
    return path.is_file() and ending(path) in READERS.keys() - {".json"} and not path.name.startswith(".")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _named(names: tuple[str, ...], paths: list[Path]) -> Path | None:
    found = [path for path in paths if _stem(path) in names]
    if len(found) > 1:
        raise BadInput(f"--from: both {found[0]} and {found[1]}; {_advice(found)}")
    return found[0] if found else None


def _first_named(names: tuple[str, ...], paths: list[Path]) -> Path | None:
    return next((path for name in names if (path := _named((name,), paths))), None)


def _stem(path: Path) -> str:
    name = path.name.lower()
    return name if path.is_dir() else name.removesuffix(".gz").removesuffix(ending(path))


def _not_used(paths: list[Path]) -> list[str]:
    return [f"not used: {_names(paths)}"] if paths else []


def _names(paths: list[Path], start: Path | None = None) -> str:
    shown = [str(path.relative_to(start)) if start else path.name for path in paths[:_NAMED]]
    return ", ".join([*shown, "..."] if len(paths) > _NAMED else shown)


def _advice(paths: list[Path]) -> str:
    """Which path to name; never test data, which is there to be kept for the end."""
    usable = [path for path in paths if not _IS_TEST.fullmatch(_stem(path))]
    return (
        f"name one of them: --from {shlex.quote(str(usable[0]))}" if usable else "name what is to be trained on train"
    )
