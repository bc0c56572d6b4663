"""What runs in the next step: one token budget, decode rows first, then chunks of waiting prompts. Plain Python.

There is no prefill phase and no decode phase: a request's `num_computed` catches up with its tokens. One token short
is a decode row (also the last token of a prompt); more is a chunk. Requests join and leave between steps.
"""

from collections import deque
from dataclasses import dataclass
from operator import attrgetter

from serving.kv_slots import KvSlots
from serving.request import QueueFull, Request


@dataclass(frozen=True)
class Work:
    """`num_tokens` of one request's next tokens, to be computed in row `slot`."""

    request: Request
    slot: int
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """True when this work computes the request's last known token, so that its logits give the next one."""
        return self.num_tokens == num_pending(self.request)


@dataclass(frozen=True)
class Plan:
    """One step: the decode rows, in the order of their slots, run as one batch; the chunks run one by one."""

    decode: list[Work]
    chunks: list[Work]


class Scheduler:
    """The waiting line and the rows of the cache.

    `step_tokens` must be at least the number of slots: then decode rows, at most `slots - 1` of them while a seated
    prompt is unfinished, never use up the budget, and every prompt moves in every step or waits behind one that does.
    """

    def __init__(self, num_slots: int, step_tokens: int, max_waiting: int) -> None:
        assert step_tokens >= num_slots, "a step must be able to hold one token of every slot"
        self.kv_slots = KvSlots(num_slots)
        self.waiting: deque[Request] = deque()
        self._step_tokens = step_tokens
        self._max_waiting = max_waiting

    def add(self, request: Request) -> None:
        """Put `request` at the end of the line. Raises QueueFull when the line is at its limit."""
        assert request not in self.kv_slots.slot_of, f"request {request.id} was already added"
        if len(self.waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, the most that max_waiting allows")
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take `request` out of its row or out of the line; does nothing when it is in neither."""
        if request in self.kv_slots.slot_of:
            self.kv_slots.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def next_plan(self) -> Plan:
        """Seat waiting requests in free rows and return the next step's work; chunks go to the oldest request first."""
        while self.waiting and self.kv_slots.has_free:
            self.kv_slots.take(self.waiting.popleft())
        pending = [(request, slot, num_pending(request)) for request, slot in self.kv_slots.slot_of.items()]
        decode = sorted(
            (Work(request, slot, 1) for request, slot, count in pending if count == 1), key=attrgetter("slot")
        )
        budget = self._step_tokens - len(decode)
        chunks = []
        for request, slot, count in pending:
            if count > 1 and budget > 0:
                chunks.append(Work(request, slot, min(count, budget)))
                budget -= chunks[-1].num_tokens
        return Plan(decode, chunks)


def num_pending(request: Request) -> int:
    """Return how many of the request's tokens have no keys and values yet."""
    return len(request.prompt_ids) + len(request.output_ids) - request.num_computed
