"""What this rank holds of the weights and the optimizer's state, as flat views that a checkpoint reads and writes.

A weight's state is what its optimizer keeps for it: tensors of its shape lie beside it, others (Adafactor's rows and
columns) under a name of their own, and a count of the steps that it has taken: weights may join a run late.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, Shard

from trainer import fsdp
from trainer.distributed import World
from trainer.held import Held
from trainer.optim import State, initial_state

FACTOR = "factor"

Layout = dict[str, tuple[list[int], list[str]]]


def layout(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Layout:
    """Return the shape and roles of every tensor that the ranks hold together once each weight has taken a step."""
    inner, found = _inner(world, optimizer), Layout()
    for name, parameter in _learning(world, model, optimizer).items():
        shape = _shape_of(world, parameter)
        whole = torch.empty(shape, dtype=parameter.dtype, device="meta")
        beside, apart = _by_shape(whole, initial_state(inner, whole))
        found[name] = list(shape), sorted(["weight", *beside])
        found |= {f"{name}.{key}": (list(factor.shape), [FACTOR]) for key, factor in apart.items()}
    buffers = _buffers(world, model)
    return found | {name: (list(buffer.shape), ["buffer"]) for name, buffer in buffers.items()}


def held_by_rank(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Held]:
    """Return the learning weights with what the optimizer keeps for them, and the persistent buffers, of this rank.

    A weight that took no step yet comes alone. Frozen weights are not listed: they come from the base model.
    """
    learning = _learning(world, model, optimizer)
    if world.mode == "deepspeed":
        from trainer import zero_shards

        weights = zero_shards.held(optimizer.optimizer, learning, rank=world.rank)
    else:
        weights = _plain_weights(learning, optimizer)
    return weights + [
        Held(name, list(buffer.shape), 0, buffer.numel(), {"buffer": buffer.view(-1)}, replicated=True)
        for name, buffer in _buffers(world, model).items()
    ]


def whole_weights(
    world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight that learns, and each persistent buffer, whole and in fp32: on the CPU of the main rank, bit
    for bit what the ranks hold of it together. One at a time; every rank must go through all of them.
    """
    parts = {part.name: part for part in held_by_rank(world, model, optimizer)}
    for name, (shape, roles) in layout(world, model, optimizer).items():
        if roles == [FACTOR]:
            continue
        part = parts.get(name)
        role = "buffer" if roles == ["buffer"] else "weight"
        if part is not None and part.replicated:
            yield name, part.views[role].detach().cpu().view(shape)
            continue
        # As whole numbers: what another rank has not is 0, and adding that leaves the bits as they are (-0.0 too).
        bits = torch.zeros(math.prod(shape), dtype=torch.int32, device=world.accelerator.device)
        if part is not None:
            bits[part.start : part.stop].copy_(part.views[role].detach().contiguous().view(torch.int32))
        if world.size > 1:
            torch.distributed.reduce(bits, 0)
        yield name, bits.cpu().view(torch.float32).view(shape)


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
        from trainer import zero_shards

        zero_shards.link(optimizer.optimizer)
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
        from trainer import zero_shards

        zero_shards.refresh_weights(optimizer.optimizer)


def _learning(world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The weights that learn, now or in a later stage, a shared one once: those that the optimizer was given."""
    plain = world.accelerator.unwrap_model(model)
    if world.mode == "fsdp2":
        fsdp.release(plain)  # or copies of whole weights stand where the optimizer's parts are looked for
    named = plain.named_parameters()
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


def _shape_of(world: World, parameter: torch.nn.Parameter) -> torch.Size:
    if world.mode != "deepspeed":
        return parameter.shape
    from trainer import zero_shards

    return zero_shards.shape_of(parameter)


def _by_shape(parameter: torch.Tensor, state: State) -> tuple[State, State]:
    """What is kept for a weight in its own shape, and what in others; not its count of steps."""
    kept = {key: tensor for key, tensor in state.items() if key != "step" and tensor is not None}
    beside = {key: tensor for key, tensor in kept.items() if tensor.shape == parameter.shape}
    return beside, {key: tensor for key, tensor in kept.items() if key not in beside}


def _plain_weights(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Held]:
    held = []
    for name, parameter in parameters.items():
        beside, apart = _by_shape(parameter, optimizer.optimizer.state.get(parameter) or {})
        start, stop = _range(parameter)
        views = {key: _local(tensor.detach()).view(-1) for key, tensor in {"weight": parameter, **beside}.items()}
        assert all(view.numel() == stop - start for view in views.values()), f"{name}: not rows [{start}, {stop})"
        replicated = not isinstance(parameter, DTensor)
        if start < stop:
            held.append(Held(name, list(parameter.shape), start, stop, views, replicated=replicated))
        held += [
            Held(f"{name}.{key}", list(factor.shape), 0, factor.numel(), {FACTOR: factor.view(-1)}, replicated=True)
            for key, factor in apart.items()
        ]
    return held


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _range(parameter: torch.Tensor) -> tuple[int, int]:
    """What this rank has of the flattened weight: all, or under FSDP2 some of its rows, as many as others or fewer."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.numel()
    mesh = parameter.device_mesh
    assert tuple(parameter.placements) == (Shard(0),), f"divided otherwise than by rows: {parameter.placements}"
    rows, row = parameter.shape[0], parameter.shape[1:].numel()
    share = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * share, rows)
    return first * row, min(first + share, rows) * row
