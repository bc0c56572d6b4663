"""The plan of each parallel mode: what one rank holds, by term, and the most that is there at once."""

from collections.abc import Callable
from functools import partial

import torch

from trainer import modes
from trainer.config import RunConfig
from trainer.optim import build_optimizer
from trainer.plan import fsdp, timeline, zero
from trainer.plan.passes import empty, layers_of, record_step
from trainer.plan.plan import Plan
from trainer.plan.recorder import Pass
from trainer.plan.recordings import Recordings
from trainer.plan.timeline import Rank, Timeline

# From the cheapest: by the traffic between the ranks, and offload, which waits for the memory of the machine, last.
MODES: dict[str, Callable[[Timeline, Rank], None]] = {
    "single": timeline.whole,
    "ddp": timeline.whole,
    "zero1": zero.zero_1,
    "zero2": zero.zero_2,
    "fsdp2": fsdp.fsdp_2,
    "zero3": zero.zero_3,
    "zero3-offload": zero.zero_3_offload,
}


def make_plan(recordings: Recordings, mode: str) -> Plan:
    """Return the plan of a mode. Raises BadInput where the mode cannot run what the config asks for."""
    config, world_size, on_gpu = recordings.config, recordings.world_size, recordings.on_gpu
    modes.check(config, mode)
    passes = recordings.passes(mode)
    with recordings.model_of(mode) as model:
        steps = _steps(model, config, mode, world_size)
        layers, around = _by_layer(model, passes.itemsize)
    rank = Rank(
        passes, steps, world_size, recordings.accumulation, layers, around,
        loads=config.model.type == "pretrained", on_gpu=on_gpu,
    )  # fmt: skip
    t, on_host = Timeline(), Timeline()
    MODES[mode if on_gpu else mode.removesuffix("-offload")](t, rank)
    if on_gpu and mode == "zero3-offload":
        zero.zero_3(on_host, rank)
    return Plan(
        mode=mode,
        world_size=world_size,
        rows=config.batch.rows // world_size,
        micro_rows=recordings.micro_rows,
        length=recordings.length,
        batch_bytes=recordings.batch_bytes,
        by_term=t.most_by_term,
        most_by_phase=t.most_by_phase,
        pass_bytes=partial(recordings.pass_bytes, mode),
        precision=config.precision.type,
        on_gpu=on_gpu,
        beyond_bytes=recordings.beyond_bytes(mode),
        host_bytes=sum(on_host.most_by_term[term] for term in ("weights", "gradients", "optimizer")),
        events=t.events,
    )


def names(world_size: int) -> list[str]:
    """Return the modes of so many ranks, from the cheapest."""
    return ["single", "zero3-offload"] if world_size == 1 else [name for name in MODES if name != "single"]


def _steps(model: torch.nn.Module, config: RunConfig, mode: str, world_size: int) -> tuple[Pass, Pass]:
    """What the optimizer does over what a rank steps: its weights, its rows of them, or flat parts in fp32."""
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    if mode.startswith("zero"):
        of_matrices = sum(torch.Size(shape).numel() for shape in shapes if len(shape) > 1)
        of_others = sum(torch.Size(shape).numel() for shape in shapes if len(shape) <= 1)
        shapes = [(-(-numel // world_size),) for numel in (of_matrices, of_others) if numel]
    elif mode == "fsdp2":
        shapes = [(-(-shape[0] // world_size), *shape[1:]) for shape in shapes]
    weights = torch.nn.ParameterList([empty(*shape) for shape in shapes])
    return record_step(build_optimizer(weights, config.optim, fused=not mode.startswith("zero")))


def _by_layer(model: torch.nn.Module, itemsize: int) -> tuple[list[list[int]], list[int]]:
    """The bytes of each weight of each layer, and of each weight outside of them."""
    layers = [list(layer.parameters()) for layer in layers_of(model)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    around = [parameter.numel() * itemsize for parameter in model.parameters() if id(parameter) not in inside]
    return [[parameter.numel() * itemsize for parameter in layer] for layer in layers], around
