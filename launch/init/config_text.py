"""The text of a new run config: every section with the reasons beside it, valid before it is written."""

import os
import re
import textwrap
from pathlib import Path
from typing import Any

from launch.init.bases import Base, shown_path
from launch.init.choices import Settings
from launch.init.findings import clean
from launch.init.guesses import Guess
from launch.init.user_data import Found
from trainer.config import FileData, RunConfig

_WIDTH = 118
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")  # what YAML reads as itself, but for the words below
_YAML_WORDS = {"yes", "no", "true", "false", "null", "on", "off", "y", "n"}


def data_section(found: Found, guess: Guess, fraction: float | None, *, skip_bad_rows: bool) -> FileData:
    """Return the data section for files and columns; `fraction` is held out where there is no held-out file."""
    names = {"validation": Path(shown_path(found.validation))} if found.validation else {}
    part = {"validation_fraction": fraction} if fraction else {}
    return FileData(
        type="files",
        train=Path(shown_path(found.train)),
        split_txt=found.split_txt,
        skip_bad_rows=skip_bad_rows,
        **names,
        **part,
        **guess.columns,
    )


def compose(path: Path, name: str, data: FileData, guess: Guess, base: Base, settings: Settings) -> dict[str, Any]:
    """Return the sections of the config that is to stand at `path`. They are valid."""
    model: dict[str, Any] = {"type": "pretrained", "path": base.path}
    if base.made_by is not None:
        model["made_by"] = os.path.relpath(base.made_by, path.parent)
    chosen = data.model_dump(mode="json", exclude_defaults=True)
    # The columns are named even where they have their usual names: this is where a user looks for them.
    columns = {setting: getattr(data, setting) for setting in guess.columns}
    sections = {
        "run": {"name": name} | settings.sections["run"],
        "objective": {"type": guess.objective},
        "model": model,
        "data": {"type": "files"} | chosen | columns,
        **{section: values for section, values in settings.sections.items() if section != "run"},
    }
    RunConfig.model_validate(sections)
    return sections


def render(sections: dict[str, dict[str, Any]], reasons: dict[str, str], head: list[str]) -> str:
    """Return the YAML of the sections under the lines of `head`, with the reason for a section or key above it.

    The first line of `head` is not wrapped.
    """
    command, *rest = head  # the command stays on one line, to be copied
    lines = [f"# {_printable(command)}", *(line for text in rest for line in _comment(text, "") or ["#"])]
    for section, values in sections.items():
        lines += ["", *_comment(reasons.get(section, ""), ""), f"{section}:"]
        for key, value in values.items():
            lines += [*_comment(reasons.get(f"{section}.{key}", ""), "  "), f"  {key}: {_scalar(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        clean(text), _WIDTH, initial_indent=start, subsequent_indent=f"{start}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
            return value
        case str():
            return '"' + "".join(_escaped(char) for char in value) + '"'
        case _:
            return str(value)


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() else f"\\U{ord(char):08x}"
