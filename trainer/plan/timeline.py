"""What one rank allocates and frees over a run, in order: the model's passes with what its mode puts between them.

P bytes of weights, G of their gradients, S of what the optimizer keeps, L numbers that learn, N ranks. What the libraries
do between the passes was read in DeepSpeed 0.19, torch 2.13 and safetensors 0.8, and measured: benchmarks/plan_error.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.plan.passes import NODE, Event, Pass, Passes

_BUCKET_NUMEL = 500_000_000  # DeepSpeed's largest bucket of gradients; trainer/zero.py makes it as large as they are
_GATHERED_NUMEL = 1_000_000_000  # DeepSpeed keeps so many gathered weights (stage3_max_live_parameters)
_DDP_BUCKET_BYTES = 25 * 2**20
_BROADCAST_BYTES = 250 * 2**20  # DDP sends the weights of rank 0 to the others in parts of this size
_FP32 = 4


class Timeline:
    """Events of blocks, and the most that was there at once in each phase."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.most_bytes: dict[str, int] = {}
        self._sizes: list[int] = []
        self._now, self._phase = 0, "build"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        self._note()
        yield
        self._phase = before

    def take(self, size: int) -> int:
        """Allocate a block of so many bytes; return its number."""
        self._sizes.append(size)
        block = len(self._sizes) - 1
        if size:
            self.events.append((block, size))
        self._now += size
        self._note()
        return block

    def give(self, *blocks: int) -> None:
        """Free blocks."""
        for block in blocks:
            if self._sizes[block]:
                self.events.append((block, 0))
            self._now -= self._sizes[block]
            self._sizes[block] = 0

    def brief(self, *sizes: int) -> None:
        """Allocate blocks and free them at once."""
        self.give(*[self.take(size) for size in sizes])

    def run(self, recorded: Pass, arrived: Callable[[int, int], bool] = lambda block, size: False) -> list[int]:
        """Allocate and free as a pass does; return the blocks that stay.

        `arrived` is told the number and size of each of these when it comes, and says whether it goes at once.
        """
        numbers: dict[int, int] = {}
        left = recorded.left
        for block, size in recorded.events:
            if block == NODE:
                self.events.append((NODE, 1))
            elif size:
                numbers[block] = self.take(size)
                if block in left and arrived(numbers[block], size):
                    self.give(numbers.pop(block))
            elif block in numbers:
                self.give(numbers.pop(block))
        self.events.append((NODE, 0))
        return list(numbers.values())

    def _note(self) -> None:
        self.most_bytes[self._phase] = max(self.most_bytes.get(self._phase, 0), self._now)


@dataclass(frozen=True)
class Rank:
    """What a timeline is made of. `steps`: the optimizer's first step and a later one, over what a rank steps."""

    passes: Passes
    steps: tuple[Pass, Pass]
    world_size: int
    accumulation: int
    offloaded: bool = False  # what is offloaded lies in the memory of the machine, not on the device

    @property
    def learning_numel(self) -> int:
        return sum(self.passes.numel(learns=True))

    @property
    def gradient_bytes(self) -> int:
        return sum(self.passes.learning.left.values())

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps on this rank."""
        return sum(self.steps[0].left.values())


def whole(t: Timeline, rank: Rank) -> None:
    """One process, and DDP, whose buckets are a second place for every gradient."""
    with t.phase("build"):
        weights = [size for size, _ in rank.passes.weights]
        for size in weights:
            t.take(size)
        if rank.world_size > 1:
            t.brief(min(sum(weights), _BROADCAST_BYTES))
            _in_parts(t, rank.gradient_bytes, _DDP_BUCKET_BYTES)
    with t.phase("rehearsal"):
        t.give(*t.run(rank.passes.learning))
    with t.phase("evaluation"):
        t.run(rank.passes.evaluating)
    with t.phase("step"):
        for step in rank.steps:
            gradients = t.run(rank.passes.learning)
            if rank.accumulation > 1:
                t.run(rank.passes.again)
            t.run(step)
            t.give(*gradients)
    _save(t, rank, [size for size, learns in rank.passes.weights if learns], rank.world_size)


def zero_1_and_2(t: Timeline, rank: Rank) -> None:
    """ZeRO-1 and 2. The weights lie in one flat tensor, of which each rank steps an fp32 copy of its part.

    Every gradient is copied into a bucket. When that is full, or the pass is over, it is averaged in a copy, and this
    rank's part is kept. Stage 1 differs only in that micro-batches before the last leave their gradients where they are.
    """
    part = _FP32 * rank.learning_numel // rank.world_size
    with t.phase("build"):
        apart = [t.take(size) for size, learns in rank.passes.weights if learns]
        for size in (size for size, learns in rank.passes.weights if not learns):
            t.take(size)
        t.take(rank.gradient_bytes)  # flat
        t.give(*apart)
        t.take(part)
    with t.phase("evaluation"):
        t.run(rank.passes.evaluating)
    with t.phase("step"):
        for step in rank.steps:
            kept = _run_with_bucket(t, rank)
            flat = t.take(part)
            t.run(step)
            t.give(flat, *kept)
    _save(t, rank, [part], 1)
    _finish(t, rank)


def zero_3(t: Timeline, rank: Rank) -> None:
    """ZeRO-3: a rank keeps its part of the weights, and gathers those of each layer; they stay for the backward pass.

    The part of the gradients, and the bucket, are kept too.
    """
    itemsize = rank.gradient_bytes / max(1, rank.learning_numel)
    weights = sum(size for size, _ in rank.passes.weights)
    part = _FP32 * rank.learning_numel // rank.world_size
    gathered_bytes = min(weights, int(_GATHERED_NUMEL * itemsize))
    with t.phase("build"):
        t.take(weights // rank.world_size if not rank.offloaded else 0)
        held = [t.take(part), t.take(part)]  # of the fp32 weights, and of the gradients
        if rank.offloaded:
            t.give(*held)
    with t.phase("evaluation"):
        gathered = t.take(gathered_bytes)
        t.run(rank.passes.evaluating)
        t.give(gathered)
    bucket = 0
    with t.phase("step"):
        for step in rank.steps:
            gathered = t.take(gathered_bytes)
            bucket = bucket or t.take(_bucket_bytes(rank))
            _run_with_bucket(t, rank, keeps_bucket=True)
            t.give(gathered)
            if not rank.offloaded:
                flat = t.take(part)
                t.run(step)
                t.give(flat)
    _save(t, rank, [part], 1)
    _finish(t, rank)


def _run_with_bucket(t: Timeline, rank: Rank, *, keeps_bucket: bool = False) -> list[int]:
    """Run the passes of a step, whose gradients go through a bucket; return what is kept of them."""
    limit, held, kept = _bucket_bytes(rank), [0], []

    def reduce() -> None:
        if held[0]:
            t.brief(held[0])  # a copy in which the ranks' gradients are added up
        held[0] = 0

    def arrived(block: int, size: int) -> bool:
        if held[0] + size > limit:
            reduce()
            if not keeps_bucket:
                t.give(*waiting)
                waiting.clear()
        held[0] += size
        if keeps_bucket:
            return True
        waiting.append(block)
        return False

    for micro in range(min(2, rank.accumulation)):
        waiting: list[int] = []
        t.run(rank.passes.learning, arrived)
        reduce()
        if not keeps_bucket:
            kept.append(t.take(rank.gradient_bytes // rank.world_size))
            t.give(*waiting)
            if micro:
                t.give(kept.pop())  # added to the first
    return kept


def _bucket_bytes(rank: Rank) -> int:
    itemsize = rank.gradient_bytes / max(1, rank.learning_numel)
    return int(min(_BUCKET_NUMEL, rank.learning_numel) * itemsize)


def _save(t: Timeline, rank: Rank, weights: list[int], world_size: int) -> None:
    """A checkpoint: safetensors copies what a rank writes. Without ZeRO each rank writes its part of what all have."""
    with t.phase("checkpoint"):
        state = rank.steps[0].left.values()
        t.brief(*(size // world_size for size in (*weights, *state)))


def _finish(t: Timeline, rank: Rank) -> None:
    """The main rank builds the model again, and gets what the ranks hold of it."""
    with t.phase("model"):
        size = _FP32 * sum(numel for learns in (True, False) for numel in rank.passes.numel(learns=learns))
        t.brief(size, size)


def _in_parts(t: Timeline, size: int, part: int) -> None:
    for _ in range(size // part):
        t.take(part)
    t.take(size % part)
