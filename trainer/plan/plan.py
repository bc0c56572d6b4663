"""The plan of a mode: what one rank holds, and the most that is there at once."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.plan.recorder import Event

PASSES = ("rehearsal", "evaluation", "step")  # phases that grow with the rows of a pass
_ON_HOST = ("build", "checkpoint", "model")  # phases whose most is in the memory of the machine, where there is a GPU


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank. `most_by_phase`: at once, without the batch; `by_term`: of each term at its own most."""

    mode: str
    world_size: int
    rows: int  # of an optimizer step, on this rank
    micro_rows: int
    length: int
    batch_bytes: int
    by_term: dict[str, int]
    most_by_phase: dict[str, int]
    pass_bytes: Callable[[int, int], int]  # besides weights, gradients and batch: of so many rows of such a length
    precision: str = "fp32"
    on_gpu: bool = False
    beyond_bytes: int = 0  # of rows of a pass that were not run, as Recordings says
    host_bytes: int = 0  # what is offloaded
    events: list[Event] = field(repr=False, default_factory=list)

    @property
    def weights_bytes(self) -> int:
        return self.by_term["weights"]

    @property
    def gradients_bytes(self) -> int:
        return self.by_term["gradients"]

    @property
    def optimizer_bytes(self) -> int:
        return self.by_term["optimizer"]

    @property
    def logits_bytes(self) -> int:
        """The arrays as wide as the vocabulary; 0 where there is one logit row per text."""
        return self.by_term["logits"]

    @property
    def activations_bytes(self) -> int:
        """What else a forward pass and its backward pass make."""
        return self.by_term["activations"] + self.beyond_bytes

    @property
    def certain_bytes(self) -> int:
        """What is there in the optimizer's step, however the passes went."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def total_bytes(self) -> int:
        """The most at once, of what lies on the device."""
        return max(self.certain_bytes, self._besides_passes, self._in_passes)

    def total_of(self, *, micro_rows: int, length: int) -> int:
        """Return the most at once if passes had fewer rows, or shorter ones."""
        less = self.pass_bytes(self.micro_rows, self.length) - self.pass_bytes(micro_rows, length)
        batch = self.batch_bytes * micro_rows * length // (self.micro_rows * self.length)
        return batch - self.batch_bytes + max(self.certain_bytes, self._besides_passes, self._in_passes - less)

    @property
    def _in_passes(self) -> int:
        return self.batch_bytes + self.beyond_bytes + max(self.most_by_phase.get(phase, 0) for phase in PASSES)

    @property
    def _besides_passes(self) -> int:
        leave_out = (*PASSES, *(_ON_HOST if self.on_gpu else ()))
        return self.batch_bytes + max((n for name, n in self.most_by_phase.items() if name not in leave_out), default=0)
