"""A window of steps under torch.profiler, as a trace for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.guards import writing


@contextmanager
def window(config: RunConfig, *, is_main: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call before each 0-based step: the steps of the config's window are recorded, on one rank.

    The trace lies in `profile/` of the run folder, under the steps that are in it: fewer where the run ends before.
    """
    first = config.log.profile_from
    if first is None or not is_main:
        yield lambda step: None
        return
    last = first + config.log.profile_steps - 1
    running: list[torch.profiler.profile] = []

    def before(step: int) -> None:
        if step + 1 == first:
            running.append(torch.profiler.profile(profile_memory=True))
            running[0].start()
        if step == last:
            _end(running, config.run.folder, f"steps-{first}-{last}.json")

    try:
        yield before
    finally:
        _end(running, config.run.folder, f"steps-{first}-{min(last, config.run.steps)}.json")


def _end(running: list[torch.profiler.profile], folder: Path, name: str) -> None:
    if not running:
        return
    profiler = running.pop()
    profiler.stop()
    path = folder / "profile" / name
    with writing(f"{path}: the trace", folder):
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
