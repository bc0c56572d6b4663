"""What a run left beside its metrics: held-out rows that are also trained on, and what the model said of prompts."""

import json
from typing import Any

from launch import report_page
from launch.report_data import Run, is_number
from trainer.run_folder import parse_metric


def leaks(run: Run) -> list[str]:
    """Return a line for each pair of parts of the data that share rows; none where the run has found or sought none."""
    try:
        found = json.loads((run.folder / "leaks.json").read_text(encoding="utf-8"))
        return [line for pair in found["pairs"] if (line := _shared(pair))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def samples(run: Run) -> list[str]:
    """Return a table of what the model said last, as parts of a page; nothing where the run has no samples."""
    try:
        lines = (run.folder / "samples.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = [entry for entry in map(parse_metric, lines) if entry and {"prompt", "text"} <= entry.keys()]
    if not found:
        return []
    step = found[-1]["step"]
    rows = [[entry["prompt"], entry["text"]] for entry in found if entry["step"] == step]
    return [
        report_page.heading(f"{run.name}: what the model says after {step:,} steps"),
        report_page.table(["held-out prompt", "the model goes on"], rows),
    ]


def _shared(pair: dict[str, Any]) -> str:
    exact, near = pair["exact"], pair["near"]
    if not (is_number(exact) and is_number(near) and exact + near):
        return ""
    return (
        f"leaks: {exact + near:,} of {pair['rows']:,} {pair['of']} rows are in {pair['in']} too, {exact:,} word for "
        f"word, {near:,} nearly: their score says less about new rows (leaks.json names them)"
    )
