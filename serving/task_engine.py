"""Requests of one or many texts -> answers: a text a step, the requests in turns, so that none waits for a long list.

It has the interface that the driver steps: see serving/driver.py, and serving/engine.py for the decoder's.
"""

import logging
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving.request import QueueFull, Request, Sampling
from serving.tasks import Classifier

log = logging.getLogger(__name__)


@dataclass(eq=False)
class TaskRequest(Request):
    """The rows of one request and, as they come, their logits. It has no prompt and generates nothing."""

    prompt_ids: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    rows: list[list[int]] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)


class TaskEngine:
    """A classifier behind a line. Not thread-safe: one thread calls it.

    `slots` requests take turns, at most `max_waiting` more stand in line.
    """

    def __init__(self, classifier: Classifier, *, slots: int = 8, max_waiting: int = 256) -> None:
        self.slots, self._max_waiting = slots, max_waiting
        self._classifier = classifier
        self._waiting: deque[Request] = deque()
        self._turns: deque[Request] = deque()

    @classmethod
    def open(
        cls, folder: str | Path, *, provider: str = "cpu", threads: int | None = None, **settings: Any
    ) -> "TaskEngine":
        """Open an ONNX directory for serving; `settings` are the constructor's. Raises BadInput."""
        return cls(Classifier.open(folder, provider=provider, threads=threads), **settings)

    @property
    def manifest(self) -> dict[str, Any]:
        """The directory's manifest."""
        return self._classifier.manifest

    @property
    def max_length(self) -> int:
        """Where a text is cut, in tokens."""
        return self.manifest["max_length"]

    @property
    def waiting(self) -> int:
        """How many requests are in the line, without a turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests take turns."""
        return len(self._turns)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self._waiting and not self._turns

    def add(self, request: Request) -> None:
        """Put a request in line. Raises QueueFull when the line is full."""
        assert isinstance(request, TaskRequest), f"{type(request).__name__} is not for this engine"
        assert request.rows, "a request without rows would never finish"
        if self.waiting + self.running >= self._max_waiting + self.slots:
            raise QueueFull
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request that waits or takes turns; a finished one stays as it is."""
        if request.is_finished:
            return
        for line in (self._waiting, self._turns):
            if request in line:
                line.remove(request)
        request.finish_reason = "cancelled"

    def step(self) -> list[Request]:
        """Answer one text of the request whose turn it is; return that request if it finished.

        When the model fails on a text, its request ends with finish_reason "error" and no other is touched.
        """
        while self._waiting and len(self._turns) < self.slots:
            self._turns.append(self._waiting.popleft())
        if not self._turns:
            return []
        request = self._turns[0]  # it keeps its place while it is worked on: other threads count them
        assert isinstance(request, TaskRequest)
        try:
            request.logits.append(self._classifier.logits(request.rows[len(request.logits)]))
        except Exception as error:
            log.exception("request %s: the model failed on text %d", request.id, len(request.logits))
            # The type only: a runtime's messages hold paths and internals, and this text may reach a client.
            request.error = f"the model failed on this request ({type(error).__name__}); the log has the details"
            request.finish_reason = "error"
        else:
            if len(request.logits) < len(request.rows):
                self._turns.rotate(-1)
                return []
            request.finish_reason = "stop"
        self._turns.popleft()
        return [request]
