"""The optimizer's step, if loss and gradients are finite; else the run ends there, or goes on without the step."""

import math
from dataclasses import replace

from trainer import distributed
from trainer.build import Parts
from trainer.checkpoint import Counters
from trainer.config import Optim, RunConfig
from trainer.distributed import NotFinite
from trainer.metrics import RunLog


def step_or_skip(
    config: RunConfig, parts: Parts, log: RunLog | None, done: Counters, *, loss: float, learning_rate: float
) -> Counters:
    """Step with the gradients that are there, of the step after `done`; return the counters with its norm.

    Where `loss`, summed over all ranks, or the norm is not finite, weights and optimizer stay bit for bit as they are.
    That is counted and logged as a skipped step; raises NotFinite, naming the step, its rows and the last finite norm,
    where steps are not to be skipped, or too many in a row were.
    """
    world, optimizer, max_norm = parts.world, parts.optimizer, config.optim.max_grad_norm
    if math.isfinite(loss):
        norm = distributed.finish_step(world, parts.model, optimizer, learning_rate=learning_rate, max_norm=max_norm)
        if math.isfinite(norm):
            return replace(done, last_norm=norm, skipped_in_a_row=0)
        problem = f"the norm of the gradients is {norm}"
    else:
        optimizer.zero_grad()
        problem = f"the loss is {loss}"
    where = f"step {done.step + 1}, rows {parts.feed.rows_at(done.step)} of the training data"
    # The scale of fp16's loss may have been too much, which is no fault.
    by_scale = world.scaler is not None and math.isfinite(loss)
    done = _skipped(config.optim, done, f"{where}: {problem}", by_scale=by_scale)
    if log is not None:
        log.skip(done.step + 1, problem, done.skipped_steps)
    return done


def _skipped(optim: Optim, done: Counters, problem: str, *, by_scale: bool) -> Counters:
    finite = "no step was taken yet" if done.last_norm is None else f"the last finite norm was {done.last_norm:.4g}"
    if optim.on_non_finite != "skip" and not by_scale:
        raise NotFinite(f"{problem} ({finite}); lower optim.lr, or mend those rows", step=done.step)
    in_a_row = done.skipped_in_a_row + 1
    if in_a_row > optim.max_skipped_steps:
        raise NotFinite(
            f"{problem} ({finite}): number {in_a_row} in a row, and optim.max_skipped_steps is "
            f"{optim.max_skipped_steps}; lower optim.lr, mend those rows, or raise it",
            step=done.step,
        )
    return replace(done, skipped_steps=done.skipped_steps + 1, skipped_in_a_row=in_a_row)
