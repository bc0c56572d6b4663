"""`trivet report`: runs and sweeps as one self-contained HTML page, and as a table in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import duration, report_data, report_page, report_plots
from launch.report_data import Run, Sweep, is_number, mapping
from launch.report_evidence import leaks, samples
from launch.report_labels import by_label
from serving.directory import BadInput, write_text

COLUMNS = ("run", "state", "objective", "strategy", "steps", "held-out", "weights that learn", "tokens/s", "time")


@dataclass(frozen=True)
class Section:
    """Evidence above the runs: a table, a note below it, and figures (SVG from launch.report_plots)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    figures: Sequence[str] = ()


def write_report(paths: Sequence[Path], output: Path | None = None, *, sections: Sequence[Section] = ()) -> Path:
    """Write one HTML page about run and sweep folders; return its path (default: report.html in the first folder).

    Only the files of those folders are read. A run that failed, still runs or left broken files is shown as such.
    Raises BadInput for a path that is neither a run nor a sweep.
    """
    runs, sweeps = _read_all(paths)
    output = Path(output) if output else Path(paths[0]) / "report.html"
    title = f"Trivet: {', '.join(Path(path).resolve().name for path in paths)}"
    finished = sum(run.state == "done" for run in runs)
    subtitle = f"{finished} of {len(runs)} runs finished" if len(runs) != 1 else f"{runs[0].folder}"
    body = [
        *(report_page.cards(_cards(runs[0])) for _ in runs if len(runs) == 1 and not sweeps),
        *(part for section in sections for part in _section(section)),
        *(part for sweep in sweeps for part in _section(_ranking(sweep))),
        *_runs(runs),
    ]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, report_page.page(title, subtitle, body))
    except OSError as error:
        raise BadInput(f"{output}: cannot be written ({error.strerror}); choose another with --output") from None
    return output


def terminal_table(paths: Sequence[Path]) -> None:
    """Print the runs, and the ranking of every sweep, to the terminal."""
    runs, sweeps = _read_all(paths)
    console = Console()
    for sweep in sweeps:
        section = _ranking(sweep)
        rows = [[*row[:6], str(row[7]).partition(" ")[0]] for row in section.rows]  # the reasons follow below
        console.print(_terminal(section.title, [*section.columns[:6], section.columns[7]], rows))
    if runs and not sweeps:
        console.print(_terminal("", COLUMNS[:2] + COLUMNS[3:], [row[:2] + row[3:] for row in map(_row, runs)]))
    for run in runs:
        for problem in _problems(run):
            console.print(f"[yellow]{escape(run.name)}[/]: {escape(problem)}")


def _read_all(paths: Sequence[Path]) -> tuple[list[Run], list[Sweep]]:
    found = [report_data.read(Path(path)) for path in paths]
    sweeps = [item for item in found if isinstance(item, Sweep)]
    runs = [item for item in found if isinstance(item, Run)] + [run for sweep in sweeps for run in sweep.runs]
    return runs, sweeps


# --- parts of the page -----------------------------------------------------------------------------------------------


def _section(section: Section) -> list[str]:
    table = report_page.table(section.columns, section.rows) if section.rows else ""
    return [
        report_page.heading(section.title),
        table,
        report_page.note(section.note),
        report_page.figures(section.figures),
    ]


def _runs(runs: list[Run]) -> list[str]:
    if not runs:
        return []
    rows = [[run.name, report_page.state(run.state), *_row(run)[2:]] for run in runs]
    parts = [report_page.heading("Runs"), report_page.table(COLUMNS, rows)]
    parts += [report_page.warning(f"{run.name}: {problem}") for run in runs for problem in _problems(run)]
    parts += [report_page.warning(f"{run.name}: {found}") for run in runs for found in leaks(run)]
    parts += [report_page.heading("Curves"), report_page.figures(_curves(runs))]
    parts += [part for run in runs for part in [*by_label(run), *samples(run)]]
    parts.append(report_page.heading("Details"))
    for run in runs:
        facts = "\n".join(f"{name}: {value}" for name, value in _facts(run))
        parts += [report_page.details(f"{run.name}: measurements and versions", facts)]
        config = run.folder / "config.yaml"
        if config.is_file():
            text = config.read_text(encoding="utf-8", errors="replace")
            parts += [report_page.details(f"{run.name}: config.yaml", text)]
    return parts


def _curves(runs: list[Run]) -> list[str]:
    def series(key: str, kind: str = "train", chosen: list[Run] = runs) -> list[report_plots.Series]:
        rows = {run.name: run.train if kind == "train" else run.evals for run in chosen}
        points = {
            name: [(row["step"], row[key]) for row in values if is_number(row.get(key))]
            for name, values in rows.items()
        }
        return [(name, [x for x, _ in found], [y for _, y in found]) for name, found in points.items() if found]

    plots = []
    tasks = list(dict.fromkeys(run.task for run in runs))
    for task in tasks:
        chosen = [run for run in runs if run.task == task]
        losses, held_out = series("loss", chosen=chosen), series("eval_loss", "eval", chosen)
        title = "Loss" if len(tasks) == 1 else f"Loss: {task}"
        if losses or held_out:
            plots.append(report_plots.line_plot(title, losses, x="step", y=chosen[0].loss_unit, marked=held_out))
    for key, title in (
        ("accuracy", "Held-out accuracy"),
        ("f1", "Held-out F1 of entities"),
        ("macro_f1", "Held-out F1, mean over labels"),
    ):
        if found := series(key, "eval"):
            plots.append(report_plots.line_plot(title, [], x="step", y=key, marked=found))
    for key, title, unit in (
        ("lr", "Learning rate", "learning rate"),
        ("tokens_per_s", "Speed", "tokens/s"),
        ("grad_norm", "Gradient norm before clipping", "norm"),
    ):
        if found := series(key):
            plots.append(report_plots.line_plot(title, found, x="step", y=unit))
    return plots


def _ranking(sweep: Sweep) -> Section:
    """The trials of a sweep, best first, and their score against the number of weights that learn."""
    rows, points = [], []
    name = next((str(entry["score_name"]) for entry in sweep.ranking if entry.get("score_name")), "score")
    for place, entry in enumerate(sweep.ranking, start=1):
        label = Path(str(entry.get("run", "?"))).name
        score, weights = entry.get("score"), entry.get("trainable_parameters")
        failed = not is_number(score)
        rows.append(
            [
                "" if failed else str(place),
                label,
                entry.get("strategy", "?"),
                _number(score),
                _number(weights),
                _duration(entry.get("seconds")),
                " ".join(map(str, entry.get("overrides", []))),
                " ".join(filter(None, [str(entry.get("state", "")), str(entry.get("reason") or "")])),
            ]
        )
        if is_number(score) and is_number(weights):
            points.append((label, weights, score))
    columns = ["place", "trial", "strategy", name, "trainable weights", "time", "overrides", "state"]
    plot = report_plots.scatter_plot(
        "Score against trainable weights", points, x="trainable weights", y=name, log_x=True
    )
    return Section(f"Sweep {sweep.folder.name}", columns, rows, figures=[plot] if points else [])


def _cards(run: Run) -> list[tuple[str, str, str]]:
    first, last = run.metric(run.score_name)
    result = run.result
    trainable, total = result.get("trainable_parameters"), result.get("total_parameters")
    share = f"{trainable / total:.1%} of {_number(total)}" if is_number(trainable) and is_number(total) else ""
    return [
        ("State", run.state, f"{run.step:,} steps"),
        (f"Held-out {run.score_name}", _number(last), f"{_number(first)} before training"),
        ("Weights that learn", _number(trainable), share),
        ("Speed", _number(result.get("tokens_per_s")), "tokens/s"),
        ("Time", _duration(result.get("seconds")), f"{_number(result.get('tokens'))} tokens"),
        ("Peak memory", _size(result.get("peak_memory_bytes")), _beside_memory(result)),
    ]


def _row(run: Run) -> list[str]:
    first, last = run.metric(run.score_name)
    score = f"{run.score_name.removeprefix('eval_')} {_number(first)} → {_number(last)}" if is_number(first) else ""
    weights = _number(run.result.get("trainable_parameters"))
    speed, seconds = _number(run.result.get("tokens_per_s")), _duration(run.result.get("seconds"))
    steps = f"{run.step:,}"
    return [run.name, run.state, run.objective, run.strategy, steps, score, weights, speed, seconds]


def _facts(run: Run) -> list[tuple[str, str]]:
    result = run.result
    metrics = {**(run.evals[-1] if run.evals else {}), **mapping(result, "metrics")}
    changes = [
        (f"held-out {name}", " -> ".join(_number(value) for value in run.metric(name)))
        for name in metrics
        if name not in ("kind", "step", "elapsed_s")
    ]
    return [
        ("folder", str(run.folder)),
        *changes,
        ("tokens seen", _number(result.get("tokens"))),
        ("peak memory", _size(result.get("peak_memory_bytes"))),
        *([("peak memory as planned", _size(planned))] if (planned := _planned_bytes(result)) is not None else []),
        ("processes", str(result.get("world_size", ""))),
        ("data fingerprint", str(result.get("data_fingerprint", ""))),
        ("versions", ", ".join(f"{name} {version}" for name, version in mapping(result, "versions").items())),
    ]


def _problems(run: Run) -> list[str]:
    reason = str(run.status.get("reason") or "")
    unfinished = {
        "failed": f"failed at step {run.step}: {reason}",
        "stopped": f"stopped at step {run.step} ({reason}); the same command goes on from there",
        "running": f"still running at step {run.step}, or killed there; the same command goes on from its checkpoint",
        "unknown": "has no status.json; it never started, or is no finished run",
    }
    return [*([unfinished[run.state]] if run.state in unfinished else []), *run.problems]


# --- values as text --------------------------------------------------------------------------------------------------


def _number(value: object) -> str:
    """Whole numbers with separators, others with four significant digits; empty where there is none."""
    if not is_number(value):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: object) -> str:
    return duration.in_words(seconds) if is_number(seconds) else ""


def _size(num_bytes: object) -> str:
    if not is_number(num_bytes):
        return ""
    return f"{num_bytes / 1024**3:.2f} GiB" if num_bytes >= 1024**3 else f"{num_bytes / 1024**2:.0f} MiB"


def _beside_memory(result: dict[str, Any]) -> str:
    """What was planned, and of which process it is."""
    planned = _planned_bytes(result)
    processes = _processes(result.get("world_size", 1))
    return processes if planned is None else f"{_size(planned)} planned; {processes}"


def _planned_bytes(result: dict[str, Any]) -> int | None:
    """The program's own memory, and what was planned on top of it before the run; None where it was not planned."""
    program, planned = result.get("program_memory_bytes"), result.get("planned_memory_bytes")
    return int(program + planned) if is_number(program) and is_number(planned) else None


def _processes(world_size: object) -> str:
    return "1 process" if world_size == 1 else f"the main one of {world_size} processes"


def _terminal(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(escape("" if value is None else str(value)) for value in row))
    return table
