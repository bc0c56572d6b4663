"""What a pass of the model allocates and frees, in order: found by running it on tensors that have no memory.

The passes are those of the run itself: the model with its strategy, the objective's loss, autograd. Only floating-point
tensors are without memory (torch's FakeTensor); token ids, positions and targets are real, since how attention is cut
into blocks and the loss into chunks depends on them.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import attention
from trainer.objectives import Objective
from trainer.packing import Batch

NODE = -1  # an event that is no block: autograd notes an operation, and forgets it when the graph goes
_MOST_ANSWERS = 2**22
Event = tuple[int, int]  # a block's number, and its bytes when it comes, 0 when it goes


@dataclass(frozen=True)
class Pass:
    """Blocks are numbered from 0; those that are there at the end stay: gradients, or what an optimizer keeps."""

    events: tuple[Event, ...]
    logits: frozenset[int] = frozenset()  # blocks as wide as the vocabulary

    @property
    def left(self) -> dict[int, int]:
        """The bytes of the blocks that stay."""
        sizes: dict[int, int] = {}
        for block, size in self.events:
            if size:
                sizes[block] = size
            else:
                sizes.pop(block, None)
        sizes.pop(NODE, None)
        return sizes

    @property
    def most_bytes(self) -> int:
        """The most bytes at once of blocks that go again."""
        left, now, most = self.left, 0, 0
        sizes: dict[int, int] = {}
        for block, size in self.events:
            if block != NODE and block not in left:
                now += size - sizes.get(block, 0)
                sizes[block] = size
                most = max(most, now)
        return most


class Recorder(TorchDispatchMode):
    """While open, notes when storages of tensors without memory come and go."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.logits: set[int] = set()
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._vocabulary, self._count = vocabulary, 0

    def know(self, tensors: list[torch.Tensor]) -> None:
        """Take tensors as there before; they are no events."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.is_grad_enabled():
            self.events.append((NODE, 1))
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a number that an optimizer or a model reads, as Adafactor does a norm: any does
        found = _without_masks(function, args)(*args, **(kwargs or {}))
        if _is_answer(found):
            return torch.zeros(found.shape, dtype=found.dtype)
        for tensor in (found,) if isinstance(found, torch.Tensor) else tree_leaves(found):
            if isinstance(tensor, FakeTensor):
                self._note(tensor)
        return found

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        block, size = self._count, storage.nbytes()
        self._known[storage] = block
        if not size:
            return
        self._count += 1
        self.events.append((block, size))
        if self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            self.logits.add(block)
        weakref.finalize(storage, self.events.append, (block, 0))

    def taken(self) -> Pass:
        """Return what was noted, and begin anew; what stays is no news."""
        found = Pass(tuple(self.events), frozenset(self.logits))
        self.events.clear()
        self.logits.clear()
        return found


def _without_masks(function, args: tuple) -> Callable:
    """Indexing by a mask gives as many rows as the mask has ones: asked of the mask, which is real."""
    if function is not torch.ops.aten.index.Tensor or not any(map(_is_mask, args[1])):
        return function
    return lambda tensor, indices: function(tensor, [place for index in indices for place in _places(index)])


def _is_answer(found: object) -> bool:
    """Whether an operation made whole numbers of what has none, as scores do. Zeros stand for what is not known."""
    return isinstance(found, FakeTensor) and not found.is_floating_point() and found.numel() <= _MOST_ANSWERS


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    return list(index.nonzero().unbind(1)) if index is not None and _is_mask(index) else [index]


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
    with without_memory(model) as tensors, _as_on(on_gpu), torch.compiler.set_stance("force_eager"):
        recorder = Recorder(_vocabulary(model))
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
