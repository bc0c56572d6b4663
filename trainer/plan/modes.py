"""The plan of each parallel mode: what one rank holds, by term, and the most that is there at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import modes
from trainer.config import RunConfig
from trainer.optim import build_optimizer
from trainer.packing import Batch
from trainer.plan import divided, timeline
from trainer.plan.passes import Event, Pass, empty, record, record_step
from trainer.plan.sketch import Sketch
from trainer.plan.timeline import Rank, Timeline

# From the cheapest: by the traffic between the ranks, and offload, which waits for the memory of the machine, last.
MODES: dict[str, Callable[[Timeline, Rank], None]] = {
    "single": timeline.whole,
    "ddp": timeline.whole,
    "zero1": divided.zero_1,
    "zero2": divided.zero_2,
    "fsdp2": divided.fsdp_2,
    "zero3": divided.zero_3,
    "zero3-offload": divided.zero_3_offload,
}
_ON_HOST = ("build", "checkpoint", "model")  # phases whose most is in the memory of the machine, where there is a GPU


@dataclass(frozen=True)
class ModePlan:
    """Bytes on one rank. `most_by_phase`: at once; `by_term`: of each term at its own most."""

    mode: str
    world_size: int
    micro_rows: int
    batch_bytes: int
    by_term: dict[str, int]
    most_by_phase: dict[str, int]
    on_gpu: bool
    host_bytes: int = 0  # what is offloaded
    events: list[Event] = field(repr=False, default_factory=list)

    @property
    def total_bytes(self) -> int:
        """The most at once, of what lies on the device."""
        phases = {name: most for name, most in self.most_by_phase.items() if not (self.on_gpu and name in _ON_HOST)}
        return self.batch_bytes + max(phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.most_by_phase, key=lambda name: self.most_by_phase[name])


def mode_plan(
    sketch: Sketch, config: RunConfig, batch: Batch, mode: str, *, world_size: int, on_gpu: bool
) -> ModePlan:
    """Return the plan of a mode, with `batch` as one forward pass of a rank. Raises BadInput where the mode cannot."""
    modes.check(config, mode)
    micro_rows = modes.micro_rows(config, world_size)
    in_half = mode.startswith("zero") and config.precision.type == "bf16"  # DeepSpeed's weights are bf16 themselves
    model = sketch.model.to(torch.bfloat16) if in_half else sketch.model
    try:
        precision = "fp32" if in_half else config.precision.type
        passes = record(model, sketch.objective, batch, precision=precision, on_gpu=on_gpu)
        steps = _steps(model, config, mode, world_size)
    finally:
        sketch.model.to(torch.float32)
    itemsize = passes.itemsize
    accumulation = config.batch.rows // (micro_rows * world_size)
    rank = Rank(passes, steps, world_size, accumulation, *(itemsize * numel for numel in _blocks(model)))
    t, on_host = Timeline(), Timeline()
    MODES[mode if on_gpu else mode.removesuffix("-offload")](t, rank)
    if on_gpu and mode == "zero3-offload":
        divided.zero_3(on_host, rank)
    batch_bytes = sum(tensor.nbytes for tensor in batch.values())
    host_bytes = sum(on_host.most_by_term[term] for term in ("weights", "gradients", "optimizer"))
    return ModePlan(
        mode, world_size, micro_rows, batch_bytes, t.most_by_term, t.most_by_phase, on_gpu, host_bytes, t.events
    )


def names(world_size: int) -> Iterator[str]:
    """Yield the modes of so many ranks, from the cheapest."""
    yield "single" if world_size == 1 else "ddp"
    yield from [name for name in MODES if name not in ("single", "ddp")] if world_size > 1 else ["zero3-offload"]


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


def _blocks(model: torch.nn.Module) -> tuple[int, int]:
    """The numbers in the largest block of a model, and in its weights outside the blocks."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    around = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0), around
