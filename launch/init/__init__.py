"""`trivet init`: a config for the user's data, or the example configs to start from."""

import dataclasses
import os
import shlex
from pathlib import Path

from launch import shipped
from launch.init import bases, choices, column, config_text, guesses, profiles, screen, user_data
from launch.init.bases import Base
from launch.init.findings import findings
from launch.init.guesses import Guess, Wish
from launch.init.profiles import Profile
from launch.init.user_data import Found
from serving import directory
from serving.directory import BadInput
from trainer import sources
from trainer.config import FileData, Run
from trainer.data_files import wrong_separator
from trainer.sources import DataError, NothingHeldOut

_ENOUGH_HELD_OUT = 100  # rows; a part of the data that gives about so many is held out
_LARGER_PARTS = (0.3, 0.5)  # tried where the data is so small that the first choice holds nothing out


def init(name: str | None, data: Path | None, wish: Wish, base: str | None, *, force: bool) -> int:
    """Write a config for `data`, or without a name the example configs; return the exit code. Raises BadInput."""
    if name is None and data is None:
        if base is not None or wish != Wish(None, {}):
            raise BadInput("NAME and --from are missing: trivet init my-task --from data.csv")
        return copy_examples(Path("configs"), force=force)
    if data is None:
        raise BadInput(
            f"--from is missing: trivet init {name} --from data.csv (a .csv, .jsonl or .txt file, or a folder)"
        )
    if name is None:
        raise BadInput(f"NAME is missing: trivet init my-task --from {shlex.quote(str(data))}")
    return init_from(name, data, wish, base, force=force)


def init_from(name: str, data: Path, wish: Wish, base_name: str | None, *, force: bool) -> int:
    """Look at the data, say what is there, and write `configs/NAME.yaml` (NAME.yaml where there is no configs/)."""
    path = _config_path(name, force=force)
    base = bases.choose(base_name, path.parent)
    if Path(base.path) == Path("runs") / name / "model":
        raise BadInput(f"NAME: {name!r} is the run that makes the base model; choose another")
    found = user_data.find(data)
    columns = column.columns_of(found.train_rows)
    _check_separator(found.train, columns, wish)
    guess = guesses.guess(data, columns, wish)
    bases.check_kind(base, guess.objective)
    if guess.objective == "sft":
        bases.check_chat_template(base)
    found = _with_fitting_held_out(found, guess)
    section, splits = _divide(found, guess)
    profile = profiles.profile(splits, guess.objective, section, base.counter)
    if guess.objective == "classification" and len(profile.labels) < 2:
        raise BadInput(f"--label: every training row has the label {profile.labels[0][0]!r}; at least two are needed")
    settings = choices.choose(guess.objective, profile, base)
    length = settings.sections["batch"]["max_length"]
    lines = findings(found, columns, guess, profile, length)
    command = _command(name, data, wish, base_name, force=force)
    sections = config_text.compose(path, name, section, guess, base, settings)
    text = config_text.render(
        sections, settings.reasons | _reasons(profile, base), _head(path, command, lines, settings)
    )
    screen.show(data, columns, lines)
    _write(path, text, base)
    screen.show_next(path, name, guess.objective, base, settings.seconds)
    # One long text fills many rows where they are packed.
    screen.tell_few(max(len(splits.train), choices.num_rows(guess.objective, profile, length)))
    return 0


def copy_examples(folder: Path, *, force: bool) -> int:
    """Copy the example configs into `folder`, all or none. Raises BadInput where one there is different."""
    source = shipped.example_configs()
    if folder.is_dir() and folder.samefile(source):
        print(f"{folder}: the example configs, this clone's own\nnext: trivet train {folder}/pretrain_tiny.yaml")
        return 0
    files = sorted(path.relative_to(source) for path in source.rglob("*.yaml"))
    _check_places([folder / file for file in files])
    new = [file for file in files if not (folder / file).exists()]
    changed = [file for file in set(files) - set(new) if (folder / file).read_bytes() != (source / file).read_bytes()]
    if changed and not force:
        raise BadInput(
            f"{folder / min(changed)}: is there and differs from the example; move it, or replace it with --force"
        )
    for file in [*new, *changed]:
        _save(folder / file, (source / file).read_text(encoding="utf-8"))
    kept = len(files) - len(new) - len(changed)
    print(f"{folder}: {len(new) + len(changed)} example configs written" + (f", {kept} were there" if kept else ""))
    print(f"next: trivet train {folder}/pretrain_tiny.yaml    # or, for your data: trivet init my-task --from data.csv")
    return 0


def _check_places(paths: list[Path]) -> None:
    """Raise BadInput if a file cannot be written at one of the paths, before any is."""
    for path in paths:
        if path.is_dir():
            raise BadInput(f"{path}: is a folder where a config is to stand; move it")
        above = next(parent for parent in path.parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            what = "no permission to write there" if above.is_dir() else "is a file where a folder is to stand; move it"
            raise BadInput(f"{above}: {what}")


def _config_path(name: str, *, force: bool) -> Path:
    try:
        Run(name=name, steps=1)
    except ValueError:
        raise BadInput(
            f"NAME: {name!r} found; it names the run and its config: letters, digits, '.', '_' and '-', "
            f"the first a letter or a digit"
        ) from None
    if name.endswith((".yaml", ".yml")):
        raise BadInput(f"NAME: {name!r} found; give it without the ending: trivet init {name.rpartition('.')[0]} ...")
    path = Path("configs" if Path("configs").is_dir() else ".") / f"{name}.yaml"
    _check_places([path])
    if path.exists() and not force:
        raise BadInput(f"{path}: is there already; choose another NAME, or replace it with --force")
    return path


def _check_separator(train: Path, columns: list[column.Column], wish: Wish) -> None:
    """Raise BadInput for a csv file whose fields are not separated by commas, unless its one column is asked for."""
    names = [each.name for each in columns]
    what = wrong_separator(train, names)
    if what and names[0] not in wish.columns.values():
        raise BadInput(f"--from: {train} has one column, {names[0]!r}: {what}")


def _with_fitting_held_out(found: Found, guess: Guess) -> Found:
    """The data without its held-out file where that lacks a column that is learned from."""
    needed = [name for setting, name in guess.columns.items() if setting != "context"]
    rows = found.validation_rows
    missing = [name for name in needed if rows is not None and not any(name in row for row in rows)]
    if not missing or found.validation is None:
        return found
    remark = f"{found.validation.name} is not used: none of its rows has `{missing[0]}`"
    return dataclasses.replace(found, validation=None, validation_rows=None, remarks=[*found.remarks, remark])


def _divide(found: Found, guess: Guess) -> tuple[FileData, sources.Splits]:
    """The data section and the splits that training will see. Bad rows are left out only where there are any."""
    first = round(min(0.2, max(0.05, _ENOUGH_HELD_OUT / len(found.train_rows))), 2)
    for part in (None,) if found.validation else (first, *_LARGER_PARTS):
        data = config_text.data_section(found, guess, part, skip_bad_rows=True)
        try:
            splits = sources.divide(data, guess.objective, found.train_rows, found.validation_rows)
        except NothingHeldOut:
            continue
        except DataError as error:
            alone = f"; without it: --from {shlex.quote(str(found.train))}" if found.validation else ""
            raise BadInput(f"--from: {str(error).removeprefix('data.')}{alone}") from None
        return config_text.data_section(found, guess, part, skip_bad_rows=bool(splits.left_out)), splits
    raise BadInput(
        f"--from: {found.train}: rows too few or too alike to hold some out ({len(found.train_rows)}); a few dozen "
        f"different ones are needed, or a folder with a train and a test file"
    )


def _reasons(profile: Profile, base: Base) -> dict[str, str]:
    left_out = profile.splits.left_out
    return {
        "model": f"{base.what}; another: a model folder or a hub name",
        "data.validation_fraction": "held out by the hash of the content; name a file with `validation:` instead",
        "data.skip_bad_rows": sources.tell_left_out(profile.splits) if left_out else "",
    }


def _command(name: str, data: Path, wish: Wish, base_name: str | None, *, force: bool) -> str:
    """The command as it is to be typed again."""
    options = {"from": str(data), "objective": wish.objective, **wish.columns, "base": base_name}
    given = [part for option, value in options.items() if value is not None for part in (f"--{option}", value)]
    return shlex.join(["trivet", "init", name, *given, *(["--force"] if force else [])])


def _head(path: Path, command: str, lines: list[tuple[str, str]], settings: choices.Settings) -> list[str]:
    """The comment at the top of the config."""
    return [
        f"Written by: {command}",
        f"Run it ({choices.duration(settings.seconds)} on two CPU cores): trivet train {shlex.quote(str(path))}",
        "Every key, its range and its meaning: trivet config-docs",
        "",
        "What was found in the data:",
        *(f"- {what}: {text}" for what, text in lines),
    ]


def _write(path: Path, text: str, base: Base) -> None:
    if base.copied_from is not None and base.made_by is not None:
        _save(base.made_by, base.copied_from.read_text(encoding="utf-8"))
    _save(path, text)


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory.write_text(path, text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); choose another place") from None
