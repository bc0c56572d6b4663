"""What comes and goes while tensors without memory (torch's FakeTensor) are computed with."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Events that are no block. NODE: autograd notes an operation, and forgets it when the graph goes. The others come with
# the number of a layer: its forward pass begins, or ends; its backward pass begins.
NODE, ENTERED, LEFT, BACK = -1, -2, -3, -4
Event = tuple[int, int]  # a block's number, and its bytes when it comes, 0 when it goes
_MOST_ANSWERS = 2**22


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
            if block >= 0 and size:
                sizes[block] = size
            elif block >= 0:
                sizes.pop(block, None)
        return sizes

    @property
    def most_bytes(self) -> int:
        """The most bytes at once of blocks that go again."""
        left, now, most = self.left, 0, 0
        sizes: dict[int, int] = {}
        for block, size in self.events:
            if block >= 0 and block not in left:
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
        if torch.is_grad_enabled() and not torch._C._current_autograd_node():
            self.events.append((NODE, 1))  # not where activations are computed again, layer by layer
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
