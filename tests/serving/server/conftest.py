"""A fake engine with tokens known beforehand, and real HTTP servers over it."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serving.directory import BadInput
from serving.driver import Driver
from serving.request import QueueFull, Request
from serving.server.app import build_app
from serving.server.run import bind, build_server
from serving.text import Text

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
REPLY = "Hello wörld, 🙂 the end."
END_ID = 0
MANIFEST = {"end_token_ids": [END_ID]}


def make_text(template: str | None = TEMPLATE) -> Text:
    """A tokenizer with one id a byte, after four special tokens: a character like ö or 🙂 takes several ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The end token is none of the special ones, as in some real models: hiding it is the server's work.
    tokenizer.add_tokens([AddedToken(token, special=token != "<|end|>") for token in SPECIALS])
    return Text(tokenizer.to_str(), {}, template)


class FakeEngine:
    """The engine's interface without a model: every request gets `reply_ids`, one id a step, over and over."""

    def __init__(self, slots: int = 2, max_length: int = 200, max_waiting: int = 4) -> None:
        self.slots, self.max_length, self._max_waiting = slots, max_length, max_waiting
        self.reply_ids = [*make_text().encode(REPLY), END_ID]
        self.step_s = 0.0
        self.step_errors: list[Exception] = []  # raised by the next steps
        self.cancelled: list[Request] = []
        self.threads: set[int] = set()  # that touched the engine
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        if len(request.prompt_ids) + 1 > self.max_length:
            raise BadInput(f"prompt: has {len(request.prompt_ids)} tokens; accepted: up to {self.max_length - 1}")
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        for requests in (self._waiting, self._running):
            if request in requests:
                requests.remove(request)
        request.finish_reason = "cancelled"
        self.cancelled.append(request)

    def step(self) -> list[Request]:
        self.threads.add(threading.get_ident())
        time.sleep(self.step_s)
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
        if self.step_errors:
            raise self.step_errors.pop(0)
        changed = list(self._running)
        for request in changed:
            request.output_ids.append(self.reply_ids[len(request.output_ids) % len(self.reply_ids)])
            if request.output_ids[-1] == END_ID and not request.sampling.ignore_end:
                request.finish_reason = "stop"
            elif len(request.output_ids) >= request.sampling.max_new_tokens:
                request.finish_reason = "length"
        self._running = [request for request in self._running if not request.is_finished]
        return changed


@dataclass
class Served:
    """A running server: its address and what is behind it."""

    url: str
    port: int
    engine: FakeEngine
    driver: Driver


@contextlib.contextmanager
def run_server(
    engine: FakeEngine, text: Text | None = None, manifest: dict | None = None, **options
) -> Iterator[Served]:
    """Serve `engine` over real HTTP from a thread of this process."""
    driver = Driver(engine)
    app = build_app(driver, text or make_text(), manifest or MANIFEST, name="fake", **options)
    server = build_server(app)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        driver.start()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{port}", port, engine, driver)
        finally:
            driver.stop()
            server.should_exit = True
            thread.join()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def served(engine) -> Iterator[Served]:
    with run_server(engine) as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One server for the tests of a file that leave nothing behind in it."""
    with run_server(FakeEngine()) as running:
        yield running


@pytest.fixture
def serve_with():
    """`run_server`, for tests that need other settings."""
    return run_server


@pytest.fixture
def text() -> Text:
    return make_text()


@pytest.fixture
def reply() -> str:
    return REPLY


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def eventually():
    """Return a function that waits until a condition holds, and fails when it does not within seconds."""

    def wait(condition, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    return wait
