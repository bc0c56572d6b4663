"""Differences of logits, judged: strictly, but for those behind a near tie between the experts of a mixture.

Where two experts lie so close that rounding decides which of them answers, the other answer is no mistake, though it
moves the logits there, and what is attended to from there on, by more than rounding does. Shape letters: T positions,
V vocabulary.
"""

import numpy as np

from serving.checks import Check, graded, graded_mean, max_abs_diff

# How close, as a share of the weight of the last expert that was chosen, and how far logits may lie apart then, as a
# share of their spread. Rounding was seen to turn over a choice at 3e-6 in fp32, which moved logits by 5e-2 (12 random
# layers, 8 of 64 experts); what is fed to the wrong expert moves them by more than 1.
EXPERT_TIES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2}
EXPERT_TIE_TOLERANCE = 3e-1
MOST_EXCUSED = 0.5  # of all positions, or one


class Differences:
    """Gathers how far logits lie from the source's."""

    def __init__(self, tolerance: float, spread: float, dtype: str) -> None:
        self._tolerance, self._tie = tolerance, EXPERT_TIES[dtype]
        self._largest_excused = max(tolerance, EXPERT_TIE_TOLERANCE * spread)
        self._strict: list[float] = []
        self._excused: list[float] = []
        self._squares, self._numbers = 0.0, 0

    def behind_tie(self, margins_T: np.ndarray | None, end: int) -> bool:
        """Return whether one of the first `end` tokens of a text was a near tie between experts."""
        return margins_T is not None and bool((margins_T[:end] < self._tie).any())

    def add(self, found_V: np.ndarray, expected_V: np.ndarray, *, behind_tie: bool) -> None:
        """Note the logits of one position."""
        difference = max_abs_diff(found_V, expected_V)
        if behind_tie and difference > self._tolerance:
            self._excused.append(difference)
            return
        self._strict.append(difference)
        self._squares += float(np.square(found_V - expected_V, dtype=np.float64).sum())
        self._numbers += expected_V.size

    @property
    def largest(self) -> float:
        """The largest of those that are judged strictly."""
        return max(self._strict, default=0.0)

    @property
    def largest_excused(self) -> float:
        """The largest of the others."""
        return max(self._excused, default=0.0)

    def check(self, rms_tolerance: float | None = None, **facts: int) -> Check:
        """Return the check of all, and of the root of the mean square where a tolerance for it is given."""
        near_ties = len(self._excused)
        if near_ties:
            facts["near_ties"] = facts.get("near_ties", 0) + near_ties
        check = graded(self.largest, self._tolerance, **facts)
        if rms_tolerance is not None:
            check = graded_mean(check, (self._squares / max(1, self._numbers)) ** 0.5, rms_tolerance)
        too_many = near_ties > max(1, MOST_EXCUSED * (near_ties + len(self._strict)))
        if self.largest_excused > self._largest_excused or too_many:
            found = f"{check['found']}; behind near ties of experts {near_ties} by up to {self.largest_excused:.2e}"
            check |= {"passed": False, "found": f"{found}, accepted {self._largest_excused:.2e}"}
        return check
