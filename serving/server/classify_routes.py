"""The endpoint of a classifier: POST /v1/classify."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serving.server import errors
from serving.server.schemas import ClassifyRequest
from serving.server.service import Service
from serving.server.streaming import unless_disconnected
from serving.task_engine import TaskRequest
from serving.tasks import Prediction, Row, encode_row

PATHS = ("/v1/classify",)


class ClassifyRoutes:
    """Labels and scores for one text or a list of them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.handlers = dict(zip(PATHS, (self.classify,), strict=True))

    async def classify(self, request: Request) -> Response:
        """Classify one text or several; the answers come in the order of the texts."""
        service = self._service
        with service.counting_refusals("classify"):
            body = await service.read(ClassifyRequest, request)
            service.check_model(body.model)
            rows = await asyncio.to_thread(self._encode, body.texts)
            work = TaskRequest(uuid4().hex, rows=[row.ids for row in rows])
            await service.driver.submit(work)
        num_tokens = sum(len(row.ids) for row in rows)
        await unless_disconnected(request.receive, self._finish(work, num_tokens))
        answer = {
            "object": "list",
            "model": service.name,
            "data": [self._item(index, row, work) for index, row in enumerate(rows)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return JSONResponse(answer)

    def _encode(self, texts: Sequence[str]) -> list[Row]:
        return [encode_row(self._service.text, self._service.manifest, text) for text in texts]

    async def _finish(self, work: TaskRequest, num_tokens: int) -> None:
        """Wait until every row has its logits. Raises ApiError when the engine failed or the server ended meanwhile."""
        service, started, status = self._service, time.monotonic(), errors.CLIENT_GONE
        try:
            async with contextlib.aclosing(service.driver.stream(work)) as steps:
                async for _ in steps:
                    pass
            errors.check_ended_well(work)
            status = 200
        except errors.ApiError as error:
            status = error.status
            raise
        finally:
            usage = {"prompt_tokens": num_tokens, "completion_tokens": 0}
            service.metrics.finished("classify", status, time.monotonic() - started, usage)

    def _item(self, index: int, row: Row, work: TaskRequest) -> dict[str, Any]:
        prediction = Prediction.of(work.logits[index], self._service.manifest["labels"])
        return {
            "index": index,
            "label": prediction.label,
            "score": prediction.score,
            "scores": prediction.scores,
            "truncated": row.truncated,
        }
