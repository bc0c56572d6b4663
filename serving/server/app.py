"""The HTTP endpoints: OpenAI's completions, chat and models; health, metrics and the playground page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serving import request as engine_request
from serving.driver import Driver
from serving.server import errors
from serving.server.answers import ChatAnswer, CompletionAnswer
from serving.server.auth import HostGuard, KeyGuard
from serving.server.errors import ApiError
from serving.server.generation import GenerateBody, Generation, build_sampling
from serving.server.metrics import Metrics
from serving.server.schemas import ChatRequest, CompletionRequest, parse
from serving.server.streaming import EventStream, unless_disconnected
from serving.text import Text

MAX_BODY_BYTES = 4 * 2**20
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
PUBLIC_PATHS = frozenset({"/health", *PAGE})
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def build_app(
    driver: Driver,
    text: Text,
    manifest: Mapping[str, Any],
    *,
    name: str,
    provider: str = "cpu",
    api_keys: list[str] | None = None,
    sampling_defaults: Mapping[str, Any] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    local_only: bool = False,
) -> FastAPI:
    """Return the app that serves the driver's engine under `name`. The caller starts and stops the driver.

    `sampling_defaults` (temperature, top_p, top_k) hold where a request says nothing. With `api_keys`, every path but
    PUBLIC_PATHS needs one of them. With `local_only`, only what is addressed to this machine itself is answered.
    """
    app = FastAPI(title="Trivet", docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(driver, text, manifest, name, provider, sampling_defaults or {}, max_body_bytes)
    errors.install(app)
    app.add_api_route("/health", service.health)
    app.add_api_route("/metrics", service.show_metrics)
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    for path, (file_name, media_type) in PAGE.items():
        content = (Path(__file__).parent / "page" / file_name).read_bytes()
        app.add_api_route(path, _static(content, media_type))
    if api_keys:
        app.add_middleware(KeyGuard, keys=api_keys, public_paths=PUBLIC_PATHS)
    if local_only:
        app.add_middleware(HostGuard)
    return app


class Service:
    """What the endpoints share, and the endpoints."""

    def __init__(
        self,
        driver: Driver,
        text: Text,
        manifest: Mapping[str, Any],
        name: str,
        provider: str,
        sampling_defaults: Mapping[str, Any],
        max_body_bytes: int,
    ) -> None:
        self._driver, self._text, self._name, self._provider = driver, text, name, provider
        self._end_token_ids = list(manifest.get("end_token_ids", []))
        self._sampling_defaults, self._max_body_bytes = sampling_defaults, max_body_bytes
        self._metrics = Metrics(driver)
        self._started = time.time()

    async def health(self) -> JSONResponse:
        """Tell whether a request sent now would be worked on; 503 when not."""
        able = "draining" if self._driver.draining else "ok"
        status = able if self._driver.healthy else "unhealthy"
        engine = self._driver.engine
        body = {
            "status": status,
            "model": self._name,
            "provider": self._provider,
            "slots": engine.slots,
            "running": engine.running,
            "waiting": engine.waiting,
            "context_length": engine.max_length,
            "uptime_s": round(time.time() - self._started, 1),
        }
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    async def show_metrics(self) -> Response:
        """Return the Prometheus metrics."""
        return Response(self._metrics.render(), media_type=self._metrics.content_type)

    async def models(self) -> JSONResponse:
        """List the one model, with what the playground must know of it."""
        model = {
            "id": self._name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "trivet",
            "context_length": self._driver.engine.max_length,
            "has_chat_template": self._text.has_chat_template,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """Continue a prompt."""
        with self._counting_refusals("completions"):
            body = parse(CompletionRequest, await self._read_body(request))
            prompt_ids = body.prompt
            if isinstance(prompt_ids, str):
                prompt_ids = await asyncio.to_thread(self._text.encode, prompt_ids)
            generation = await self._submit(body, prompt_ids, "completions")
        return await self._respond(request, body, generation, CompletionAnswer(self._name))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        with self._counting_refusals("chat"):
            body = parse(ChatRequest, await self._read_body(request))
            prompt_ids = await asyncio.to_thread(self._text.chat, [message.for_template() for message in body.messages])
            generation = await self._submit(body, prompt_ids, "chat")
        return await self._respond(request, body, generation, ChatAnswer(self._name))

    async def _submit(self, body: GenerateBody, prompt_ids: list[int], endpoint: str) -> Generation:
        if body.model not in (None, self._name):
            message = f"model: {body.model!a} is not served here; accepted: {self._name}"
            raise ApiError(404, message, param="model", code="model_not_found")
        work = engine_request.Request(uuid4().hex, prompt_ids, build_sampling(body, self._sampling_defaults))
        await self._driver.submit(work)
        return Generation(
            work,
            driver=self._driver,
            text=self._text,
            metrics=self._metrics,
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

    async def _read_body(self, request: Request) -> bytes:
        """Return the body, at most `max_body_bytes` of JSON."""
        # A web page elsewhere can make a browser post text/plain here without asking; JSON it cannot.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the body is larger than {self._max_body_bytes} bytes")
        return bytes(body)

    @contextlib.contextmanager
    def _counting_refusals(self, endpoint: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._metrics.refused(endpoint, errors.status_of(error))
            raise


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


def _static(content: bytes, media_type: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page
