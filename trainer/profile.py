"""A window of steps under torch.profiler, as a trace for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.guards import writing
from trainer.metrics import RunLog


@contextmanager
def window(config: RunConfig, log: RunLog | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to call before each 0-based step: the config's window is recorded, on the rank with a log.

    The trace lies in `profile/` of the run folder, under the steps that are in it: fewer where the run ends before. The
    log says where.
    """
    first = config.log.profile_from
    if first is None or log is None:
        yield lambda step: None
        return
    last = first + config.log.profile_steps - 1
    running: list[torch.profiler.profile] = []

    def before(step: int) -> None:
        if step + 1 == first:
            running.append(torch.profiler.profile(profile_memory=True))
            running[0].start()
        if step == last:
            _end(running, log, config.run.folder, f"steps-{first}-{last}.json")

    try:
        yield before
    finally:
        _end(running, log, config.run.folder, f"steps-{first}-{min(last, config.run.steps)}.json")


def _end(running: list[torch.profiler.profile], log: RunLog, folder: Path, name: str) -> None:
    if not running:
        return
    profiler = running.pop()
    profiler.stop()
    path = folder / "profile" / name
    with writing(f"{path}: the trace", folder):
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
    log.say(f"profile: {path}, for chrome://tracing or https://ui.perfetto.dev")
