"""Held-out metrics: sums over batches and ranks, divided once."""

import torch

from trainer.distributed import World
from trainer.feed import Feed
from trainer.objectives import Objective, Totals
from trainer.packing import Batch


def evaluate(world: World, model: torch.nn.Module, objective: Objective, feed: Feed) -> dict[str, float]:
    """Return the objective's metrics over every rank's held-out batches; only their sums are kept.

    Runs the bare model: the wrapper of a mode may expect a backward pass after each forward pass.
    """
    bare = world.accelerator.unwrap_model(model)
    bare.eval()
    totals: Totals = {}
    with torch.no_grad(), world.accelerator.autocast():
        for batch, counts in feed.evaluation():
            sums = objective.sums(bare, to_device(world, batch))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.double().cpu().numpy() * counts
    bare.train()
    return objective.summarize(world.sum_arrays(totals))


def to_device(world: World, batch: Batch) -> Batch:
    """Return the batch on this rank's device."""
    return {name: tensor.to(world.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
