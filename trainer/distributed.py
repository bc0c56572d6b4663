"""The world of a run, and the backward pass and optimizer step for every mode. Accelerate's launch config decides it.

On a machine without CUDA each mode needs a word to get gloo: left alone, Accelerate starts independent worlds of one.
So every run asserts world size and mode before step 0. What DeepSpeed and FSDP are told: trainer/zero.py and fsdp.py.
"""

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    patch_environment,
)
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from serving.directory import BadInput
from trainer import fsdp, machines, modes, zero
from trainer.config import RunConfig
from trainer.guards import RunFailed
from trainer.watchdog import Watchdog

_MODES = {
    DistributedType.NO: "single",
    DistributedType.MULTI_CPU: "ddp",
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.DEEPSPEED: "deepspeed",
}
_AFTER_THE_WATCHDOG_S = 20  # a collective gives up so long after the watchdog, which names the rank that is missing


class NotFinite(RunFailed):
    """A loss, gradient or held-out metric that is not a finite number.

    A step that shows one is not taken, save that under DeepSpeed a bad gradient has been stepped with: its engine
    clips and steps in one call, and tells the norm afterwards. Nothing is saved either way.
    """


class World:
    """This process's place among the ranks, and what they do together."""

    def __init__(
        self,
        accelerator: Accelerator,
        precision: str = "fp32",
        *,
        with_fsdp: bool = False,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.watchdog = watchdog or Watchdog()
        self.precision = precision
        # With fp16, on a GPU, the loss is scaled up, so that small gradients do not vanish, as far as large ones allow.
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if precision == "fp16" else None
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.mode = "fsdp2" if with_fsdp else _MODES[accelerator.distributed_type]
        self.is_main = accelerator.is_main_process

    @property
    def name(self) -> str:
        """The mode, and the stage where it has one: ddp, zero3 ..."""
        return f"zero{self.zero_stage}" if self.mode == "deepspeed" else self.mode

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass gathers weights from the ranks, so that all of them must run it at the same time."""
        return self.mode == "fsdp2" or self.zero_stage == 3

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

    def at(self, phase: str, step: int | None = None) -> None:
        """Say that this rank enters a phase, of the same step as before unless it is given. All ranks must, alike."""
        self.watchdog.status.at(phase, step)


def start(config: RunConfig, watchdog: Watchdog | None = None) -> World:
    """Join the world that the launcher made. Raises BadInput if it asks for what this config or machine has not."""
    with_deepspeed, with_fsdp = _asked("ACCELERATE_USE_DEEPSPEED"), _asked("ACCELERATE_USE_FSDP")
    on_cpu = not torch.cuda.is_available()
    _check_launch_precision(config)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Accelerate imports DeepSpeed even where it is not used
    if with_deepspeed:
        # DeepSpeed 0.19 calls collectives by names that torch is giving up.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        modes.check(config, f"zero{zero.stage()}")
        zero.check(config)
    if with_fsdp:
        modes.check(config, "fsdp2")
        fsdp.check()
    if on_cpu:
        modes.check_on_cpu(config)
    machines.refuse_lone_worlds()
    machines.use_reachable_interface()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # what is divided how is trainer/fsdp.py's
        accelerator = _join(config, on_cpu, with_deepspeed)
    world = World(accelerator, config.precision.type, with_fsdp=with_fsdp, watchdog=watchdog)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if world.size != expected:
        raise BadInput(
            f"WORLD_SIZE: {expected} processes found, started by the launcher, but they form a world of {world.size}; "
            "accepted: one world of them all; start them with `trivet train --nproc` or a file of configs/accelerate/"
        )
    assert with_deepspeed == (world.mode == "deepspeed"), f"DeepSpeed asked for: {with_deepspeed}; got {world.mode}"
    return world


def prepare(
    world: World, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, *, micro_rows: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer made ready for the mode. Raises BadInput for an offload that the machine lacks."""
    if world.mode == "deepspeed":
        if zero.is_offloaded():
            zero.check_space_for_offload(model, world_size=world.size)
        settings = world.accelerator.state.deepspeed_plugin.deepspeed_config
        world.accelerator.gradient_accumulation_steps = zero.derive(
            settings, config, model, micro_rows=micro_rows, world_size=world.size
        )
        if world.zero_stage == 3:
            zero.divide(model, settings, config.precision.type)
    if world.mode == "fsdp2":
        fsdp.shard(model, optimizer, world.accelerator.device, world.size)
        return model, world.accelerator.prepare_optimizer(optimizer)
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
    clipped = world.accelerator.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if math.isfinite(norm):
        optimizer.step()
    if world.scaler:
        world.scaler.update()
    optimizer.zero_grad()
    return norm


def _join(config: RunConfig, on_cpu: bool, with_deepspeed: bool) -> Accelerator:
    timeout = timedelta(seconds=config.run.timeout_s + _AFTER_THE_WATCHDOG_S)
    # DeepSpeed keeps the weights themselves in bf16; elsewhere they stay fp32, and `autocast` is all there is to it.
    mixed = "bf16" if with_deepspeed and config.precision.type == "bf16" else "no"
    if not with_deepspeed:
        # A gradient is its place in DDP's bucket, and has no second one.
        handlers = [
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)
    if on_cpu:
        _compile_nothing()
    backend = InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=timeout)
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[backend])
    unset_hf_deepspeed_config()  # or transformers divides each model that it makes, before a strategy has seen it
    return accelerator


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


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
