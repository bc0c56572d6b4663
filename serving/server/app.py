"""The HTTP application: the endpoints of the served task, health, metrics and the playground page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from serving.driver import Driver
from serving.server import classify_routes, errors, generate_routes
from serving.server.auth import HostGuard, KeyGuard
from serving.server.classify_routes import ClassifyRoutes
from serving.server.errors import ApiError
from serving.server.generate_routes import GenerateRoutes
from serving.server.service import Service
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
# The endpoints of each task; those of the others answer with the way to these.
PATHS = {"causal_lm": generate_routes.PATHS, "classification": classify_routes.PATHS}


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
    service = Service(driver, text, manifest, name, provider, max_body_bytes)
    errors.install(app)
    app.add_api_route("/health", service.health)
    app.add_api_route("/metrics", service.show_metrics)
    app.add_api_route("/v1/models", service.models)
    is_classifier = service.task == "classification"
    routes = ClassifyRoutes(service) if is_classifier else GenerateRoutes(service, sampling_defaults or {})
    for path, handler in routes.handlers.items():
        app.add_api_route(path, handler, methods=["POST"])
    for path in sorted({path for paths in PATHS.values() for path in paths} - routes.handlers.keys()):
        app.add_api_route(path, _elsewhere(path, service), methods=["POST"])
    for path, (file_name, media_type) in PAGE.items():
        content = (Path(__file__).parent / "page" / file_name).read_bytes()
        app.add_api_route(path, _static(content, media_type))
    if api_keys:
        app.add_middleware(KeyGuard, keys=api_keys, public_paths=PUBLIC_PATHS)
    if local_only:
        app.add_middleware(HostGuard)
    return app


def _elsewhere(path: str, service: Service) -> Any:
    accepted = " or ".join(f"POST {path}" for path in PATHS[service.task])

    async def refuse() -> Response:
        message = f"{path}: {service.name} is a {service.task} model and has no such endpoint; use {accepted}"
        raise ApiError(404, message, code="wrong_task")

    return refuse


def _static(content: bytes, media_type: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page
