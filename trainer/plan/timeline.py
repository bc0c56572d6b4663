"""What one rank allocates and frees over a run, in order: the model's passes, and what its mode puts between them.

Each block is there for a term of the plan. What the libraries take between the passes was read in torch 2.13,
safetensors 0.8 and (zero.py) DeepSpeed 0.19, and measured: benchmarks/plan_error.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.plan.passes import Passes
from trainer.plan.recorder import NODE, Event, Pass

TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "evaluation", "saving")
_FP32_BYTES = 4
_DDP_BUCKET_BYTES = 25 * 2**20
_BROADCAST_BYTES = 250 * 2**20  # DDP sends the weights of rank 0 to the others in parts of this size


class Timeline:
    """Events of blocks, and the most that was there at once: in each phase, and for each term once all is built."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.most_by_phase: dict[str, int] = {}
        self.most_by_term = dict.fromkeys(TERMS, 0)
        self._blocks: list[tuple[int, str]] = []
        self._now = dict.fromkeys(TERMS, 0)
        self._phase = "build"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        self._note()
        yield
        self._phase = before

    def take(self, term: str, size: int) -> int:
        """Allocate a block of so many bytes for a term; return its number."""
        self._blocks.append((size, term))
        block = len(self._blocks) - 1
        if size:
            self.events.append((block, size))
            self._now[term] += size
            self._note()
        return block

    def give(self, *blocks: int) -> None:
        """Free blocks; one that is gone already stays so."""
        for block in blocks:
            size, term = self._blocks[block]
            if size:
                self.events.append((block, 0))
                self._now[term] -= size
                self._blocks[block] = 0, term

    def brief(self, term: str, sizes: Iterable[int]) -> None:
        """Allocate blocks, all of them at once, and free them."""
        self.give(*[self.take(term, size) for size in sizes])

    def run(
        self,
        recorded: Pass,
        term: str,
        leaves: str = "",
        arrived: Callable[[int], bool] = lambda block: False,
        reached: Callable[[int, int], None] = lambda place, layer: None,
    ) -> list[int]:
        """Allocate and free for `term` as a pass does; return the blocks that stay, which are there for `leaves`.

        `arrived` is told each of these when it comes, and says whether it goes at once; `reached` is told where the
        pass is: ENTERED, LEFT or BACK, and which layer.
        """
        numbers: dict[int, int] = {}
        left = recorded.left
        for block, size in recorded.events:
            if block == NODE:
                self.events.append((NODE, size))
            elif block < 0:
                reached(block, size)
            elif size:
                for_logits = block in recorded.logits and term == "activations"
                its_own = leaves if block in left else "logits" if for_logits else term
                numbers[block] = self.take(its_own or term, size)
                if block in left and arrived(numbers[block]):
                    self.give(numbers.pop(block))
            elif block in numbers:
                self.give(numbers.pop(block))
        self.events.append((NODE, 0))
        return list(numbers.values())

    def size_of(self, block: int) -> int:
        return self._blocks[block][0]

    def _note(self) -> None:
        self.most_by_phase[self._phase] = max(self.most_by_phase.get(self._phase, 0), sum(self._now.values()))
        for term, size in self._now.items() if self._phase != "build" else ():
            self.most_by_term[term] = max(self.most_by_term[term], size)


@dataclass(frozen=True)
class Rank:
    """What a timeline is made of. `steps`: the optimizer's first step and a later one, over what this rank steps.

    `layers` are the bytes of each weight of each layer of the model, `around` of each weight outside of them. `loads`:
    the model lies in files, whose pages are its memory until they are written to.
    """

    passes: Passes
    steps: tuple[Pass, Pass]
    world_size: int
    accumulation: int
    layers: list[list[int]]
    around: list[int]
    loads: bool
    on_gpu: bool

    @property
    def learning_bytes(self) -> list[int]:
        return [size for size, learns in self.passes.weights if learns]

    @property
    def frozen_bytes(self) -> list[int]:
        """Of weights that do not learn, and of buffers."""
        return [size for size, learns in self.passes.weights if not learns]

    @property
    def learning_numel(self) -> int:
        return sum(self.learning_bytes) // self.passes.itemsize


def rebuild(t: Timeline, rank: Rank, *, copies: int = 1) -> None:
    """The main rank builds the whole model again, on the CPU, and is sent what the ranks hold of it."""
    with t.phase("model"):
        sizes = [size * _FP32_BYTES // rank.passes.itemsize for size, _ in rank.passes.weights]
        t.brief("saving", [sum(sizes)] * copies if rank.loads else sizes * copies)


def whole(t: Timeline, rank: Rank) -> None:
    """One process, and DDP, in whose buckets the gradients lie; those of passes that it does not reduce lie apart."""
    reduces = rank.world_size > 1
    at_once = reduces and rank.accumulation == 1
    for size in (*rank.learning_bytes, *rank.frozen_bytes):
        t.take("weights", size)
    if reduces:
        t.brief("buffers", [min(sum(size for size, _ in rank.passes.weights), _BROADCAST_BYTES)])
        total = sum(rank.learning_bytes)
        for size in [*[_DDP_BUCKET_BYTES] * (total // _DDP_BUCKET_BYTES), total % _DDP_BUCKET_BYTES]:
            t.take("gradients", size)
    with t.phase("rehearsal"):
        t.give(*t.run(rank.passes.learning, "activations", "gradients", lambda block: reduces))
    evaluate(t, rank)
    with t.phase("step"):
        for step in rank.steps:
            gradients = t.run(rank.passes.learning, "activations", "gradients", lambda block: at_once)
            if rank.accumulation > 1:
                t.run(rank.passes.again, "activations")
            if reduces:
                t.give(*gradients)
            t.run(step, "buffers", "optimizer")
            t.give(*gradients)
    save(t, rank, rank.learning_bytes, share=rank.world_size)


def evaluate(t: Timeline, rank: Rank) -> None:
    with t.phase("evaluation"):
        t.run(rank.passes.evaluating, "evaluation")


def save(t: Timeline, rank: Rank, weights: Iterable[int], *, share: int = 1) -> None:
    """A checkpoint: safetensors copies what a rank writes, a `share`th of weights and of what the optimizer keeps."""
    with t.phase("checkpoint"):
        state = rank.steps[0].left.values()
        t.brief("saving", [size // share for size in (*weights, *state)])
