"""The endpoints of a decoder for text: OpenAI's completions and chat."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serving import request as engine_request
from serving.server.answers import ChatAnswer, CompletionAnswer
from serving.server.errors import ApiError
from serving.server.generation import GenerateBody, Generation, build_sampling
from serving.server.schemas import ChatRequest, CompletionRequest
from serving.server.service import Service
from serving.server.streaming import EventStream, unless_disconnected

PATHS = ("/v1/completions", "/v1/chat/completions")


class GenerateRoutes:
    """`sampling_defaults` (temperature, top_p, top_k) hold where a request says nothing."""

    def __init__(self, service: Service, sampling_defaults: Mapping[str, Any]) -> None:
        self._service, self._sampling_defaults = service, sampling_defaults
        self._end_token_ids = list(service.manifest.get("end_token_ids", []))
        self.handlers = dict(zip(PATHS, (self.completions, self.chat), strict=True))

    async def completions(self, request: Request) -> Response:
        """Continue a prompt."""
        service = self._service
        with service.counting_refusals("completions"):
            body = await service.read(CompletionRequest, request)
            prompt_ids = body.prompt
            if isinstance(prompt_ids, str):
                prompt_ids = await asyncio.to_thread(service.text.encode, prompt_ids)
            generation = await self._submit(body, prompt_ids, "completions")
        return await self._respond(request, body, generation, CompletionAnswer(service.name))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        service = self._service
        with service.counting_refusals("chat"):
            body = await service.read(ChatRequest, request)
            messages = [message.for_template() for message in body.messages]
            prompt_ids = await asyncio.to_thread(service.text.chat, messages)
            generation = await self._submit(body, prompt_ids, "chat")
        return await self._respond(request, body, generation, ChatAnswer(service.name))

    async def _submit(self, body: GenerateBody, prompt_ids: list[int], endpoint: str) -> Generation:
        service = self._service
        service.check_model(body.model)
        work = engine_request.Request(uuid4().hex, prompt_ids, build_sampling(body, self._sampling_defaults))
        await service.driver.submit(work)
        return Generation(
            work,
            driver=service.driver,
            text=service.text,
            metrics=service.metrics,
            endpoint=endpoint,
            stop_strings=body.stop_strings,
            end_token_ids=self._end_token_ids,
        )

    async def _respond(
        self, request: Request, body: GenerateBody, generation: Generation, answer: CompletionAnswer
    ) -> Response:
        if body.stream:
            return EventStream(_events(generation, answer, body.include_usage), on_end=generation.cancel)
        text = await unless_disconnected(request.receive, _collect(generation))
        return JSONResponse(answer.whole(text, generation.finish_reason, generation.usage))


async def _collect(generation: Generation) -> str:
    return "".join([piece async for piece in generation.pieces()])


async def _events(
    generation: Generation, answer: CompletionAnswer, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    for event in answer.opening():
        yield event
    try:
        async with contextlib.aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                yield answer.piece(piece)
    except ApiError as error:
        yield error.body()  # the status 200 is sent already; OpenAI's clients raise on such an event
        return
    yield answer.last(generation.finish_reason)
    if include_usage:
        yield answer.counts(generation.usage)
