"""Held-out metrics: sums over batches and ranks, divided once."""

import torch

from trainer.distributed import World
from trainer.objectives import Objective
from trainer.packing import Batch


def evaluate(world: World, model: torch.nn.Module, objective: Objective, batches: list[Batch]) -> dict[str, float]:
    """Return the objective's metrics over every rank's batches (ranks may hold unequal numbers, or none).

    Runs the bare model: the wrapper of a mode may expect every rank to run the same number of batches.
    """
    bare = world.accelerator.unwrap_model(model)
    bare.eval()
    count, totals = 0, dict.fromkeys(objective.sum_names, 0.0)
    with torch.no_grad(), world.accelerator.autocast():
        for batch in batches:
            sums = objective.sums(bare, to_device(world, batch))
            count += objective.count(batch)
            totals = {name: total + float(sums[name]) for name, total in totals.items()}
    bare.train()
    all_count, *all_totals = world.sum([count, *totals.values()])
    return objective.summarize(dict(zip(totals, all_totals, strict=True)), all_count)


def to_device(world: World, batch: Batch) -> Batch:
    """Return the batch on this rank's device."""
    return {name: tensor.to(world.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
