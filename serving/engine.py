"""Continuous batching: requests join and leave between steps, and each gets the same tokens alone or in a crowd.

Shape letters: N rows of a run, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.directory import BadInput
from serving.forward import Forward
from serving.loras import lora_index
from serving.manifest import proven_manifest
from serving.request import FinishReason, QueueFull, Request, Sampling
from serving.sampler import greedy, sample
from serving.scheduler import Scheduler, Work
from serving.session import Session

__all__ = ["Engine", "QueueFull"]

NEAR_TIE = 1e-4  # two fp32 logits closer than this may change places when the batch around them changes
DEFAULT_STEP_TOKENS = 128
DEFAULT_MAX_LENGTH = 2048

log = logging.getLogger(__name__)


class Engine:
    """A verified ONNX directory, ready to decode. Not thread-safe: one thread calls it.

    `manifest` is the directory's, `slots` how many requests run at a time, `max_length` the most tokens (prompt and
    output) of one request, `step_tokens` the token budget of a step (128, or the slots if those are more),
    `max_waiting` the limit of the waiting line. `observe` is called with each request and the logits its next token is
    picked from, valid during the call only.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        session: Session,
        *,
        slots: int = 8,
        max_length: int | None = None,
        step_tokens: int | None = None,
        max_waiting: int = 256,
        observe: Callable[[Request, np.ndarray], None] | None = None,
    ) -> None:
        context_length = manifest["context_length"]
        max_length = min(context_length, DEFAULT_MAX_LENGTH) if max_length is None else max_length
        _check_range("slots", slots, 1, 4096)
        step_tokens = max(DEFAULT_STEP_TOKENS, slots) if step_tokens is None else step_tokens
        _check_range("max_length", max_length, 2, context_length)
        _check_range("step_tokens", step_tokens, slots, 2**20)
        _check_range("max_waiting", max_waiting, 1, 2**20)
        self.manifest = manifest
        self.slots = slots
        self.max_length = max_length
        self._end_ids = frozenset(manifest["end_token_ids"])
        self._scheduler = Scheduler(slots, step_tokens, max_waiting)
        self._forward = Forward(session, manifest, slots, max_length)
        self._observe = observe

    @classmethod
    def open(
        cls, folder: str | Path, *, provider: str = "cpu", threads: int | None = None, **settings: Any
    ) -> "Engine":
        """Open an ONNX directory for serving; `settings` are the constructor's.

        Raises BadInput when the directory is no causal language model, is altered, or has no passed verification for
        this provider and this onnxruntime, and when the provider is not there.
        """
        folder = Path(folder)
        manifest = proven_manifest(folder, provider, "causal_lm")
        return cls(manifest, Session.open(folder, provider=provider, threads=threads), **settings)

    @property
    def waiting(self) -> int:
        """How many requests are in the line, without a slot."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._scheduler.kv_slots.slot_of)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return self.waiting == 0 and self.running == 0

    def add(self, request: Request) -> None:
        """Put a request in line. Raises BadInput for a prompt that cannot run, QueueFull when the line is full."""
        self.check(request)
        self._scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """End a waiting or running request; its slot is free at once. A finished one stays as it is."""
        if not request.is_finished:
            self._finish(request, "cancelled")

    def step(self) -> list[Request]:
        """Spend one token budget; return the requests that got a token or finished.

        Each run of the graph is a transaction: when it fails, its requests end with finish_reason "error" and nothing
        else is touched.
        """
        plan = self._scheduler.next_plan()
        changed = []
        if plan.decode:
            occupants = self._scheduler.kv_slots.occupants
            changed += self._transact(plan.decode, partial(self._forward.decode, plan.decode, occupants))
        for chunk in plan.chunks:
            changed += self._transact([chunk], partial(self._forward.chunk, chunk))
        return changed

    def run(self) -> None:
        """Step until idle."""
        while not self.idle:
            self.step()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling | Sequence[Sampling]) -> list[Request]:
        """Run the prompts to their end and return their requests in order; any number of them, the line permitting."""
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        requests = [
            Request(str(index), ids, each) for index, (ids, each) in enumerate(zip(prompts, samplings, strict=True))
        ]
        for request in requests:
            self.check(request)
        for request in requests:
            while True:
                try:
                    self.add(request)
                    break
                except QueueFull:
                    self.step()
        self.run()
        return requests

    # --- one step ----------------------------------------------------------------------------------------------------

    def _transact(self, works: list[Work], run: Callable[[], np.ndarray]) -> list[Request]:
        try:
            logits_NV = run()
        except Exception as error:
            log.exception("a run of the graph failed; its %d request(s) end with an error", len(works))
            return [self._fail(work.request, error) for work in works]
        return self._commit(works, logits_NV)

    def _commit(self, works: list[Work], logits_NV: np.ndarray) -> list[Request]:
        """Pick all tokens, then change the requests; return those that changed visibly."""
        try:
            token_ids = self._pick(works, logits_NV)
        except FloatingPointError as error:
            if len(works) == 1:
                log.error("request %s: %s", works[0].request.id, error)
                return [self._fail(works[0].request, error)]
            # Some row is not finite; its neighbours go on.
            return [
                each for work, row_V in zip(works, logits_NV, strict=True) for each in self._commit([work], row_V[None])
            ]
        changed = []
        for work, row_V, token_id in zip(works, logits_NV, token_ids, strict=True):
            reaches_end = work.reaches_end
            work.request.num_computed += work.num_tokens
            if reaches_end:
                self._append(work.request, token_id, row_V)
                changed.append(work.request)
        return changed

    def _pick(self, works: list[Work], logits_NV: np.ndarray) -> list[int]:
        token_ids = greedy(logits_NV).tolist()
        for row, work in enumerate(works):
            request = work.request
            if not request.sampling.is_greedy and work.reaches_end:
                token_ids[row] = sample(logits_NV[row], request.sampling, len(request.output_ids))
        return token_ids

    def _append(self, request: Request, token_id: int, logits_V: np.ndarray) -> None:
        """Give `request` its next token and end it where that token or its length says so."""
        if self._observe is not None:
            self._observe(request, logits_V)
        if request.sampling.is_greedy:
            request.near_ties += int(np.count_nonzero(logits_V > logits_V[token_id] - NEAR_TIE) > 1)
        request.output_ids.append(token_id)
        if token_id in self._end_ids and not request.sampling.ignore_end:
            self._finish(request, "stop")
        elif len(request.output_ids) >= self._limit(request):
            self._finish(request, "length")

    # --- one request -------------------------------------------------------------------------------------------------

    def _limit(self, request: Request) -> int:
        return min(request.sampling.max_new_tokens, self.max_length - len(request.prompt_ids))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.remove(request)
        request.finish_reason = reason

    def _fail(self, request: Request, error: Exception) -> Request:
        # The type only: a runtime's messages hold paths and internals, and this text may reach a client.
        request.error = f"the model failed on this request ({type(error).__name__}); the log has the details"
        self._finish(request, "error")
        return request

    def check(self, request: Request) -> None:
        assert not request.is_finished, f"request {request.id} has ended; make a new one"
        prompt_ids = request.prompt_ids
        if not prompt_ids:
            raise BadInput("prompt: is empty; accepted: one token or more")
        if len(prompt_ids) + 1 > self.max_length:
            raise BadInput(
                f"prompt: {len(prompt_ids)} tokens; accepted: at most {self.max_length - 1}, which leaves room for one "
                "new token; shorten it"
            )
        lora_index(self.manifest, request.lora)
        vocab_size = self.manifest["vocab_size"]
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            bad = next(each for each in prompt_ids if not 0 <= each < vocab_size)
            raise BadInput(f"prompt: token id {bad} is out of range; accepted: 0 to {vocab_size - 1}")


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise BadInput(f"{name}: {value!r} is out of range; accepted: a whole number from {lowest} to {highest}")
