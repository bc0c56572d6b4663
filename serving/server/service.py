"""What the endpoints of every task share: the driver, the body's reading, health, metrics and the list of models."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serving.driver import Driver
from serving.server import errors
from serving.server.errors import ApiError
from serving.server.metrics import Metrics
from serving.server.schemas import Body, parse
from serving.text import Text


class Service:
    """One served directory. `name` is what clients call it."""

    def __init__(
        self, driver: Driver, text: Text, manifest: Mapping[str, Any], name: str, provider: str, max_body_bytes: int
    ) -> None:
        self.driver, self.text, self.manifest, self.name = driver, text, manifest, name
        self.metrics = Metrics(driver)
        self._provider, self._max_body_bytes = provider, max_body_bytes
        self._started = time.time()

    @property
    def task(self) -> str:
        """What the directory was exported for."""
        return self.manifest.get("task", "causal_lm")

    async def health(self) -> JSONResponse:
        """Tell whether a request sent now would be worked on; 503 when not."""
        able = "draining" if self.driver.draining else "ok"
        status = able if self.driver.healthy else "unhealthy"
        engine = self.driver.engine
        body = {
            "status": status,
            "model": self.name,
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
        return Response(self.metrics.render(), media_type=self.metrics.content_type)

    async def models(self) -> JSONResponse:
        """List the one model, with what the playground must know of it."""
        model = {
            "id": self.name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "trivet",
            "task": self.task,
            "context_length": self.driver.engine.max_length,
            "has_chat_template": self.text.has_chat_template,
            "labels": self.manifest.get("labels"),
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def read(self, model: type[Body], request: Request) -> Body:
        """Return the request in the body. Raises ApiError for one that is too large, no JSON, or bad in some field."""
        # A web page elsewhere can make a browser post text/plain here without asking; JSON it cannot.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the body is larger than {self._max_body_bytes} bytes")
        return parse(model, bytes(body))

    def check_model(self, asked: str | None) -> None:
        """Raise ApiError when a request names a model that is not served here."""
        if asked not in (None, self.name):
            message = f"model: {asked!a} is not served here; accepted: {self.name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    @contextlib.contextmanager
    def counting_refusals(self, endpoint: str) -> Iterator[None]:
        """Count in the metrics what the block raises."""
        try:
            yield
        except Exception as error:
            self.metrics.refused(endpoint, errors.status_of(error))
            raise
