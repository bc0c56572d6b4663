"""What this rank holds of the weights and the optimizer's state, as flat views that a checkpoint reads and writes.

A weight's state is what its optimizer keeps for it: tensors of its shape lie beside it, others (Adafactor's rows and
columns) under a name of their own, and a count of the steps that it has taken: weights may join a run late.

The one file that touches private names of DeepSpeed (0.19): `_hp_mapping`, `_hp_optimizer_states_linked`,
`_lazy_init_hp_params_optimizer_state`, `single_partition_of_fp32_groups`.
"""

import math
from dataclasses import dataclass

import torch

from trainer.distributed import World
from trainer.optim import State, initial_state

FACTOR = "factor"


@dataclass(frozen=True)
class Held:
    """This rank's part [start, stop) of one flattened tensor: views, by role.

    Roles: weight and what the optimizer keeps in its shape (exp_avg, momentum_buffer ...), or buffer, or factor.
    """

    name: str
    shape: list[int]
    start: int
    stop: int
    views: dict[str, torch.Tensor]
    replicated: bool  # every rank holds the same whole tensor


Layout = dict[str, tuple[list[int], list[str]]]


def layout(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Layout:
    """Return the shape and roles of every tensor that the ranks hold together once each weight has taken a step."""
    inner, found = _inner(world, optimizer), Layout()
    for name, parameter in _learning(world, model, optimizer).items():
        state = initial_state(inner, torch.empty_like(parameter, device="meta"))
        beside, apart = _by_shape(parameter, state)
        found[name] = list(parameter.shape), sorted(["weight", *beside])
        found |= {f"{name}.{key}": (list(factor.shape), [FACTOR]) for key, factor in apart.items()}
    buffers = _buffers(world, model)
    return found | {name: (list(buffer.shape), ["buffer"]) for name, buffer in buffers.items()}


def held_by_rank(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Held]:
    """Return the learning weights with what the optimizer keeps for them, and the persistent buffers, of this rank.

    A weight that took no step yet comes alone. Frozen weights are not listed: they come from the base model.
    """
    learning = _learning(world, model, optimizer)
    weights = _zero_weights if world.mode == "deepspeed" else _plain_weights
    return weights(learning, optimizer) + [
        Held(name, list(buffer.shape), 0, buffer.numel(), {"buffer": buffer.view(-1)}, replicated=True)
        for name, buffer in _buffers(world, model).items()
    ]


def steps_taken(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return how many steps each weight has taken, where the optimizer keeps anything for it (0 where it does not
    count them)."""
    learning, inner = _learning(world, model, optimizer), _inner(world, optimizer)
    if world.mode == "deepspeed":
        common = max((int(state["step"]) for state in inner.state.values() if state), default=0)
        return dict.fromkeys(learning, common)
    states = {name: inner.state.get(parameter) for name, parameter in learning.items()}
    return {name: int(state.get("step", 0)) for name, state in states.items() if state}


def begin(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: dict[str, int]) -> None:
    """Make the optimizer keep zeros for each weight in `steps`, which has taken so many, and nothing for the others."""
    inner = _inner(world, optimizer)
    if world.mode == "deepspeed":
        _link_zero_state(optimizer.optimizer)
        for state in inner.state.values():
            state["step"].fill_(float(max(steps.values(), default=0)))
        return
    for name, parameter in _learning(world, model, optimizer).items():
        inner.state.pop(parameter, None)
        if name in steps:
            inner.state[parameter] = initial_state(inner, parameter)
            if "step" in inner.state[parameter]:
                inner.state[parameter]["step"].fill_(float(steps[name]))


def refresh_weights(world: World, optimizer: torch.optim.Optimizer) -> None:
    """After writing into the views: let the forward pass use the new weights (ZeRO keeps a second copy)."""
    if world.mode == "deepspeed":
        optimizer.optimizer.update_lp_params()


def _learning(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The weights that learn, now or in a later stage, a shared one once: those that the optimizer was given."""
    named = world.accelerator.unwrap_model(model).named_parameters()
    if world.mode == "deepspeed":  # its optimizer was given flat copies
        return {name: parameter for name, parameter in named if parameter.requires_grad}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in named if id(parameter) in given}


def _buffers(world: World, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers."""
    plain = world.accelerator.unwrap_model(model)
    saved = plain.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in plain.named_buffers() if name in saved}


def _inner(world: World, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of the mode."""
    return optimizer.optimizer.optimizer if world.mode == "deepspeed" else optimizer.optimizer


def _by_shape(parameter: torch.Tensor, state: State) -> tuple[State, State]:
    """What is kept for a weight in its own shape, and what in others; not its count of steps."""
    kept = {key: tensor for key, tensor in state.items() if key != "step" and tensor is not None}
    beside = {key: tensor for key, tensor in kept.items() if tensor.shape == parameter.shape}
    return beside, {key: tensor for key, tensor in kept.items() if key not in beside}


def _plain_weights(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Held]:
    held = []
    for name, parameter in parameters.items():
        beside, apart = _by_shape(parameter, optimizer.optimizer.state.get(parameter) or {})
        views = {key: tensor.detach().view(-1) for key, tensor in {"weight": parameter, **beside}.items()}
        held.append(Held(name, list(parameter.shape), 0, parameter.numel(), views, replicated=True))
        held += [
            Held(f"{name}.{key}", list(factor.shape), 0, factor.numel(), {FACTOR: factor.view(-1)}, replicated=True)
            for key, factor in apart.items()
        ]
    return held


def _zero_weights(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Held]:
    zero = optimizer.optimizer  # DeepSpeedZeroOptimizer, stages 1 and 2
    moments = _link_zero_state(zero)
    held = []
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # another rank holds all of it
        address = mapping.lp_fragment_address
        views = {"weight": mapping.get_hp_fragment(), **{key: mapping.get_hp_fragment(key) for key in moments}}
        start, stop = address.start, address.start + address.numel
        assert stop <= math.prod(parameter.shape), f"{name}: fragment [{start}, {stop}) of {list(parameter.shape)}"
        held.append(Held(name, list(parameter.shape), start, stop, views, replicated=False))
    return held


def _link_zero_state(zero) -> list[str]:
    """Create (zeros) what the optimizer keeps, where no step was made yet; return its names but for the count."""
    keys: list[str] = []
    for flat in zero.single_partition_of_fp32_groups:
        fresh = initial_state(zero.optimizer, flat)
        keys = [key for key in fresh if key != "step"]
        if not zero.optimizer.state[flat]:
            zero.optimizer.state[flat] = fresh
    # Linking happens once, during the first group's step, when later groups have no state yet: link again.
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    return keys
