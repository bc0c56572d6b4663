"""What a run says while it runs: metrics.jsonl, TensorBoard, trackers, and a progress bar or lines on the terminal."""

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serving import directory
from trainer import resident
from trainer.guards import writing
from trainer.run_folder import read_metrics
from trainer.tracking import Tracker

_STEPS_OF_A_PACE = 3


class RunLog:
    """Writes one JSON object a line; on a resume, what will be written again is dropped first.

    A context manager: the terminal and the files are given back however the run ends.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int,
        total_steps: int,
        every: int,
        tensorboard: bool,
        trackers: Sequence[Tracker] = (),
        is_over: bool = False,
        flops_per_token: float | None = None,
    ) -> None:
        """`is_over`: the run goes on at its early end, so its last evaluation comes again there."""
        self.path = folder / "metrics.jsonl"
        self.every, self.total_steps, self.flops_per_token = every, total_steps, flops_per_token
        kept = _kept(self.path, start_step, start_step if is_over else total_steps)
        directory.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._writer = _tensorboard(folder / "tensorboard", start_step) if tensorboard else None
        self._trackers = list(trackers)
        self._terminal = Terminal(folder.name, start_step, total_steps)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for tracker in list(self._trackers):
            self._give(tracker, "close", failed=error is not None)
        self._terminal.close()
        with contextlib.suppress(OSError):  # a line that could not be written is tried again here
            self._file.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def train(self, step: int, **fields: Any) -> None:
        """Log a training step (1-based: steps done)."""
        if self.flops_per_token is not None:
            fields["flops_per_s"] = self.flops_per_token * fields["tokens_per_s"]
        if step % self.every == 0 or step in (1, self.total_steps):
            self._write("train", step, fields)
        self._terminal.step(step, fields)

    def skip(self, step: int, problem: str, skipped_steps: int) -> None:
        """Log a step that was not taken. Its numbers are none, so it has no training line."""
        self._write("skip", step, {"skipped_steps": skipped_steps})
        self._terminal.say(f"step {step} was skipped: {problem} ({skipped_steps} so far)")

    def evaluation(self, step: int, metrics: dict[str, float], elapsed_s: float) -> None:
        """Log the held-out metrics after `step` steps."""
        self._write("eval", step, {**metrics, "elapsed_s": elapsed_s})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._terminal.say(f"step {step}: held-out {shown}")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        self._terminal.say(text)

    def _write(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        with writing(f"{self.path}: step {step}", self.path.parent):
            self._file.write(json.dumps({"kind": kind, "step": step, **fields}, allow_nan=False) + "\n")
            self._file.flush()
            if self._writer is not None:
                for name, value in fields.items():
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        for tracker in list(self._trackers):
            self._give(tracker, "log", kind, step, fields)

    def _give(self, tracker: Tracker, call: str, *arguments: Any, **named: Any) -> None:
        try:
            getattr(tracker, call)(*arguments, **named)
        except Exception as error:  # each client has its own kinds, and none is worth a run
            self._trackers.remove(tracker)
            self.say(
                f"{tracker.name}: {type(error).__name__}: it gets no more of this run; metrics.jsonl has all of it"
            )


class Terminal:
    """A progress bar where stderr is a terminal, else about ten lines in all."""

    def __init__(self, name: str, start_step: int, total_steps: int) -> None:
        self.console = Console(stderr=True)
        self.total_steps = total_steps
        self._first: tuple[int, float] | None = None  # the first step of this process, and when it ended
        self._progress = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step, shown="")
        self._progress.start()

    def step(self, step: int, fields: dict[str, Any]) -> None:
        self._first = self._first or (step, time.perf_counter())
        shown = f"loss {fields['loss']:.3f}  {fields['tokens_per_s']:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, shown=shown)
        if not self.console.is_terminal and (step % max(1, self.total_steps // 10) == 0 or step == 1):
            self.say(f"step {step}/{self.total_steps}: {shown}{self._left(step)}")

    def _left(self, step: int) -> str:
        """How long the steps to come will take, at the pace of those of this process after its first, which warms up.

        Nothing before a few of them were taken.
        """
        first, ended = self._first or (step, 0.0)
        if step - first < _STEPS_OF_A_PACE:
            return ""
        seconds = (time.perf_counter() - ended) / (step - first) * (self.total_steps - step)
        return f"  {datetime.timedelta(seconds=round(seconds))} left" if seconds >= 1 else ""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        self._progress.stop()

    @staticmethod
    def say_once(text: str) -> None:
        """Print a line outside any progress bar."""
        console = Console(stderr=True)
        console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def peak_memory_bytes() -> int:
    """Return the most memory this rank has used so far: on the GPU where there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident.peak_bytes()


def _kept(path: Path, start_step: int, total_steps: int) -> list[dict[str, Any]]:
    """The lines up to the step that a run goes on from, but not an evaluation that comes again there."""
    evaluates_at = (0, total_steps)
    return [
        entry
        for entry in read_metrics(path)
        if entry["step"] < start_step
        or (entry["step"] == start_step and not (entry["kind"] == "eval" and start_step in evaluates_at))
    ]


def _tensorboard(folder: Path, start_step: int):
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _but_not_of_a_full_disk(threading.excepthook)
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)


def _but_not_of_a_full_disk(report: Callable[[threading.ExceptHookArgs], object]) -> Callable[..., None]:
    """Keep quiet where TensorBoard's thread cannot write: the run ends on its own next line, and says it once."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard") and isinstance(args.exc_value, OSError)):
            report(args)

    return hook
