"""A model divided by PyTorch's FSDP2, and what a launch config may ask of it."""

import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from serving.directory import BadInput


def check() -> None:
    """Raise BadInput for what the launch config asks of FSDP that is not supported."""
    for key, accepted in (
        ("fsdp_version", "2"),
        ("fsdp_offload_params", "false"),
        ("fsdp_activation_checkpointing", "false"),  # the run config's batch.activation_checkpointing
        ("fsdp_cpu_ram_efficient_loading", "false"),
    ):
        found = os.environ.get(key.upper(), accepted).lower()
        if found != accepted:
            raise BadInput(f"{key}: {found} found in the launch config; accepted: {accepted}, as in fsdp2.yaml")


def shard(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, world_size: int) -> None:
    """Divide the model among the ranks, in place: each block is gathered when it runs, what is around them at once.

    The optimizer goes on with this rank's rows of each weight. Through torch itself, since Accelerate 1.15 divides
    heads by names, which fails where one shares weights with what it does not look at (BERT's bias).
    """
    whole = dict(model.named_parameters())
    mesh = init_device_mesh(device.type, (world_size,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for block in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    parts = dict(model.named_parameters())
    part_of = {id(parameter): parts[name] for name, parameter in whole.items()}
    for group in optimizer.param_groups:
        group["params"] = [part_of[id(parameter)] for parameter in group["params"]]


def release(model: torch.nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass left gathered: they are copies, soon out of date."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
