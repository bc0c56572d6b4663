"""Only named weights learn, some of them from a later step on."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from serving.directory import BadInput
from trainer.config import Partial
from trainer.config.strategy import Strategy
from trainer.strategies.heads import freeze, train_head
from trainer.strategies.names import near

_JOINS_AT = "trivet_joins_at"  # on a weight: how many steps are finished when it starts to learn


def apply_partial(model: torch.nn.Module, config: Partial) -> torch.nn.Module:
    """Let the task's head and the named weights learn, those of later stages too until `unfreeze` is called.

    So that the optimizer is built over all of them. Raises BadInput for a name of nothing, for a stage that adds
    nothing, and where nothing learns from the first step on.
    """
    freeze(model)
    train_head(model)
    _join(named(model, config.train, "strategy.train"), 0)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(
            "strategy.train: is empty, and this model has no new head: nothing learns from the first step on"
        )
    for number, stage in enumerate(config.stages):
        setting = f"strategy.stages.{number}.train"
        if not _join(named(model, stage.train, setting), stage.step):
            raise BadInput(f"{setting}: {stage.train} found; all of that learns already by then: leave the stage out")
    return model


def tell_tied(model: torch.nn.Module, config: Strategy) -> list[str]:
    """Say, a line each, which weights learn though no pattern names them: they are one with weights that are named."""
    if not isinstance(config, Partial):
        return []
    patterns = [*config.train, *(pattern for stage in config.stages for pattern in stage.train)]
    every = dict(model.named_parameters(remove_duplicate=False))
    asked = {name for name in every if any(_fits(name, pattern) for pattern in patterns)}
    tied = [(name, other) for name in sorted(asked) for other in every if every[other] is every[name]]
    return [
        f"strategy.train: {other} learns too: this model's {name} is the same weight (they are tied)"
        for name, other in tied
        if other not in asked
    ]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def unfreeze(model: torch.nn.Module, step: int) -> int:
    """Let just those weights learn that do at 0-based `step`; return how many start at it.

    Without stages nothing changes. The optimizer sees no gradient of the others, so it keeps no state of them.
    """
    started = 0
    for parameter in model.parameters():
        joins_at = getattr(parameter, _JOINS_AT, None)
        if joins_at is not None:
            parameter.requires_grad_(joins_at <= step)
            started += parameter.numel() * (joins_at == step > 0)
    if started:
        model.train(model.training)  # statistics that were frozen with their weights: see `freeze`
    return started


def later(model: torch.nn.Module) -> dict[int, int]:
    """Return the steps at which weights start to learn later, and how many weights do at each."""
    steps = [(getattr(parameter, _JOINS_AT, 0), parameter.numel()) for parameter in model.parameters()]
    return {at: sum(count for step, count in steps if step == at) for at, _ in steps if at}


def check_world(config: Strategy, mode: str) -> None:
    """Raise BadInput where weights would join later in a mode that fixes at the start what learns."""
    if isinstance(config, Partial) and config.stages and mode != "single":
        raise BadInput(
            f"strategy.stages: {len(config.stages)} found in mode {mode}; stages need a single process for now"
        )


def named(model: torch.nn.Module, patterns: Iterable[str], setting: str) -> dict[str, torch.nn.Parameter]:
    """Return the weights whose name, or the name of a module around them, fits a pattern; * stands for anything.

    Raises BadInput naming a pattern that fits nothing, and names that are like it.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, torch.nn.Parameter] = {}
    for pattern in patterns:
        fits = {name: p for name, p in every.items() if _fits(name, pattern)}
        if not fits:
            modules = [name for name, _ in model.named_modules() if name]
            raise BadInput(f"{setting}: {pattern!r} fits no weight; near to it: {near(pattern, [*modules, *every])}")
        found |= fits
    return found


def _join(parameters: dict[str, torch.nn.Parameter], step: int) -> bool:
    """Whether any of them does not learn yet; those do from `step` on."""
    new = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in new:
        parameter.requires_grad_(True)
        if step:
            setattr(parameter, _JOINS_AT, step)
    return bool(new)
