"""What a run promises to be exact, compared on a config of the user's: each class is one function and one row.

Bit for bit (allowed 0), or 1e-5 relative where the same numbers are added up in another order.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trainer import model_dir
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.feed import Feed
from trainer.packing import IGNORED, Batch
from trainer.watch import Watched, contents, digests, documents, first_document, logits

ROUNDING = 1e-5  # relative: fp32 sums in another order
_WORLD_SIZES, _STEPS_READ = (2, 4, 8), 4
ADDS_LAYERS = ("linear_probe", "adapter", "lora")


@dataclass(frozen=True)
class Check:
    """One class: `deviation` is the largest seen, None where the class does not apply; `note` says why, or where."""

    name: str
    compared: str
    allowed: float
    deviation: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.deviation is None or self.deviation <= self.allowed


def same_run(name: str, compared: str, first: Watched, second: Watched, *, from_step: int) -> Check:
    """Compare two runs bit for bit: every number they logged, what they read from `from_step` on, the last weights."""
    deviation, note = _of_lines(first.lines, second.lines)
    for step in range(from_step, max(first.read) + 1):
        if first.read[step] != second.read.get(step):
            deviation, note = math.inf, f"step {step + 1} read other tokens, or in another order"
            break
    if different := [name for name, digest in first.after.items() if second.after.get(name) != digest]:
        deviation = deviation or math.inf
        note = note or f"{len(different)} of {len(first.after)} weights differ in the end, such as {different[0]}"
    return Check(name, compared, 0.0, deviation, note)


def same_order(name: str, compared: str, first: Watched, second: Watched, *, from_step: int) -> Check:
    """Compare what two runs read from `from_step` on."""
    steps = range(from_step, max(first.read) + 1)
    other = [step + 1 for step in steps if first.read[step] != second.read.get(step)]
    note = f"{len(other)} of {len(steps)} steps differ, the first is {other[0]}" if other else ""
    return Check(name, compared, 0.0, math.inf if other else 0.0, note)


def accumulation(runs: dict[str, Watched]) -> Check:
    """Compare the first step of runs that cut the same rows up differently, by how: loss, norm and gradients."""
    (whole_name, whole), *others = runs.items()
    worst, note = 0.0, ""
    for name, run in others:
        lines = [[line for line in each.lines if line["kind"] == "train"][:1] for each in (whole, run)]
        found = max(_of_lines(*lines)[0], gradient_deviation(whole.gradients, run.gradients))
        if not found <= worst:
            worst, note = found, f"{name} beside {whole_name}"
    return Check(
        "accumulation", f"loss and gradients of a step: {' = '.join(runs)}", ROUNDING, worst, note * (worst > ROUNDING)
    )


def packing(parts: Parts) -> Check:
    """Compare the loss and gradients of packed documents with those of each document given to the model by itself."""
    name, compared = "packed = unpacked", "loss and gradients of a batch, and of its documents one by one"
    objective, model = parts.objective, parts.world.accelerator.unwrap_model(parts.model)
    if not objective.packs:
        return Check(name, compared, ROUNDING, note=f"{objective.section.type} with this model packs nothing")
    model.eval()
    batch = {key: value.to(parts.world.accelerator.device) for key, value in next(parts.feed.micro_batches(0)).items()}
    together = objective.sums(model, batch)["loss"]
    together.backward()
    gradients = _take_gradients(model)
    alone = 0.0
    for ids, targets in documents(batch):
        if (targets != IGNORED).any():
            loss = F.cross_entropy(model(input_ids=ids[None]).logits[0].float(), targets, reduction="sum")
            loss.backward()
            alone += float(loss.detach())
    deviation = max(relative(float(together.detach()), alone), gradient_deviation(gradients, _take_gradients(model)))
    return Check(name, compared, ROUNDING, deviation)


def world_sizes(config: RunConfig, parts: Parts) -> Check:
    """Compare what one process reads in each step with what several read together; computed, none is started."""
    name, feed = "other world sizes", parts.feed
    possible = [size for size in _WORLD_SIZES if config.batch.rows % size == 0]
    if not possible:
        note = f"batch.rows {config.batch.rows} cannot be shared by several processes"
        return Check(name, "order, masks and mixture", 0.0, note=note)
    whole = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": None})})
    steps = range(min(config.run.steps, _STEPS_READ))
    worlds = {
        size: [
            Feed(whole, parts.objective, feed.reading, feed.held_out, pad_id=feed.pad_id, rank=rank, world_size=size)
            for rank in range(size)
        ]
        for size in possible
    }
    for step, size in itertools.product(steps, possible):  # a stream is read step by step
        together = [batch for rank in worlds[size] for batch in rank.micro_batches(step)]
        if not _same_contents(list(feed.micro_batches(step)), together):
            note = f"{size} processes read other tokens or targets in step {step + 1}"
            return Check(name, "order, masks and mixture", 0.0, math.inf, note)
    shown = ", ".join(map(str, possible))
    return Check(name, f"order, masks and mixture of {len(steps)} steps on 1 and {shown} processes", 0.0, 0.0)


def only_claimed(run: Watched) -> Check:
    """Compare every weight before and after a run: what does not learn is as it was, and something has learned."""
    frozen = run.before.keys() - run.learning
    changed = {name for name, digest in run.after.items() if run.before.get(name) != digest}
    compared = (
        f"{len(frozen)} frozen weights before and after; {len(changed & run.learning)} of {len(run.learning)} changed"
    )
    wrong = sorted(changed - run.learning)
    if wrong:
        return Check("only claimed weights", compared, 0.0, math.inf, f"{wrong[0]} changed, though it is frozen")
    if not changed:
        return Check("only claimed weights", compared, 0.0, math.inf, "nothing changed at all")
    return Check("only claimed weights", compared, 0.0, 0.0)


def step_zero(kind: str, base: Parts, parts: Parts) -> Check:
    """Compare what the model answers before any step with what it answers without the layers of strategy `kind`."""
    outputs = [logits(each.world.accelerator.unwrap_model(each.model), first_document(each)) for each in (base, parts)]
    compared = f"logits with the layers of {kind} before any step, and without them"
    return Check("step 0 = base", compared, 0.0, largest_difference(*outputs))


def saved(model: Path, run: Watched, *, merges: bool) -> Check:
    """Compare a model directory, loaded anew, with the model after the run's last step: its weights bit for bit, or
    where layers were merged into it, its logits within rounding."""
    assert run.probe is not None, "the run was watched"
    assert run.outputs is not None, "the run was watched to its last step"
    loaded = model_dir.load(model)
    deviation = largest_difference(run.outputs, logits(loaded, run.probe))
    if merges:
        compared = "logits of the merged model directory, loaded anew, and of the model after the last step"
        return Check("merged = unmerged", compared, ROUNDING, deviation)
    found = digests(loaded)
    compared = f"{len(found)} weights of the model directory, loaded anew, and after the last step; logits within 1e-5"
    # The same weights at other addresses may round otherwise, so of the logits no more is asked.
    if different := sorted(name for name in run.after.keys() | found.keys() if run.after.get(name) != found.get(name)):
        note = f"{len(different)} weights differ, such as {different[0]}"
        return Check("saved = trained", compared, 0.0, deviation or math.inf, note)
    return Check("saved = trained", compared, 0.0, 0.0 if deviation <= ROUNDING else deviation)


def gradient_deviation(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the length of the difference of two gradients, all weights' together, relative to that of the first.

    That is what a step sees of it. Element by element the rounding of deep models is above `ROUNDING`: with the 30
    layers of SmolLM2 1.5e-5 of the largest of a weight, where the whole is off by 2e-6, a tenth of what either is off
    from fp64. A weight whose gradient is all wrong shows where it has a hundred-thousandth of the length.
    """
    if first.keys() != second.keys() or not first:
        return math.inf
    length = math.hypot(*(float(gradient.double().norm()) for gradient in first.values()))
    difference = math.hypot(*(float((first[name].double() - second[name].double()).norm()) for name in first))
    deviation = 0.0 if difference == 0 else difference / max(length, sys.float_info.min)
    return deviation if math.isfinite(deviation) else math.inf  # of NaN and a number `max` may take the number


def largest_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference of two arrays of logits, relative to the largest of them."""
    if expected.shape != found.shape:
        return math.inf
    return float((expected - found).abs().max() / expected.abs().max())


def relative(expected: float, found: float) -> float:
    return 0.0 if expected == found else abs(expected - found) / max(abs(expected), abs(found))


def _take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients that there are, and clear them."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _of_lines(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative difference of the numbers in two runs' lines, and where it is."""
    if [(line["kind"], line["step"]) for line in first] != [(line["kind"], line["step"]) for line in second]:
        return math.inf, "one logged other steps than the other"
    worst, where = 0.0, ""
    for a, b in zip(first, second, strict=True):
        for name, value in a.items():
            if isinstance(value, int | float) and not (found := relative(value, b.get(name, math.inf))) <= worst:
                worst, where = found, f"{name} of step {a['step']}: {value} and {b.get(name)}"
    return worst, where


def _same_contents(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two lists of batches hold the same tokens and targets, however they are cut."""
    both = [[torch.cat(parts) for parts in zip(*map(contents, batches), strict=True)] for batches in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*both, strict=True))
