"""Every error that a client sees: OpenAI's shape, one sentence, nothing of the machine in it."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.directory import BadInput
from serving.driver import Stopping
from serving.request import QueueFull
from serving.request import Request as EngineRequest

RETRY_AFTER_S = "1"
CLIENT_GONE = 499  # nginx's number for a client that left before its answer
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error answer: HTTP status, sentence, the field at fault and a code that programs can look at."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON body in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP answer, with the headers that its status asks for."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = RETRY_AFTER_S
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def engine_failed() -> ApiError:
    """The answer to a request that the engine gave up; the reason is in the server's log."""
    return ApiError(500, "the engine failed while it worked on this request; it is safe to try again")


def check_ended_well(work: EngineRequest) -> None:
    """Raise ApiError for a finished request that the engine gave up or the server's end cut short."""
    if work.finish_reason == "error":
        raise engine_failed()
    if work.finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down; the answer is incomplete", code="shutting_down")


def to_api_error(error: Exception) -> ApiError | None:
    """Translate what the serving code raises on purpose; None for anything unexpected."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadInput):
        field = str(error).split(":", 1)[0]
        return ApiError(400, str(error), param=field if field.isidentifier() else None)
    if isinstance(error, Stopping):
        return ApiError(503, "the server is shutting down and takes no new requests", code="shutting_down")
    if isinstance(error, QueueFull):
        return ApiError(429, "the queue is full; try again in a moment", code="queue_full")
    return None


def status_of(error: Exception) -> int:
    """Return the HTTP status that the error leads to."""
    answer = to_api_error(error)
    return CLIENT_GONE if isinstance(error, ClientDisconnect) else 500 if answer is None else answer.status


def install(app: FastAPI) -> None:
    """Give the app handlers that turn every exception into an answer of this module."""

    async def expected(request: Request, error: Exception) -> JSONResponse:
        answer = to_api_error(error)
        assert answer is not None
        return answer.response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}").response()

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, and uvicorn logs it with its traceback.
        return ApiError(500, "internal error; the server's log has the reason").response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientDisconnect, gone)
    for kind in (ApiError, BadInput, QueueFull, Stopping):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
