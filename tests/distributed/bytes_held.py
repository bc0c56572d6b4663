"""The bytes that a rank holds of weights, gradients and optimizer state; each storage is counted once."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def bytes_held(world, model, optimizer) -> dict[str, int]:
    """Return bytes by what they are for. `copies`: the weights that DeepSpeed steps, if it computes with others."""
    parameters = list(world.accelerator.unwrap_model(model).parameters())
    weights = [parameter.data for parameter in parameters]
    copies: list[torch.Tensor] = []
    inner = optimizer.optimizer
    if world.mode == "deepspeed":
        from trainer import zero_shards

        weights += [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
        copies, inner = list(zero_shards.flats(inner)), inner.optimizer
    state = [tensor for kept in inner.state.values() for key, tensor in kept.items() if key != "step"]
    counted: set[int] = set()
    return {
        name: _bytes(tensors, counted)
        for name, tensors in (("weights", weights), ("copies", copies), ("optimizer", state))
    }


def gradient_bytes(world, model) -> int:
    """Return the bytes of the gradients that are held after a backward pass."""
    parameters = world.accelerator.unwrap_model(model).parameters()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world.mode == "deepspeed":
        from trainer import zero_shards

        zero = model.optimizer
        # Offloaded ones lie beside the copies.
        gradients += [part for parts in zero.averaged_gradients.values() for part in parts or ()]
        gradients += [flat.grad for flat in zero_shards.flats(zero) if flat.grad is not None]
    return _bytes(gradients, set())


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if local.numel() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total
