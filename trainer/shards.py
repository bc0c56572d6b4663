"""What this rank holds of the weights and the optimizer's state, as flat views that a checkpoint reads and writes.

The one file that touches private names of DeepSpeed (0.19): `_hp_mapping`, `_hp_optimizer_states_linked`,
`_lazy_init_hp_params_optimizer_state`, `single_partition_of_fp32_groups`.
"""

import math
from dataclasses import dataclass

import torch

from trainer.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """This rank's part [start, stop) of one flattened tensor: views, by role (weight, exp_avg, exp_avg_sq, buffer)."""

    name: str
    shape: list[int]
    start: int
    stop: int
    views: dict[str, torch.Tensor]
    replicated: bool  # every rank holds the same whole tensor


def held_by_rank(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Held]:
    """Return the learning weights with their AdamW moments, and the persistent buffers, that this rank holds.

    Creates the optimizer's state (zeros) where no step was made yet. Frozen weights are not listed: they come from
    the base model.
    """
    parameters, buffers = _learning(world, model), _buffers(world, model)
    if world.mode == "deepspeed":
        weights = _zero_weights(parameters, optimizer)
    else:
        weights = _plain_weights(parameters, optimizer)
    return weights + [
        Held(name, list(buffer.shape), 0, buffer.numel(), {"buffer": buffer.view(-1)}, replicated=True)
        for name, buffer in buffers.items()
    ]


def names(world: World, model: torch.nn.Module) -> set[str]:
    """Return the names of all tensors that the ranks hold together."""
    return _learning(world, model).keys() | _buffers(world, model).keys()


def set_optimizer_step(world: World, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set AdamW's own step counter, which scales its moments."""
    for state in _inner(world, optimizer).state.values():
        state["step"].fill_(float(step))


def refresh_weights(world: World, optimizer: torch.optim.Optimizer) -> None:
    """After writing into the views: let the forward pass use the new weights (ZeRO keeps a second copy)."""
    if world.mode == "deepspeed":
        optimizer.optimizer.update_lp_params()


def _learning(world: World, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that learn, a shared one once."""
    plain = world.accelerator.unwrap_model(model)
    return {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}


def _buffers(world: World, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers."""
    plain = world.accelerator.unwrap_model(model)
    saved = plain.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in plain.named_buffers() if name in saved}


def _inner(world: World, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch AdamW inside the wrappers of the mode."""
    return optimizer.optimizer.optimizer if world.mode == "deepspeed" else optimizer.optimizer


def _plain_weights(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Held]:
    inner = optimizer.optimizer
    held = []
    for name, parameter in parameters.items():
        state = inner.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(inner, parameter))
            state.update({key: torch.zeros_like(parameter) for key in MOMENTS})
        views = {"weight": parameter.data.view(-1), **{key: state[key].view(-1) for key in MOMENTS}}
        held.append(Held(name, list(parameter.shape), 0, parameter.numel(), views, replicated=True))
    return held


def _step_device(inner: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.device:
    """Fused AdamW keeps its step counter beside the weights, the plain one on the CPU."""
    return parameter.device if inner.defaults.get("fused") else torch.device("cpu")


def _zero_weights(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Held]:
    zero = optimizer.optimizer  # DeepSpeedZeroOptimizer, stages 1 and 2
    for flat in zero.single_partition_of_fp32_groups:
        if not zero.optimizer.state[flat]:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.zeros(()), **moments}
    # Linking happens once, during the first group's step, when later groups have no state yet: link again.
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    held = []
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # another rank holds all of it
        address = mapping.lp_fragment_address
        views = {"weight": mapping.get_hp_fragment(), **{key: mapping.get_hp_fragment(key) for key in MOMENTS}}
        start, stop = address.start, address.start + address.numel
        assert stop <= math.prod(parameter.shape), f"{name}: fragment [{start}, {stop}) of {list(parameter.shape)}"
        held.append(Held(name, list(parameter.shape), start, stop, views, replicated=False))
    return held
