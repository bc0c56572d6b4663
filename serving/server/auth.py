"""Who may ask: API keys for every path but those that are public by name, or this machine alone."""

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.directory import BadInput
from serving.server.errors import ApiError

_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d*)?", re.IGNORECASE)


class KeyGuard:
    """Refuses a request without a valid `Authorization: Bearer KEY`, before anything else sees it.

    It wraps the whole app, so that a route added later, or one that does not exist, is guarded too.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], public_paths: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]  # the keys themselves are not kept
        self._public_paths = frozenset(public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public_paths and not self._is_allowed(scope):
            refusal = ApiError(401, "a valid API key is needed: send the header Authorization: Bearer KEY")
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        found = _digest(key.strip())
        # Every key is compared, each in constant time: the time taken says nothing about the keys.
        matches = [hmac.compare_digest(found, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class HostGuard:
    """Refuses a request that is not addressed to this machine by a name of its own (localhost, 127.0.0.1, [::1]).

    A server without a key that listens on a loopback address trusts this machine, not every web page open on it: a
    page's own name can be made to resolve to 127.0.0.1, and its scripts would read the answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _LOCAL_HOST.fullmatch(Headers(scope=scope).get("host", "")):
            accepted = "localhost, 127.0.0.1, [::1]; for other names start the server with an API key"
            refusal = ApiError(403, f"the Host header names another machine; accepted: {accepted}")
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def check_keys(keys: Collection[str] | None) -> list[str]:
    """Return usable keys, none for None. Raises BadInput for keys that are asked for and then missing or empty."""
    if keys is None:
        return []
    stripped = [key.strip() for key in keys]
    if not stripped or not all(key.isascii() and key.isprintable() and len(key) >= 8 for key in stripped):
        raise BadInput("api_keys: each key must have 8 or more printable ASCII characters, and there must be one")
    return stripped


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
