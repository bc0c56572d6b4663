"""Out of memory, before it happens and when it does: what is needed, what there is, which settings to lower."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from serving.directory import BadInput
from trainer.config import NewModel, RunConfig
from trainer.free_memory import free_bytes
from trainer.guards import RunFailed
from trainer.plan.advice import advice
from trainer.plan.plan import Plan

# The plan leaves out the allocator's slack (see trainer/plan), so its advice keeps away from the edge.
_SAFE_SHARE = 0.7
_ALLOCATORS_SAY = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    os.strerror(errno.ENOMEM),
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class OutOfMemory(BadInput):
    """A run that does not fit into memory; the message says what it needs, what there is and what to lower."""


def refuse_what_cannot_fit(plan: Plan, config: RunConfig, device: torch.device, *, nproc: int) -> str:
    """Raise OutOfMemory if the certain parts of a plan do not fit; return a warning if the estimate does not.

    On a CPU nobody else says so: Linux lets a process allocate what is not there, and kills it when it is used.
    """
    free = free_bytes(device, world_size=nproc)
    if free is None:
        return ""
    if plan.certain_bytes - plan.weights_bytes > free:  # the weights are there already
        raise OutOfMemory(_describe(plan, config, free))
    if plan.total_bytes - plan.weights_bytes > free:
        return f"warning: this may not fit: {_describe(plan, config, free)}"
    return ""


@contextmanager
def explained(
    plan: Plan | None, config: RunConfig, device: torch.device, failure: Callable[[str], Exception] | None = None
) -> Iterator[None]:
    """Raise OutOfMemory (or `failure` of its message) where the block runs out of memory. Under DeepSpeed: no plan."""
    free = free_bytes(device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = _without_a_plan(error, config) if plan is None else _describe(plan, config, free)
        raise (failure or OutOfMemory)(message) from None


@contextmanager
def while_building(config: RunConfig) -> Iterator[None]:
    """Raise OutOfMemory where the block, which reads the data and builds the model, runs out of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sizes = "model.hidden_size, model.num_layers or tokenizer.vocab_size"
        smaller = f"lower {sizes}" if isinstance(config.model, NewModel) else "use a smaller model"
        message = f"model: out of memory while the data and the model were loaded ({_first_line(error)}); {smaller}"
        raise OutOfMemory(message) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of Python, numpy, torch, the system or a GPU's library, has nothing left to give."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, BadInput | RunFailed):  # whatever they quote, they say what to do
        return False
    return getattr(error, "errno", None) == errno.ENOMEM or any(words in str(error) for words in _ALLOCATORS_SAY)


def _describe(plan: Plan, config: RunConfig, free: int | None) -> str:
    parts = {
        "weights": plan.weights_bytes,
        "gradients": plan.gradients_bytes,
        "optimizer": plan.optimizer_bytes,
        "batch": plan.batch_bytes,
        "logits": plan.logits_bytes,
        "activations, estimated": plan.activations_bytes,
    }
    shown = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items())
    there = "" if free is None else f"{in_words(free + plan.weights_bytes)} can be had; "
    limit = plan.total_bytes if free is None else min(free + plan.weights_bytes, plan.total_bytes)
    return (
        f"batch.micro_rows: out of memory: {plan.micro_rows} rows of {plan.length} tokens need about "
        f"{in_words(plan.total_bytes)} ({shown}); {there}use {advice(plan, config, int(limit * _SAFE_SHARE))}"
    )


def _without_a_plan(error: BaseException, config: RunConfig) -> str:
    found = config.batch.micro_rows or "all at once"
    return f"batch.micro_rows: {found}: out of memory ({_first_line(error)}); lower it, or batch.max_length"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    return text[:200] or type(error).__name__


def in_words(size_bytes: int) -> str:
    """Return a size as a person says it: 1.5 GiB, 20 MiB, 3 KiB."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.1f} GiB"
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.0f} KiB"
