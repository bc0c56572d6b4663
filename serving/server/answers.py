"""OpenAI's answer objects, as plain dictionaries: a whole answer, and the events of a stream."""

import time
import uuid
from typing import Any


class CompletionAnswer:
    """The answer to one /v1/completions request."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str) -> None:
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        return {**self._base, "object": self.kind, "choices": [self._choice(text, finish_reason)], "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events before the first text."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """Return the event for a piece of text."""
        return self._chunk([self._delta(text, None)])

    def last(self, finish_reason: str) -> dict[str, Any]:
        """Return the event that ends the text."""
        return self._chunk([self._delta("", finish_reason)])

    def counts(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the event of token counts, after the last one."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._base, "object": self.chunk_kind, "choices": choices}

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._choice(text, finish_reason)


class ChatAnswer(CompletionAnswer):
    """The answer to one /v1/chat/completions request."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk([self._with_delta({"role": "assistant", "content": ""}, None)])]

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._with_delta({"content": text} if text else {}, finish_reason)

    def _with_delta(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
