"""Held-out metrics: sums over batches and ranks, divided once."""

from collections.abc import Sequence
from typing import Any

import torch

from trainer.distributed import World
from trainer.feed import Feed
from trainer.objectives import Objective, Totals
from trainer.packing import Batch, Row


class Metrics(dict[str, float]):
    """Numbers by name, and `details`: what the same sums say beside single numbers."""

    details: dict[str, Any]


def evaluate(
    world: World, model: torch.nn.Module, objective: Objective, feed: Feed, rows: Sequence[Row] | None = None
) -> Metrics:
    """Return the objective's metrics over every rank's batches of `rows`, by default those held out.

    Only sums are kept. Runs the bare model: the wrapper of a mode may expect a backward pass after each forward pass.
    Every rank runs as many forward passes as the others, since in some modes all of them gather weights for each.
    """
    bare = world.accelerator.unwrap_model(model)
    bare.eval()
    totals: Totals = {}
    with torch.no_grad(), world.autocast():
        for batch, counts in feed.evaluation(rows):
            world.at("evaluation")
            sums = objective.sums(bare, to_device(world, batch))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.double().cpu().numpy() * counts
    bare.train()
    totals = world.sum_arrays(totals)
    metrics = Metrics(objective.summarize(totals))
    metrics.details = objective.details(totals)
    return metrics


def to_device(world: World, batch: Batch) -> Batch:
    """Return the batch on this rank's device."""
    return {name: tensor.to(world.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
