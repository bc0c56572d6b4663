"""One request from its sampling settings to the pieces of text that a client gets, streamed or not: the same pieces."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from serving.driver import Driver
from serving.request import MAX_NEW_TOKENS, Request, Sampling
from serving.server.errors import CLIENT_GONE, ApiError, check_ended_well
from serving.server.metrics import Metrics
from serving.server.schemas import ChatRequest, CompletionRequest
from serving.text import Stream, Text

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

GenerateBody = CompletionRequest | ChatRequest


def build_sampling(body: GenerateBody, defaults: Mapping[str, Any]) -> Sampling:
    """Return the engine's settings for a request; `defaults` are the model's own, from its generation_config.json."""
    asked = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "seed")}
    settings = {**defaults, **{name: value for name, value in asked.items() if value is not None}}
    if isinstance(body, ChatRequest):
        limit = body.max_completion_tokens or body.max_tokens or MAX_NEW_TOKENS  # the engine cuts at its context
    else:
        limit = body.max_tokens or COMPLETION_TOKENS
    return Sampling(max_new_tokens=limit, ignore_end=body.ignore_eos, **settings)


class StopMatcher:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    The stop string that is complete first wins; what might be the beginning of one is held back.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = stop_strings
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take the next piece; return the text that certainly comes before any stop string."""
        self._held += piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        size = len(self._held) - self._num_undecided()
        certain, self._held = self._held[:size], self._held[size:]
        return certain

    def finish(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        return "" if self.found else self._held

    def _num_undecided(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


class Generation:
    """A submitted request, the text that comes out of it, and its counts."""

    def __init__(
        self,
        request: Request,
        *,
        driver: Driver,
        text: Text,
        metrics: Metrics,
        endpoint: str,
        stop_strings: Sequence[str],
        end_token_ids: Sequence[int],
    ) -> None:
        self.request = request
        self.finish_reason: Literal["stop", "length"] = "length"
        self.num_tokens = 0
        self._driver, self._metrics, self._endpoint = driver, metrics, endpoint
        self._stream, self._stops = Stream(text), StopMatcher(stop_strings)
        self._hidden_ids = frozenset(() if request.sampling.ignore_end else end_token_ids)
        self._started = time.monotonic()

    @property
    def usage(self) -> dict[str, int]:
        """Return OpenAI's token counts."""
        num_prompt = len(self.request.prompt_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
        }

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the text as it becomes certain; at the end `finish_reason` and `usage` hold.

        Raises ApiError when the engine failed or the server ended meanwhile. Leaving early cancels the request.
        """
        status = CLIENT_GONE
        try:
            async with contextlib.aclosing(self._driver.stream(self.request)) as batches:
                async for ids in batches:
                    if piece := self._take(ids):
                        yield piece
                    if self._stops.found:
                        break
            if piece := self._end():
                yield piece
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            status = 500
            raise
        finally:
            self._metrics.finished(self._endpoint, status, time.monotonic() - self._started, self.usage)

    def cancel(self) -> None:
        """Give the request up, at whatever point it is."""
        self._driver.cancel(self.request)

    def _take(self, ids: list[int]) -> str:
        """Turn new ids into text, one by one: where a stop string completes, the rest is not counted."""
        if self.num_tokens == 0:
            self._metrics.first_token(self._endpoint, time.monotonic() - self._started)
        pieces = []
        for token_id in ids:
            self.num_tokens += 1
            if token_id not in self._hidden_ids:
                pieces.append(self._stops.push(self._stream.push(token_id)))
            if self._stops.found:
                break
        return "".join(pieces)

    def _end(self) -> str:
        """Return the text that was held back, and settle the finish reason."""
        tail = ""
        if not self._stops.found:
            check_ended_well(self.request)
            tail = self._stops.push(self._stream.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.found or self.request.finish_reason == "stop" else "length"
        return tail
