"""The world of a run, and the backward pass and optimizer step for every mode. Accelerate's launch config decides it.

On a machine without CUDA each mode needs a word to get gloo: left alone, Accelerate starts independent worlds of one.
So every run asserts world size and mode before step 0.
"""

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from serving.directory import BadInput
from trainer.config import RunConfig
from trainer.guards import RunFailed

_MODES = {
    DistributedType.NO: "single",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.DEEPSPEED: "deepspeed",
}


class NotFinite(RunFailed):
    """A loss, gradient or held-out metric that is not a finite number.

    A step that shows one is not taken, save that under DeepSpeed a bad gradient has been stepped with: its engine
    clips and steps in one call, and tells the norm afterwards. Nothing is saved either way.
    """


class World:
    """This process's place among the ranks, and what they do together."""

    def __init__(self, accelerator: Accelerator, precision: str = "fp32") -> None:
        self.accelerator = accelerator
        self.precision = precision
        # With fp16 the loss is scaled up, so that small gradients do not vanish, as far as large ones allow.
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if precision == "fp16" else None
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.mode = _MODES[accelerator.distributed_type]
        self.is_main = accelerator.is_main_process

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 outside DeepSpeed."""
        plugin = self.accelerator.state.deepspeed_plugin if self.mode == "deepspeed" else None
        return int(plugin.zero_stage) if plugin else 0

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass, in the precision of the run. DeepSpeed's own weights have it."""
        if self.mode == "deepspeed" or self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.accelerator.device.type, dtype)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over the ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(total, "sum").tolist() if self.size > 1 else total.tolist()

    def sum_arrays(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return each array, of any shape, summed over the ranks, in fp64. Every rank has the same names and shapes."""
        sums = iter(self.sum([x for array in arrays.values() for x in np.ravel(array)]))
        return {
            name: np.array([next(sums) for _ in range(np.size(array))]).reshape(np.shape(array))
            for name, array in arrays.items()
        }

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on some rank: the same answer on all of them."""
        return bool(self.sum([flag])[0])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.accelerator.wait_for_everyone()


def start(config: RunConfig) -> World:
    """Join the world that the launcher made. Raises BadInput if it asks for what this config or machine has not."""
    on_cpu = not torch.cuda.is_available()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    _check_launch_precision(config)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise BadInput("distributed_type: FSDP found in the launch config; accepted for now: MULTI_GPU, DEEPSPEED")
    precision = config.precision.type
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Accelerate imports DeepSpeed even where it is not used
    if with_deepspeed:
        # DeepSpeed 0.19 calls collectives by names that torch is giving up.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        _check_deepspeed(config)
    # DeepSpeed keeps the weights themselves in bf16; elsewhere they stay fp32, and `autocast` is all there is to it.
    mixed = "bf16" if with_deepspeed and precision == "bf16" else "no"
    if with_deepspeed and on_cpu:
        _compile_nothing()
        accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    else:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed)
    world = World(accelerator, precision)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert world.size == expected, f"the launcher started {expected} processes, but they form a world of {world.size}"
    assert with_deepspeed == (world.mode == "deepspeed"), f"DeepSpeed asked for: {with_deepspeed}; got {world.mode}"
    if world.zero_stage > 2:
        raise BadInput(f"zero_stage: {world.zero_stage} found in the launch config; accepted for now: 1, 2")
    return world


def prepare(
    world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, *, micro_rows: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer made ready for the mode. DeepSpeed's own values are derived here and nowhere else."""
    if world.mode == "deepspeed":
        deepspeed_config = world.accelerator.state.deepspeed_plugin.deepspeed_config
        accumulation = config.batch.rows // (micro_rows * world.size)
        world.accelerator.gradient_accumulation_steps = accumulation
        deepspeed_config["train_micro_batch_size_per_gpu"] = micro_rows
        deepspeed_config["gradient_accumulation_steps"] = accumulation
        deepspeed_config["gradient_clipping"] = config.optim.max_grad_norm
    return world.accelerator.prepare(model, optimizer)


def backward(world: World, model: torch.nn.Module, loss: torch.Tensor, *, accumulation: int, is_last: bool) -> None:
    """Add the gradients of `loss`. Ranks are averaged once per step: after the last micro-batch."""
    if world.mode == "deepspeed":
        # The engine divides by the accumulation; our loss already carries the whole step's scale.
        model.backward(loss * accumulation)
        if not is_last:
            model.step()  # only counts the micro-batch
        return
    (world.scaler.scale(loss) if world.scaler else loss).backward()


def accumulating(world: World, model: torch.nn.Module, *, is_last: bool):
    """Return the context of one micro-batch: without communication before the last one."""
    if world.mode == "ddp" and not is_last:
        return world.accelerator.no_sync(model)
    return nullcontext()


def finish_step(
    world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, learning_rate: float, max_norm: float
) -> float:
    """Clip, step and clear the gradients; return their norm before clipping.

    Where it is not finite there is no step: weights and optimizer are as before, and so is the rest but a smaller
    scale of the loss under fp16. Under DeepSpeed there was one: its engine tells the norm afterwards.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if world.mode == "deepspeed":
        model.step()
        return float(model.get_global_grad_norm())
    if world.scaler:
        world.scaler.unscale_(optimizer.optimizer)
    norm = float(world.accelerator.clip_grad_norm_(model.parameters(), max_norm))
    if math.isfinite(norm):
        optimizer.step()
    if world.scaler:
        world.scaler.update()
    optimizer.zero_grad()
    return norm


def _compile_nothing() -> None:
    """Keep DeepSpeed from building a kernel for inference at start: it takes a minute, a compiler and ninja."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def _check_launch_precision(config: RunConfig) -> None:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.precision.type):
        raise BadInput(
            f"mixed_precision: {launched!r} in the launch config, but precision.type is {config.precision.type!r}; "
            f"the run config owns precision: remove mixed_precision from the launch config"
        )


def _check_deepspeed(config: RunConfig) -> None:
    """Raise BadInput for what DeepSpeed's engine would do in its own way, or not at all."""
    for key, found, accepted in (
        ("optim.type", config.optim.type, "adamw"),
        ("optim.on_non_finite", config.optim.on_non_finite, "stop"),
    ):
        if found != accepted:
            raise BadInput(f"{key}: {found} found; accepted with DeepSpeed: {accepted}; use it, or --parallel ddp")
    if config.precision.type == "fp16":
        raise BadInput("precision.type: fp16 found; accepted with DeepSpeed: fp32, bf16; use one, or --parallel ddp")
