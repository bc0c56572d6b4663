"""From an ONNX directory to a running HTTP server, and to its end: the port first, the model next, signals last."""

import asyncio
import contextlib
import errno
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from serving.directory import BadInput, read_manifest
from serving.driver import Driver
from serving.engine import Engine
from serving.generation_config import sampling_defaults
from serving.manifest import COMMANDS, without_endpoint
from serving.server.app import MAX_BODY_BYTES, build_app
from serving.server.auth import check_keys
from serving.task_engine import TaskEngine
from serving.text import Text

MAX_OPEN_CONNECTIONS = 2048
LAST_BYTES_S = 5  # after the drain, for answers that are on their way out


def serve(
    folder: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    api_keys: list[str] | None = None,
    provider: str = "cpu",
    max_waiting: int = 256,
    drain_timeout_s: float = 30.0,
    max_body_bytes: int = MAX_BODY_BYTES,
    **engine_options: Any,
) -> None:
    """Serve an ONNX directory over HTTP until SIGTERM or SIGINT; blocks.

    Port 0 takes a free one. When the server answers, one line "serving NAME at http://HOST:PORT" goes to stderr. The
    first signal drains: new requests get 503, running ones have `drain_timeout_s` to finish. A second SIGINT raises
    KeyboardInterrupt at once. `engine_options` go to the `open` of the task's engine. Raises BadInput.
    """
    keys = check_keys(api_keys)
    folder = Path(folder)
    name = name or folder.resolve().name
    with bind(host, port) as listener:
        # The engine checks the files' hashes before anything reads them.
        engine = _open_engine(folder, provider=provider, slots=slots, max_waiting=max_waiting, **engine_options)
        text = Text.open(folder)
        driver = Driver(engine)
        app = build_app(
            driver,
            text,
            engine.manifest,
            name=name,
            provider=provider,
            api_keys=keys,
            sampling_defaults=sampling_defaults(folder),
            max_body_bytes=max_body_bytes,
            local_only=not keys and _is_loopback(listener),
        )
        if not keys and not _is_loopback(listener):
            print(f"warning: {host} is reachable from other machines and no API key is set", file=sys.stderr)
        run(app, driver, listener, name=name, drain_timeout_s=drain_timeout_s)


def _open_engine(folder: Path, **settings: Any) -> Engine | TaskEngine:
    """Open the directory with the engine of its task. Raises BadInput, also for a task that has no endpoint."""
    manifest = read_manifest(folder, "onnx")
    task = manifest.get("task")
    if without := without_endpoint(manifest):
        raise BadInput(
            f"{folder}: its task is {without}, which has no endpoint; served are text generation and texts with one "
            f"label; use: {COMMANDS[task or '']} {shlex.quote(str(folder))}"
        )
    return TaskEngine.open(folder, **settings) if task == "classification" else Engine.open(folder, **settings)


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that holds the port, so that nothing slow is done for a port that is taken. Raises BadInput."""
    if not 0 <= port <= 65535:
        raise BadInput(f"port: {port} is out of range; accepted: --port 0 (a free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise BadInput(_no_address(host)) from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # Listening is what makes the port ours: with SO_REUSEADDR two sockets may be bound to it before.
            listener.listen(MAX_OPEN_CONNECTIONS)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise BadInput(_no_address(host)) from None
            reason = error.strerror or type(error).__name__
            raise BadInput(f"port: cannot listen on {host}:{port} ({reason}); choose another with --port") from None
        yield listener


def _no_address(host: str) -> str:
    return f"host: {host!r} is not an address of this machine; accepted: --host 127.0.0.1 or 0.0.0.0"


def run(app: FastAPI, driver: Driver, listener: socket.socket, *, name: str, drain_timeout_s: float) -> None:
    """Serve `app` on a bound socket until a signal; see `serve`. Starts the driver and stops it."""
    driver.start()
    try:
        asyncio.run(_serve_until_signal(app, driver, listener, name, drain_timeout_s))
    finally:
        driver.stop()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends by killing the process with the signal it got."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def build_server(app: FastAPI) -> uvicorn.Server:
    """Return the HTTP server for `app`; its `serve(sockets=[...])` ends when `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=MAX_OPEN_CONNECTIONS,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
    return _Server(config)


async def _serve_until_signal(
    app: FastAPI, driver: Driver, listener: socket.socket, name: str, drain_timeout_s: float
) -> None:
    server = build_server(app)
    signals: asyncio.Queue[int] = asyncio.Queue()
    restore_signals = _listen_for_signals(signals)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ended = asyncio.create_task(_drain_on_signal(signals, driver, server, drain_timeout_s))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if server.started:
        print(f"serving {name} at {_url(listener)}", file=sys.stderr, flush=True)
    try:
        await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        await serving
    finally:
        ended.cancel()
        restore_signals()


async def _drain_on_signal(
    signals: "asyncio.Queue[int]", driver: Driver, server: uvicorn.Server, timeout_s: float
) -> None:
    """Wait for a signal, let the running requests finish, then let the server end; a second one cuts it short."""
    await signals.get()
    driver.draining = True
    print("stopping: running requests may finish; once more to end now", file=sys.stderr, flush=True)
    draining = asyncio.create_task(driver.drain(timeout_s))
    again = asyncio.create_task(signals.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    driver.cancel_all()
    if again.done():
        server.force_exit = True
        if again.result() == signal.SIGINT:
            raise KeyboardInterrupt


def _listen_for_signals(signals: "asyncio.Queue[int]") -> Callable[[], None]:
    """Put each SIGTERM and SIGINT into `signals`; return what gives them back to their former handlers.

    Not by `loop.add_signal_handler`: its signals go through the pipe that wakes the loop, and are lost when the
    engine's thread has filled it. A call is queued first, and needs the pipe only to wake a loop that sleeps.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python does not allow it
        return lambda: None
    loop = asyncio.get_running_loop()

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(signals.put_nowait, number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    return restore


def _is_loopback(listener: socket.socket) -> bool:
    return listener.getsockname()[0].startswith("127.") or listener.getsockname()[0] == "::1"


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
