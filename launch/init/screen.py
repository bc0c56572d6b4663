"""What `trivet init` prints: tables on a terminal, plain lines elsewhere."""

import shlex
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.init.bases import Base
from launch.init.choices import duration
from launch.init.column import Column
from launch.init.findings import clean

_FEW_ROWS = 20  # of fewer, a score is that of single rows
_EXAMPLE_CHARS = 60
_PLAIN_WIDTH = 118  # of lines that do not go to a terminal


def show(data: Path, columns: list[Column], lines: list[tuple[str, str]]) -> None:
    """Print the columns of the data and what was found in it."""
    console = _console()
    console.print(Text(clean(str(data)), style="bold"))
    table = Table(
        "column", "type", "filled", "distinct", "for example", box=box.SIMPLE_HEAD if console.is_terminal else None
    )
    for column in columns:
        example = clean(column.example[: 4 * _EXAMPLE_CHARS])
        shown = example if len(example) <= _EXAMPLE_CHARS else f"{example[:_EXAMPLE_CHARS]}..."
        values = (clean(column.name), column.type, f"{column.filled_share:.0%}", f"{column.distinct:,}", shown)
        table.add_row(*map(Text, values))
    console.print(table)
    notes = Table.grid(padding=(0, 2))
    for what, text in lines:
        notes.add_row(Text(what, style="bold"), Text(text))
    console.print(notes)


def show_next(path: Path, name: str, objective: str, base: Base, seconds: float) -> None:
    """Print what was written and the commands that follow, as they are to be typed."""
    onnx = f"onnx/{name}"
    use = {
        "classification": [f"trivet predict {onnx} --text 'a text'"],
        "sft": [f"trivet generate {onnx} --prompt 'a question'", f"trivet serve {onnx}"],
        "causal_lm": [f"trivet generate {onnx} --raw --prompt 'How it begins'", f"trivet serve {onnx}"],
    }
    config, time = shlex.quote(str(path)), duration(seconds)
    console = _console()
    console.print(f"\nWrote {path}: {base.what}. Next:", soft_wrap=True)
    steps = [
        f"trivet train {config} --dry-run",
        f"trivet train {config}",
        f"trivet report runs/{name}",
        f"trivet export runs/{name} {onnx}",
    ]
    notes = [
        "check and build everything, train nothing",
        f"{time} on two CPU cores",
        "loss curves and figures",
        "to ONNX, proven",
    ]
    for command, note in zip(steps, notes, strict=True):
        console.print(f"  {command:<{max(map(len, steps))}}    # {note}", soft_wrap=True)
    for command in use[objective]:
        console.print(f"  {command}", soft_wrap=True)
    if (earlier := Path("runs") / name).exists():
        console.print(f"{earlier} holds an earlier run: remove it, or train with run.name=ANOTHER", soft_wrap=True)
    if base.made_by is not None:
        console.print(
            "A real model instead: --base FOLDER_OR_HUB_NAME, or get SmolLM2-135M first: python -m launch.pretrained",
            soft_wrap=True,
        )


def tell_few(num_rows: int) -> None:
    """Say on stderr where there are too few rows to train on for a run to show anything."""
    if num_rows < _FEW_ROWS:
        rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
        print(
            f"note: --from: {rows} to train on, fewer than {_FEW_ROWS}: a run tries the config out and shows nothing "
            "about a model; give more rows",
            file=sys.stderr,
        )


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_PLAIN_WIDTH)
