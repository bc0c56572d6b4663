"""The runs that `trivet verify-training` compares: a few steps of the user's config by the real loop, in a folder of
their own; and one that is killed."""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch import config_file
from trainer.build import Parts, build
from trainer.config import Checkpoint, Evaluation, Full, Log, Partial, Precision, RunConfig
from trainer.config.strategy import Strategy
from trainer.guards import RunFailed
from trainer.watch import Watched, watch


class Runs:
    """Each is made when it is first asked for. The killed one is saved after `saved_after` steps and dies a step later.

    `exact` is the config in fp32, for what is compared within rounding.
    """

    def __init__(self, config: RunConfig, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.saved_after = max(1, steps // 3)
        self.killed_after = self.saved_after + 1
        self.config = _shortened(config, folder, steps, self.saved_after)
        self.exact = self.config.model_copy(update={"precision": Precision()})

    @functools.cached_property
    def whole(self) -> Watched:
        return self.run("whole")

    @functools.cached_property
    def killed(self) -> RunConfig:
        """The config of a run that was killed with SIGKILL; its folder is as the kill left it."""
        config = changed(self.config, "run", name="killed")
        kill_after(self.killed_after, config, self.folder)
        return config

    @functools.cached_property
    def parts(self) -> Parts:
        with _quiet():
            return build(self.exact)

    @functools.cached_property
    def base(self) -> Parts:
        """The same, with a strategy that adds nothing to the model."""
        with _quiet():
            return build(self.exact.model_copy(update={"strategy": Full(type="full")}))

    def run(self, name: str, config: RunConfig | None = None, **how: bool) -> Watched:
        """Train in a folder of this name, from where it stands; `how` is for `watch`."""
        config = changed(config or self.config, "run", name=name)
        with _quiet():
            return watch(config, config_file.to_yaml(config), **how)

    def resumed(self, name: str, **batch: Any) -> Watched:
        """Go on with a copy of the killed run, with other settings of the batch."""
        shutil.copytree(self.killed.run.folder, self.folder / name)
        return self.run(name, changed(self.config, "batch", **batch))


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """Return the config with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def kill_after(step: int, config: RunConfig, folder: Path) -> None:
    """Train in a process of its own that is killed after `step`. Raises RunFailed where it ended in another way."""
    path, output = folder / "killed.yaml", folder / "killed.txt"
    path.write_text(config_file.to_yaml(config), encoding="utf-8")
    process = multiprocessing.get_context("forkserver").Process(
        target=_train_and_die, args=(str(path), step, str(output))
    )
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        said = output.read_text(encoding="utf-8").strip().splitlines()[-1:] if output.exists() else []
        raise RunFailed(f"the run that was to be killed ended with {process.exitcode}: {' '.join(said)}", step=step)


def _train_and_die(config_yaml: str, step: int, output: str) -> None:
    from launch.train import main
    from trainer.metrics import RunLog

    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    def and_die(log: Callable[..., None]) -> Callable[..., None]:
        def log_and_die(log_of_run: RunLog, at: int, *args: Any, **fields: Any) -> None:
            log(log_of_run, at, *args, **fields)
            if at == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return log_and_die

    RunLog.train, RunLog.skip = and_die(RunLog.train), and_die(RunLog.skip)  # type: ignore[method-assign]
    sys.exit(main([config_yaml]))


def _shortened(config: RunConfig, folder: Path, steps: int, saved_after: int) -> RunConfig:
    """Return the config as a run of a few steps in `folder` that logs all of them and tells nobody."""
    rows = min(config.evaluation.max_rows, 2 * config.batch.rows)
    update = {
        "run": config.run.model_copy(update={"dir": folder, "steps": steps}),
        "optim": config.optim.model_copy(update={"warmup_steps": min(config.optim.warmup_steps, 1)}),
        "evaluation": Evaluation(max_rows=rows),
        "checkpoint": Checkpoint(every=saved_after),
        "log": Log(tensorboard=False),
        "strategy": _sooner(config.strategy, steps),
    }
    return config.model_copy(update=update)


def _sooner(strategy: Strategy, steps: int) -> Strategy:
    """The strategy, with its stages spread over the few steps; those that find no step of their own are left out."""
    if not isinstance(strategy, Partial) or not strategy.stages:
        return strategy
    stages = strategy.stages[: steps - 1]
    places = [1 + i * (steps - 1) // len(stages) for i in range(len(stages))]
    moved = [stage.model_copy(update={"step": step}) for stage, step in zip(stages, places, strict=True)]
    return strategy.model_copy(update={"stages": moved})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what a run says about itself; an error still shows."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
