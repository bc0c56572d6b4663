"""One thread steps the engine; asyncio code hands it requests and reads their tokens back. Read `_run` first.

Only that thread ever touches the engine. Everything else goes through an inbox, which it empties before each step.
"""

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from serving.request import FinishReason, Request

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 3  # steps in a row that failed, by an exception or by requests that end with an error
PAUSE_AFTER_FAILURE_S = 0.1  # an engine that cannot even cancel must not spin


class Steppable(Protocol):
    """What the driver needs of `serving.engine.Engine`."""

    @property
    def idle(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, request: Request) -> None: ...
    def step(self) -> list[Request]: ...


class Stopping(Exception):
    """The driver is draining or has ended: it takes no new requests."""


Event: TypeAlias = tuple[list[int], bool]


@dataclass(eq=False)
class _Channel:
    """The way back from the engine's thread to the event loop that waits for one request."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    num_sent: int = 0

    def take(self, request: Request) -> Event:
        """Return the ids that are new since the last call, and whether they are the last. Engine's thread only."""
        event = (request.output_ids[self.num_sent :], request.is_finished)
        self.num_sent = len(request.output_ids)
        return event


class Driver:
    """Runs an engine in a thread of its own, from `start` to `stop`."""

    def __init__(self, engine: Steppable) -> None:
        self.engine = engine
        self.draining = False
        self.num_failed_steps = 0  # in a row
        self._inbox: deque[Callable[[], None]] = deque()
        self._channels: dict[Request, _Channel] = {}  # of the live requests; changed by the engine's thread only
        self._readers: weakref.WeakKeyDictionary[Request, _Channel] = weakref.WeakKeyDictionary()  # not yet streamed
        self._wake = threading.Condition()
        self._stopping = False
        self._ended = False  # nobody reads the inbox any more
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step the engine."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is there to do work."""
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the thread is alive and its last steps did not all fail."""
        return self.alive and self.num_failed_steps < UNHEALTHY_AFTER

    @property
    def num_live(self) -> int:
        """The number of requests that are waiting or running."""
        return len(self._channels)

    # --- for asyncio -------------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> None:
        """Hand the request to the engine; read its tokens with `stream`.

        Raises what `Engine.add` raises (BadInput, QueueFull), and Stopping while draining or after the end.
        """
        channel = _Channel(asyncio.get_running_loop())
        accepted: asyncio.Future[None] = channel.loop.create_future()
        if self.draining or not self._tell(lambda: self._add(request, channel, accepted)):
            raise Stopping("the server is shutting down")
        try:
            await accepted
        except asyncio.CancelledError:  # the caller is gone, but the request is in the inbox or further already
            self.cancel(request)
            raise
        self._readers[request] = channel

    async def stream(self, request: Request) -> AsyncGenerator[list[int], None]:
        """Yield the new ids of a submitted request as steps produce them, until it is finished (`finish_reason`).

        Leaving early, or being cancelled, cancels the request. One request is streamed once.
        """
        channel = self._readers.pop(request)
        try:
            is_last = False
            while not is_last:
                ids, is_last = await channel.events.get()
                while not channel.events.empty():  # a reader that fell behind catches up in one go
                    more, is_last = channel.events.get_nowait()
                    ids += more
                if ids:
                    yield ids
        finally:
            if not request.is_finished:
                self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End the request before the next step, wherever it is; safe from any thread, and when it is finished."""
        self._tell(lambda: self._cancel(request))

    def cancel_all(self) -> None:
        """End every request that lives before the next step."""
        self._tell(lambda: self._end("cancelled", None))

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that live; return whether all of them finished in time."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (self._channels or self._inbox) and self.alive:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancel what is left and end the thread; returns when it has ended or after `timeout_s`."""
        self.draining = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                self._empty_inbox()
                if not self.engine.idle:
                    self._step()
        finally:
            with self._wake:
                self._stopping = self._ended = True
            self._end("cancelled", None)
            self._empty_inbox()  # whoever waits to be accepted is told that it is too late

    def _await_work(self) -> bool:
        """Sleep until there is something to do; return False when it is time to end."""
        with self._wake:
            while not (self._stopping or self._inbox or not self.engine.idle):
                self._wake.wait()
            return not self._stopping

    def _empty_inbox(self) -> None:
        while self._inbox:
            try:
                self._inbox[0]()
            except Exception:
                logger.exception("the engine could not give a request up")
            self._inbox.popleft()  # only now: `drain` must see a request in the inbox or among the live ones

    def _step(self) -> None:
        try:
            changed = self.engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self.num_failed_steps += 1
            self._end("error", f"the engine failed ({type(error).__name__})")
            time.sleep(PAUSE_AFTER_FAILURE_S)
            return
        if any(request.finish_reason == "error" for request in changed):
            self.num_failed_steps += 1
        elif changed:
            self.num_failed_steps = 0
        self._post(changed)

    def _post(self, requests: Iterable[Request]) -> None:
        """Send what is new of the requests to their readers, in one message to each event loop."""
        mail: dict[asyncio.AbstractEventLoop, list[tuple[_Channel, Event]]] = defaultdict(list)
        live = [request for request in requests if request in self._channels]
        for request in live:
            channel = self._channels[request]
            mail[channel.loop].append((channel, channel.take(request)))
        for loop, letters in mail.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(_deliver, letters)
        for request in live:
            if request.is_finished:
                del self._channels[request]

    def _add(self, request: Request, channel: _Channel, accepted: "asyncio.Future[None]") -> None:
        error: Exception | None = None
        try:
            if self._stopping:
                raise Stopping("the server is shutting down")
            self.engine.add(request)
            self._channels[request] = channel
        except Exception as reason:
            error = reason
        with contextlib.suppress(RuntimeError):
            channel.loop.call_soon_threadsafe(_resolve, accepted, error)

    def _cancel(self, request: Request) -> None:
        if request in self._channels and not request.is_finished:
            self.engine.cancel(request)
            self._post([request])

    def _end(self, reason: FinishReason, error: str | None) -> None:
        """Finish every request that lives, after a failure or at the end."""
        requests = list(self._channels)
        for request in requests:
            try:
                self.engine.cancel(request)
            except Exception:
                logger.exception("the engine could not give a request up")
            request.finish_reason, request.error = reason, error
        self._post(requests)

    def _tell(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run `command` before its next step; return False when it has ended."""
        with self._wake:
            if not self._ended:
                self._inbox.append(command)
                self._wake.notify()
            return not self._ended


def _deliver(letters: "list[tuple[_Channel, Event]]") -> None:
    for channel, event in letters:
        channel.events.put_nowait(event)


def _resolve(accepted: "asyncio.Future[None]", error: Exception | None) -> None:
    if accepted.done():
        return
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)
