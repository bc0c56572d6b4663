"""What a pass of the model allocates and frees, in order: found by running it on tensors that have no memory.

The passes are those of the run itself: the model with its strategy, the objective's loss, autograd. Only floating-point
tensors are without memory (torch's FakeTensor); token ids, positions and targets are real, since how attention is cut
into blocks and the loss into chunks depends on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import attention
from trainer.objectives import Objective
from trainer.packing import Batch
from trainer.plan.recorder import BACK, ENTERED, LEFT, Pass, Recorder


@dataclass(frozen=True)
class Passes:
    """What one rank's forward passes do to memory. `again` finds gradients of an earlier micro-batch there."""

    learning: Pass
    again: Pass
    evaluating: Pass
    weights: tuple[tuple[int, bool], ...]  # bytes of each weight and buffer, a shared one once, and whether it learns
    itemsize: int = 4


def record(
    model: torch.nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    precision: str,
    on_gpu: bool = False,
    again: bool = True,
    evaluates: bool = True,
) -> Passes:
    """Run a model, on the meta device or not, on a batch on the CPU: nothing is allocated, and nothing is changed."""
    was_training = model.training
    recorder = Recorder(_vocabulary(model))
    eager = torch.compiler.set_stance("force_eager")
    with without_memory(model) as tensors, _as_on(on_gpu), eager, _layers_told(model, recorder):
        recorder.know(tensors)

        def one(*, learns: bool) -> Pass:
            model.train(learns)
            with recorder:
                _run(model, objective, batch, precision, learns=learns)
            return recorder.taken()

        try:
            learning = one(learns=True)
            later = one(learns=True) if again else Pass(())
            evaluating = one(learns=False) if evaluates else Pass(())
        finally:
            model.train(was_training)
        weights = tuple((tensor.untyped_storage().nbytes(), tensor.requires_grad) for tensor in tensors)
    return Passes(learning, later, evaluating, weights, next(model.parameters()).element_size())


def _run(model: torch.nn.Module, objective: Objective, batch: Batch, precision: str, *, learns: bool) -> None:
    with torch.set_grad_enabled(learns), autocast(precision):
        loss = objective.sums(model, batch)["loss"]
    if learns and loss.requires_grad:
        loss.backward()


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a model is a stack of."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _layers_told(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """While open, the recorder notes where each layer begins and ends, and where its backward pass begins."""

    def ended(layer: int, output: object) -> None:
        recorder.events.append((LEFT, layer))
        for tensor in tree_leaves(output)[:1]:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: recorder.events.append((BACK, layer)))

    hooks = []
    for i, layer in enumerate(layers_of(model)):
        hooks.append(layer.register_forward_pre_hook(lambda _, __, i=i: recorder.events.append((ENTERED, i))))
        hooks.append(layer.register_forward_hook(lambda _, __, output, i=i: ended(i, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def autocast(precision: str) -> torch.autocast:
    """Return the context of a pass over tensors without memory, which say that they are on the CPU."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def record_step(optimizer: torch.optim.Optimizer) -> tuple[Pass, Pass]:
    """Return what the first and the second step of an optimizer over weights without memory do; they have gradients."""
    recorder = Recorder()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    recorder.know([tensor for parameter in parameters for tensor in (parameter, parameter.grad) if tensor is not None])
    passes = []
    for _ in range(2):
        with recorder:
            optimizer.step()
        passes.append(recorder.taken())
    return passes[0], passes[1]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Return a weight without memory, and its gradient."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        parameter.grad = torch.empty_like(parameter)
    return parameter


@contextmanager
def without_memory(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, the weights and buffers of a model have no memory and say that they are on the CPU; yields them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kept: list[tuple[dict, dict]] = []
    instead: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            kept.append((tensors, dict(tensors)))
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in instead:
                        instead[id(tensor)] = _fake(tensor, mode)
                    tensors[name] = instead[id(tensor)]
    try:
        yield list(instead.values())
    finally:
        for tensors, before in kept:
            tensors.update(before)


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


@contextmanager
def _as_on(gpu: bool) -> Iterator[None]:
    """While open and on a GPU, attention within segments takes the kernel that it takes there."""
    before = attention._on_cpu
    if gpu:
        attention._on_cpu = attention._varlen
    try:
        yield
    finally:
        attention._on_cpu = before


def _vocabulary(model: torch.nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if head is None else head.weight.shape[0]
