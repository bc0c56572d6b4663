"""`trivet verify-training`: the exactness that a run promises, seen on the user's own config and machine.

A few steps in a temporary folder, by the real loop; the run's own folder is never touched.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from launch.base_model import ensure_base_model
from launch.verify_runs import Runs, changed
from trainer import exactness
from trainer.config import RunConfig
from trainer.exactness import Check

_STYLES = {"ok": "green", "FAIL": "bold red", "n/a": "dim"}


def verify_training(config: RunConfig, *, steps: int, json_output: bool) -> int:
    """Look at every class and print the table, or JSON; return 0 if all hold, 1 if one does not.

    Raises BadInput where the run would not start.
    """
    if code := ensure_base_model(config):
        return code
    checks = []
    with tempfile.TemporaryDirectory(prefix="trivet-verify-") as folder:
        runs = Runs(config, Path(folder), steps)
        for number, look in enumerate(CLASSES, start=1):
            checks.append(look(runs))
            print(f"{number}/{len(CLASSES)} {checks[-1].name}: {_result(checks[-1])}", file=sys.stderr, flush=True)
    holds = all(check.ok for check in checks)
    if json_output:
        print(json.dumps({"ok": holds, "checks": [_as_json(check) for check in checks]}, indent=2))
    else:
        _print_table(checks)
    return 0 if holds else 1


def same_run_twice(runs: Runs) -> Check:
    compared = f"{runs.steps} steps: numbers, what was read, last weights"
    return exactness.same_run("same run twice", compared, runs.whole, runs.run("again"), from_step=0)


def resume(runs: Runs) -> Check:
    return exactness.same_run(
        "resume = uninterrupted", f"{_how(runs)}: numbers, what was read, last weights",
        runs.whole, runs.resumed("resumed"), from_step=runs.saved_after,
    )  # fmt: skip


def resume_with_another_micro_batch(runs: Runs) -> Check:
    name, rows = "other micro-batch", runs.config.batch.rows
    own = runs.config.batch.micro_rows or rows
    other = next((micro for micro in range(rows, 0, -1) if rows % micro == 0 and micro != own), None)
    if other is None:
        return Check(name, "what was read", 0.0, note="batch.rows is 1, which cannot be cut")
    compared = f"{_how(runs)} with batch.micro_rows {other}, not {own}: what was read"
    cut = runs.resumed("cut", micro_rows=other)
    return exactness.same_order(name, compared, runs.whole, cut, from_step=runs.saved_after)


def accumulation(runs: Runs) -> Check:
    rows = min(runs.config.batch.rows, 4)
    if rows == 1:
        return Check("accumulation", "loss and gradients of a step", exactness.ROUNDING, note="batch.rows is 1")
    step = changed(runs.exact, "run", steps=1)
    cuts = {f"{rows // micro}x{micro}": micro for micro in (rows, 2, 1) if rows % micro == 0}
    return exactness.accumulation({
        how: runs.run(
            f"accumulate-{how}", changed(step, "batch", rows=rows, micro_rows=micro),
            dropout=False, keep_gradients=True,
        )
        for how, micro in cuts.items()
    })  # fmt: skip


def packing(runs: Runs) -> Check:
    return exactness.packing(runs.parts)


def step_zero(runs: Runs) -> Check:
    kind = runs.config.strategy.type
    if kind not in exactness.ADDS_LAYERS:
        return Check("step 0 = base", "logits before any step", 0.0, note=f"strategy.type {kind} adds no layers")
    return exactness.step_zero(kind, runs.base, runs.parts)


def saved(runs: Runs) -> Check:
    return exactness.saved(runs.folder / "whole" / "model", runs.whole, merges=runs.config.strategy.type == "lora")


def only_claimed(runs: Runs) -> Check:
    return exactness.only_claimed(runs.whole)


def world_sizes(runs: Runs) -> Check:
    return exactness.world_sizes(runs.exact, runs.parts)


CLASSES: tuple[Callable[[Runs], Check], ...] = (
    same_run_twice, resume, resume_with_another_micro_batch, accumulation, packing, step_zero, saved, only_claimed,
    world_sizes,
)  # fmt: skip


def _how(runs: Runs) -> str:
    return f"killed (SIGKILL) after step {runs.killed_after} of {runs.steps}, gone on from {runs.saved_after}"


def _print_table(checks: list[Check]) -> None:
    console, width = Console(highlight=False, soft_wrap=True), max(len(check.name) for check in checks)
    console.print(Text(f"{'class':{width}}  deviation  allowed  result  what was compared", "bold"))
    for check in checks:
        row = f"{check.name:{width}}  {_number(check.deviation):>9}  {_number(check.allowed):>7}  "
        note = f" ({check.note})" if check.note else ""
        console.print(
            Text(row) + Text(f"{_result(check):6}", _STYLES[_result(check)]) + Text(f"  {check.compared}{note}")
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def _result(check: Check) -> str:
    return "n/a" if check.deviation is None else "ok" if check.ok else "FAIL"


def _as_json(check: Check) -> dict[str, Any]:
    """JSON has no infinity: null also stands for what is not equal, and cannot be told by a number."""
    number = check.deviation if check.deviation is not None and math.isfinite(check.deviation) else None
    return {**asdict(check), "deviation": number, "result": _result(check)}
