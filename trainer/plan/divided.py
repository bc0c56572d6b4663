"""Timelines of the modes in which ranks divide more than the batch: ZeRO-1 to 3, offload, and FSDP2.

DeepSpeed steps an fp32 copy of this rank's part of the weights. It copies gradients into a bucket; a full one, and what
is left at the end of the pass, is added up among the ranks in one more copy.
"""

from trainer.plan.timeline import Rank, Timeline, evaluate, save

_FP32 = 4
_BUCKET_NUMEL = 500_000_000  # at most; trainer/zero.py makes it no larger than all gradients
_GATHERED_NUMEL = 1_000_000_000  # of gathered weights, ZeRO-3 keeps so many for the backward pass


def zero_1(t: Timeline, rank: Rank) -> None:
    """As ZeRO-2, but micro-batches before the last leave all their gradients where they are."""
    _zero_1_or_2(t, rank, divides_gradients=False)


def zero_2(t: Timeline, rank: Rank) -> None:
    """The weights lie in one flat tensor; of the averaged gradients a rank keeps its part."""
    _zero_1_or_2(t, rank, divides_gradients=True)


def zero_3(t: Timeline, rank: Rank) -> None:
    """Of the weights too a rank keeps its part; what a layer needs is gathered, and stays for the backward pass."""
    _zero_3(t, rank, offloads=False)


def zero_3_offload(t: Timeline, rank: Rank) -> None:
    """As ZeRO-3; what a rank keeps lies in the memory of the machine, and only what is gathered is on the device."""
    _zero_3(t, rank, offloads=True)


def fsdp_2(t: Timeline, rank: Rank) -> None:
    """A rank keeps rows of each weight, gradient and moment. What is around the blocks is gathered for the whole pass;
    of the blocks, the one that runs with its parts, while the next is being gathered."""
    n = rank.world_size
    for size in (*rank.learning_bytes, *rank.frozen_bytes):
        t.take("weights", size // n)
    gathered = rank.around_bytes + 2 * rank.block_bytes + rank.block_bytes // n
    with t.phase("rehearsal"):
        t.give(*_fsdp_pass(t, rank, gathered))
    held = t.take("buffers", gathered)
    evaluate(t, rank)
    t.give(held)
    with t.phase("step"):
        for step in rank.steps:
            gradients = _fsdp_pass(t, rank, gathered)
            t.run(step, "buffers", "optimizer")
            t.give(*gradients)
    save(t, rank, [size // n for size in rank.learning_bytes])
    _rebuild(t, rank)


def _fsdp_pass(t: Timeline, rank: Rank, gathered: int) -> list[int]:
    """Gradients wait until those of a block are there; copied, they are added up, and a part is kept."""
    waiting: list[int] = []
    kept: list[int] = []

    def reduce() -> None:
        size = sum(map(t.size_of, waiting))
        kept.append(t.take("gradients", size // rank.world_size))
        t.brief("buffers", [size])
        t.give(*waiting)
        waiting.clear()

    def arrived(block: int) -> bool:
        waiting.append(block)
        if sum(map(t.size_of, waiting)) >= max(rank.block_bytes, 1):
            reduce()
        return False

    held = t.take("buffers", gathered)
    t.run(rank.passes.learning, "activations", "buffers", arrived)
    reduce()
    t.give(held)
    return kept


def _zero_1_or_2(t: Timeline, rank: Rank, *, divides_gradients: bool) -> None:
    part = _FP32 * rank.learning_numel // rank.world_size
    apart = [t.take("weights", size) for size in rank.learning_bytes]
    for size in rank.frozen_bytes:
        t.take("weights", size)
    t.take("weights", sum(rank.learning_bytes))  # flat
    t.give(*apart)
    t.take("weights", part)
    evaluate(t, rank)
    with t.phase("step"):
        for step in rank.steps:
            kept: list[int] = []
            if divides_gradients or rank.accumulation == 1:
                for _ in range(min(2, rank.accumulation)):
                    kept.append(_pass_through_bucket(t, rank))
                    t.give(*kept[1:])  # added to the first
            else:
                kept = t.run(rank.passes.learning, "activations", "gradients")
                t.run(rank.passes.again, "activations")
                t.brief("buffers", [bucket_bytes(rank)])
            flat = t.take("gradients", part)
            t.run(step, "buffers", "optimizer")
            t.give(flat, *kept)
    save(t, rank, [part])
    _rebuild(t, rank, copies=2)


def _pass_through_bucket(t: Timeline, rank: Rank) -> int:
    """Run forward and back; return the block with this rank's part of the gradients.

    A bucket is as large as the gradients in it, which are counted in their own place.
    """
    limit = bucket_bytes(rank)
    waiting: list[int] = []

    def reduce() -> None:
        t.brief("buffers", [sum(map(t.size_of, waiting))])
        t.give(*waiting)
        waiting.clear()

    def arrived(block: int) -> bool:
        if waiting and sum(map(t.size_of, waiting)) + t.size_of(block) > limit:
            reduce()
        waiting.append(block)
        return False

    t.run(rank.passes.learning, "activations", "buffers", arrived)
    t.brief("buffers", [sum(map(t.size_of, waiting))])
    kept = t.take("gradients", sum(rank.learning_bytes) // rank.world_size)
    t.give(*waiting)
    return kept


def _zero_3(t: Timeline, rank: Rank, *, offloads: bool) -> None:
    part = _FP32 * rank.learning_numel // rank.world_size
    total = sum(size for size, _ in rank.passes.weights)
    gathered = min(total, _GATHERED_NUMEL * rank.passes.itemsize)
    bucket = bucket_bytes(rank)
    if not offloads:
        t.take("weights", total // rank.world_size)
        t.take("weights", part)
        t.take("gradients", sum(rank.learning_bytes) // rank.world_size)
    held = t.take("buffers", gathered)
    evaluate(t, rank)
    t.give(held)
    with t.phase("step"):
        t.take("buffers", bucket)
        for step in rank.steps:
            held = t.take("buffers", gathered)
            t.run(rank.passes.learning, "activations", "buffers", lambda block: True)
            t.brief("buffers", [bucket])
            t.give(held)
            if not offloads:
                flat = t.take("gradients", part)
                t.run(step, "buffers", "optimizer")
                t.give(flat)
    if not offloads:
        save(t, rank, [part])
        _rebuild(t, rank, copies=2)


def bucket_bytes(rank: Rank) -> int:
    return min(_BUCKET_NUMEL, rank.learning_numel) * rank.passes.itemsize


def _rebuild(t: Timeline, rank: Rank, *, copies: int = 1) -> None:
    """The main rank builds the whole model again, on the CPU, and is sent what the ranks hold of it."""
    with t.phase("model"):
        size = _FP32 * sum(size for size, _ in rank.passes.weights) // rank.passes.itemsize
        t.brief("saving", [size] * copies)
