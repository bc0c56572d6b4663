"""A run of the real loop that is watched: what it read, its first gradients, and which weights it changed.

The loop has no callbacks: for the time of the run, what builds its parts also sets the watch.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer import loop
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.guards import RunFailed
from trainer.packing import Batch
from trainer.run_folder import read_metrics

# What a run says of the clock and the machine, not of what it computed; times and rates end in _s.
_OF_THE_MACHINE = ("memory_bytes", "mfu")


@dataclass
class Watched:
    """One run, after it ended. `read` has a digest of the real tokens and targets of each 0-based step it took."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    read: dict[int, str] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # of the first step, where they were asked for
    before: dict[str, str] = field(default_factory=dict)  # a digest of each weight
    after: dict[str, str] = field(default_factory=dict)
    learning: set[str] = field(default_factory=set)
    probe: torch.Tensor | None = None  # the token ids of the first document that the run read
    outputs: torch.Tensor | None = None  # the model's logits for them after the last step, before anything is merged


def watch(config: RunConfig, config_yaml: str, *, dropout: bool = True, keep_gradients: bool = False) -> Watched:
    """Train the run of `config` from where it stands, and return what was seen.

    Without `dropout` the model stays in evaluation mode. Raises RunFailed where the run does not end as done.
    """
    seen = Watched()

    def set_the_watch(parts: Parts) -> None:
        model = parts.world.accelerator.unwrap_model(parts.model)
        if not dropout:
            parts.model.eval()
            parts.model.train = model.train = lambda mode=True: model
        _watch_weights(parts, model, seen, keep_gradients)
        _watch_feed(parts, seen)

    def look_at_the_end(config: RunConfig, parts: Parts, *_: Any) -> None:
        # Not after the optimizer's last step, which may have been skipped.
        model = parts.world.accelerator.unwrap_model(parts.model)
        assert seen.probe is not None, "set with the watch"
        seen.after, seen.outputs = digests(model), logits(model, seen.probe)

    with _also("build", after=set_the_watch), _also("finish", before=look_at_the_end):
        code = loop.train(config, config_yaml)
    if code:
        raise RunFailed(f"the run ended early, with exit code {code}", step=len(seen.read))
    seen.lines = [
        {name: value for name, value in line.items() if not (name.endswith("_s") or name in _OF_THE_MACHINE)}
        for line in read_metrics(config.run.folder / "metrics.jsonl")
    ]
    return seen


def contents(batch: Batch) -> Iterator[torch.Tensor]:
    """Yield the real tokens of a batch and its targets, without padding: the same however rows are cut into batches."""
    ids, targets, mask = batch["input_ids"], batch["targets"], batch["attention_mask"]
    real = mask.bool() if mask.dim() == 2 else torch.ones_like(ids, dtype=torch.bool)  # end to end, none is padding
    yield ids[real]
    yield targets[real] if targets.shape == ids.shape else targets.flatten()


def documents(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the token ids of each document of a batch, without padding, and its targets."""
    ids, targets, mask = batch["input_ids"], batch["targets"], batch["attention_mask"]
    if mask.dim() == 2:
        for row, row_targets, length in zip(ids, targets, mask.sum(1).tolist(), strict=True):
            yield row[:length], row_targets[:length] if targets.shape == ids.shape else row_targets
    else:
        ends = mask.flatten().tolist()
        yield from ((ids[0, start:stop], targets[0, start:stop]) for start, stop in itertools.pairwise(ends))


def first_document(parts: Parts) -> torch.Tensor:
    """Return the token ids of the first document that the run reads."""
    return next(documents(next(parts.feed.micro_batches(0))))[0]


@contextmanager
def _also(
    name: str, *, before: Callable[..., None] = lambda *_: None, after: Callable[..., None] = lambda *_: None
) -> Iterator[None]:
    """While open, the loop's function `name` does `before` with what it is given, and `after` with what it gives."""
    real = getattr(loop, name)

    def both(*args: Any) -> Any:
        before(*args)
        found = real(*args)
        after(found)
        return found

    setattr(loop, name, both)
    try:
        yield
    finally:
        setattr(loop, name, real)


def _watch_feed(parts: Parts, seen: Watched) -> None:
    micro_batches = parts.feed.micro_batches

    def watched(step: int) -> Iterator[Batch]:
        digests = [hashlib.sha256(), hashlib.sha256()]
        for batch in micro_batches(step):
            for digest, tensor in zip(digests, contents(batch), strict=True):
                digest.update(tensor.contiguous().numpy().tobytes())
            seen.read[step] = "".join(digest.hexdigest() for digest in digests)
            yield batch

    parts.feed.micro_batches = watched  # type: ignore[method-assign]


def _watch_weights(parts: Parts, model: torch.nn.Module, seen: Watched, keep_gradients: bool) -> None:
    optimizer = parts.optimizer.optimizer
    seen.probe = first_document(parts)
    seen.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen.before = digests(model)

    def before_step(*_: Any) -> None:
        if keep_gradients and not seen.gradients:
            seen.gradients = {
                name: parameter.grad.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }

    optimizer.register_step_pre_hook(before_step)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return a digest of each weight."""
    return {
        name: hashlib.sha256(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return what the model answers to one document by itself, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        answer = model(input_ids=ids[None].to(next(model.parameters()).device)).logits.cpu()
    model.train(was_training)
    return answer
