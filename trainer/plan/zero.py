"""Timelines of DeepSpeed's modes: ZeRO-1 to 3, and offload.

DeepSpeed steps an fp32 copy of this rank's part of the weights. It copies gradients into a bucket; a full one, and what
is left at the end of the pass, is added up among the ranks in one more copy.
"""

from trainer.plan.recorder import BACK, ENTERED, LEFT
from trainer.plan.timeline import Rank, Timeline, evaluate, rebuild, save

_FP32 = 4
_BUCKET_NUMEL = 500_000_000  # at most; trainer/zero.py makes it no larger than all gradients
_GATHERED_NUMEL = 1_000_000_000  # of gathered weights, ZeRO-3 keeps so many for what comes next


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
            if not rank.on_gpu:
                t.brief("buffers", [sum(rank.learning_bytes)])  # gloo gathers the new weights into a copy
            t.give(flat, *kept)
    save(t, rank, [part])
    rebuild(t, rank, copies=2)


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
    bucket = bucket_bytes(rank)
    if not offloads:
        t.take("weights", total // rank.world_size)
        t.take("weights", part)
        t.take("gradients", sum(rank.learning_bytes) // rank.world_size)
    held, kept_numel = [_gather(t, rank, rank.around)], 0
    for sizes in rank.layers:
        held.append(_gather(t, rank, sizes))
        kept_numel += sum(sizes) // rank.passes.itemsize
        if kept_numel > _GATHERED_NUMEL:
            t.give(*held.pop())
    evaluate(t, rank)
    for gathered in held:
        t.give(*gathered)
    with t.phase("step"):
        t.take("buffers", bucket)
        for step in rank.steps:
            _zero_3_pass(t, rank)
            # Averaged among the ranks in a copy; gloo makes one more.
            t.brief("buffers", [bucket] if rank.on_gpu else [bucket, bucket])
            if not offloads:
                flat = t.take("gradients", part)
                t.run(step, "buffers", "optimizer")
                t.give(flat)
    if not offloads:
        save(t, rank, [part])
        rebuild(t, rank)


def _zero_3_pass(t: Timeline, rank: Rank) -> None:
    """A layer's weights are gathered when it runs; so many stay until its backward pass is done."""
    gathered: dict[int, list[int]] = {}
    done: list[int] = []  # the layer whose backward pass runs
    kept_numel = 0

    def reached(place: int, layer: int) -> None:
        nonlocal kept_numel
        if place in (ENTERED, BACK) and layer not in gathered:
            gathered[layer] = _gather(t, rank, rank.layers[layer])
        if place == LEFT and not done:
            kept_numel += sum(rank.layers[layer]) // rank.passes.itemsize
            if kept_numel > _GATHERED_NUMEL:
                t.give(*gathered.pop(layer))
        if place == BACK:
            if done:
                t.give(*gathered.pop(done.pop(), []))
            done.append(layer)

    around = _gather(t, rank, rank.around)
    t.run(rank.passes.learning, "activations", "buffers", lambda block: True, reached)
    for blocks in (around, *gathered.values()):
        t.give(*blocks)


def _gather(t: Timeline, rank: Rank, sizes: list[int]) -> list[int]:
    """Each weight comes in a flat tensor, of which it is a copy; gloo gathers into one more."""
    gathered = []
    for size in sizes:
        flat = [t.take("buffers", size) for _ in range(1 if rank.on_gpu else 2)]
        t.give(*flat[1:])
        gathered.append(t.take("buffers", size))
        t.give(*flat)
    return gathered


def bucket_bytes(rank: Rank) -> int:
    return min(_BUCKET_NUMEL, rank.learning_numel) * rank.passes.itemsize
