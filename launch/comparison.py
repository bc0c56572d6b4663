"""`trivet export --compare`: each number format exported, and size, speed, memory and quality side by side."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.held_out import held_out_rows
from launch.speed import PEAK
from launch.stopping import stopped, stopped_by_sigterm
from serving.directory import BadInput, unfinished
from serving.export_options import Options
from serving.export_paths import find_model
from serving.quality import figure
from serving.verify import VerificationFailed

ROUNDS = 5
PLOT = "comparison.png"
BASE = "fp32"


@dataclass
class Line:
    """One number format: its quality check (none for fp32), and unless it was refused its figures."""

    name: str
    refused: str | None = None
    quality: dict[str, Any] | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def says(self) -> str:
        """What is said of its quality."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        return "as the source" if self.quality is None else figure(self.quality)


def compare_formats(model: Path, onnx_dir: Path, quantize: str | None, data: Path | None, **asked: Any) -> int:
    """Export fp32 and the formats named, print and plot what each costs and gains; return 0, or 1 if fp32 is refused.

    Each goes into a folder of `onnx_dir` with its name. Raises BadInput before any work.
    SIGTERM ends it as Ctrl-C does: with no folder half-written, and 130. A folder made here is not left empty.
    """
    is_new = not onnx_dir.exists()
    try:
        with stopped_by_sigterm():
            return _compared(model, onnx_dir, quantize, data, asked)
    except KeyboardInterrupt:
        return stopped(f"export: stopped; no format in {onnx_dir} is half-written")
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not there, or holds something
                onnx_dir.rmdir()


def _compared(model: Path, onnx_dir: Path, quantize: str | None, data: Path | None, asked: dict[str, Any]) -> int:
    formats = _formats(quantize)
    options = {BASE: Options(**asked), **{name: Options(**asked | {"quantization": name}) for name in formats}}
    find_model(model)  # refuses what is none before torch is loaded
    _check_folder(onnx_dir, model, [*options])
    from launch.comparison_plot import plot

    held_out = held_out_rows(model, data)
    lines = [exported(model, onnx_dir / name, each, held_out) for name, each in options.items()]
    _tell("measuring speed and memory")
    measure(lines, onnx_dir)
    print_table(lines)
    plot(lines, onnx_dir / PLOT)
    Console(stderr=True).print(f"plotted: {onnx_dir / PLOT}", highlight=False, soft_wrap=True)
    return 0 if lines[0].refused is None else 1


def _tell(stage: str) -> None:
    print(f"export: {stage}", file=sys.stderr, flush=True)


def _formats(quantize: str | None) -> list[str]:
    formats = [name.strip() for name in (quantize or "").split(",") if name.strip()]
    if not formats:
        raise BadInput("--compare: nothing to compare; name formats: --quantize int8,int8-weights,int4 --compare")
    return list(dict.fromkeys(formats))


def _check_folder(onnx_dir: Path, model: Path, names: list[str]) -> None:
    """Raise BadInput where the folder holds anything but an earlier comparison, whole or killed."""
    if onnx_dir.exists() and not onnx_dir.is_dir():
        raise BadInput(f"{onnx_dir}: is a file; give a folder to write to")
    if onnx_dir.resolve() == model.resolve():
        raise BadInput(f"{onnx_dir}: is the source; give a folder beside it")
    formats = {*names, BASE, "int8", "int8-weights", "int4"}
    accepted = {PLOT, *formats, *(path.name for name in formats for path in unfinished(onnx_dir / name))}
    others = sorted(path.name for path in onnx_dir.iterdir() if path.name not in accepted) if onnx_dir.exists() else []
    if others:
        raise BadInput(f"{onnx_dir}: holds {others[0]}, which is of no comparison; give a new folder")


def exported(model: Path, folder: Path, options: Options, held_out: Any) -> Line:
    """Export the model to `folder`, whose name is the format's; return its quality, or why it was refused."""
    from serving.export import export_model
    from trainer.strategies.adapter_files import load as attach

    started, line = time.perf_counter(), Line(folder.name)
    tell = lambda stage: _tell(f"{folder.name}: {stage}")  # noqa: E731
    try:
        record = export_model(model, folder, options, held_out=held_out, attach=attach, progress=tell)
    except VerificationFailed as error:
        record = error.record or {"checks": {}}
        failed = {name: check for name, check in record["checks"].items() if not check["passed"]}
        line.refused = figure(failed["quality"]) if "quality" in failed else str(error)
    line.quality = record["checks"].get("quality")
    line.figures["export s"] = time.perf_counter() - started
    if line.refused is None:
        line.figures["MB"] = sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 1e6
    return line


def measure(lines: list[Line], onnx_dir: Path) -> None:
    """Fill in speed and memory: medians of rounds in which all directories take turns, each in its own process."""
    processes = {line.name: _started(onnx_dir / line.name) for line in lines if line.refused is None}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    try:
        for process in processes.values():
            _read(process)  # ready
        for _ in range(ROUNDS):
            for name, process in processes.items():
                found[name].append(json.loads(_read(process, "measure\n")))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for line in lines:
        for kind in found.get(line.name, [{}])[0]:
            each = [figures[kind] for figures in found[line.name]]
            line.figures[kind] = max(each) if kind == PEAK else statistics.median(each)


def _started(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launch.speed", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _read(process: "subprocess.Popen[str]", ask: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(ask)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that measures ended with code {process.wait()}")
    return line


def columns(lines: list[Line]) -> list[str]:
    """Return the names of all figures, in the order in which they were taken."""
    return list(dict.fromkeys(name for line in lines for name in line.figures))


def print_table(lines: list[Line]) -> None:
    """Print a column for each format; beside each figure, how many times that of fp32 it is."""
    table = Table(title="number formats side by side")
    table.add_column("")
    for line in lines:
        table.add_column(line.name, justify="right")
    base = lines[0]
    for name in columns(lines):
        cells = [_cell(line.figures.get(name), base.figures.get(name), is_base=line is base) for line in lines]
        table.add_row(name, *cells)
    table.add_row("quality", *(line.says for line in lines))
    Console().print(table)


def _cell(value: float | None, base: float | None, *, is_base: bool) -> str:
    if value is None:
        return "-"
    return shown(value) if is_base or not base else f"{shown(value)} (x{value / base:.2f})"


def shown(value: float) -> str:
    """Return a figure as it is printed."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
