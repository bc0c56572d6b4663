"""The timeline of FSDP2, as torch 2.13 does it: a rank keeps rows of each weight, gradient and moment."""

from trainer.plan.recorder import BACK, ENTERED, LEFT
from trainer.plan.timeline import Rank, Timeline, evaluate, rebuild, save

_AROUND = -1  # stands for a layer: the weights outside of them


def fsdp_2(t: Timeline, rank: Rank) -> None:
    """The weights of a layer are gathered while it runs, those around the layers for the whole pass."""
    n = rank.world_size
    for size in (*rank.learning_bytes, *rank.frozen_bytes):
        t.take("weights", size // n)
    with t.phase("rehearsal"):
        t.give(*_Pass(t, rank).run())
    with t.phase("evaluation"):
        held = [t.take("buffers", size) for size in (*rank.around, *max(rank.layers, key=sum, default=[]))]
    evaluate(t, rank)
    t.give(*held)
    with t.phase("step"):
        for step in rank.steps:
            gradients = _Pass(t, rank).run()
            if rank.accumulation > 1:
                t.give(*_Pass(t, rank).run())  # added to the first
            t.run(step, "buffers", "optimizer")
            t.give(*gradients)
    save(t, rank, [size // n for size in rank.learning_bytes])
    rebuild(t, rank)


class _Pass:
    """One pass forward and back: which layers are gathered, and which gradients wait for the others of their layer."""

    def __init__(self, t: Timeline, rank: Rank) -> None:
        self.t, self.rank = t, rank
        self.gathered: dict[int, list[int]] = {}
        self.waiting: dict[int, list[int]] = {_AROUND: []}
        self.kept: list[int] = []
        self.going_back = _AROUND  # the layer whose backward pass runs
        self.flat = t.take("buffers", 0)  # of the layer gathered last
        self.sent = t.take("buffers", 0)  # of the layer reduced last

    def run(self) -> list[int]:
        """Return the blocks of the gradients that this rank keeps."""
        self._gather(_AROUND)
        self.t.run(self.rank.passes.learning, "activations", "buffers", self._arrived, self._reached)
        self._end_layer()
        self._reduce(_AROUND)
        for blocks in (*self.gathered.values(), [self.flat, self.sent]):
            self.t.give(*blocks)
        return self.kept

    def _reached(self, place: int, layer: int) -> None:
        if place in (ENTERED, BACK) and layer not in self.gathered:
            self._gather(layer)
        if place == LEFT and layer != self.going_back:
            self.t.give(*self.gathered.pop(layer))
        if place == BACK:
            self._end_layer()
            self.going_back = layer

    def _arrived(self, block: int) -> bool:
        self.waiting.setdefault(self.going_back, []).append(block)
        return False

    def _end_layer(self) -> None:
        if self.going_back != _AROUND:
            self._reduce(self.going_back)
            self.t.give(*self.gathered.pop(self.going_back, []))
            self.going_back = _AROUND

    def _gather(self, layer: int) -> None:
        """The weights are copied out of a flat tensor, which stays until the next layer is gathered."""
        sizes = self.rank.around if layer == _AROUND else self.rank.layers[layer]
        flat = self.t.take("buffers", sum(sizes))
        if not self.rank.on_gpu:
            self.t.brief("buffers", [sum(sizes)])  # gloo's own
        self.t.give(self.flat)
        self.flat = flat
        self.gathered[layer] = [self.t.take("buffers", size) for size in sizes]

    def _reduce(self, layer: int) -> None:
        """Gradients are copied into a flat tensor, which stays until those of the next layer are; a part is kept."""
        waiting = self.waiting.pop(layer, [])
        size = sum(map(self.t.size_of, waiting))
        sent = self.t.take("buffers", size)
        self.t.give(*waiting)
        self.kept.append(self.t.take("gradients", size // self.rank.world_size))
        if not self.rank.on_gpu:
            self.t.brief("buffers", [size])  # gloo's own
        self.t.give(self.sent)
        self.sent = sent
