"""The server as a process: the port first, one line when it is ready, and a clean end by signals."""

import asyncio
import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from serving.directory import BadInput
from serving.server.auth import check_keys
from serving.server.run import _listen_for_signals, bind, serve
from serving.text import Text

REPOSITORY = Path(__file__).parents[3]
FAKE_SERVER = """
import runpy, sys
from serving.driver import Driver
from serving.server.app import build_app
from serving.server.run import bind, run
fakes = runpy.run_path(sys.argv[1])
engine = fakes["FakeEngine"](slots=int(sys.argv[4]))
engine.step_s = float(sys.argv[2])
driver = Driver(engine)
app = build_app(driver, fakes["make_text"](), fakes["MANIFEST"], name="fake")
with bind("127.0.0.1", 0) as listener:
    run(app, driver, listener, name="fake", drain_timeout_s=float(sys.argv[3]))
"""
ENDLESS = {"prompt": "x", "max_tokens": 1_000_000, "ignore_eos": True}


@contextlib.contextmanager
def process(*arguments: str):
    """Start a server process in a session of its own; yield it and its address once it is ready."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in started.stderr:
            if ready := re.fullmatch(r"serving \S+ at (http://\S+)\n", line):
                yield started, ready[1]
                break
        else:
            pytest.fail("the server did not get ready")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        started.stderr.close()


def fake_server(step_s: float = 0.0, drain_timeout_s: float = 10.0, slots: int = 2):
    conftest = str(Path(__file__).with_name("conftest.py"))
    return process("-c", FAKE_SERVER, conftest, str(step_s), str(drain_timeout_s), str(slots))


def members_of(group: int) -> list[str]:
    """The processes of a process group that are still there."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(str(process))
    return members


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_code_0_and_nothing_left(number):
    with fake_server() as (server, url):
        assert httpx.get(f"{url}/health").status_code == 200
        server.send_signal(number)
        assert server.wait(10) == 0
        assert members_of(server.pid) == []
        assert "Traceback" not in server.stderr.read()


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones():
    with fake_server(step_s=0.01) as (server, url):
        body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while httpx.get(f"{url}/health").status_code != 503:
                assert time.monotonic() < deadline
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert server.wait(10) == 0


def test_a_request_that_outlasts_the_drain_is_told_and_the_server_ends():
    with fake_server(step_s=0.01, drain_timeout_s=0.3) as (server, url):
        with httpx.stream("POST", f"{url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "shutting_down" in rest[-2]
        assert server.wait(10) == 0


def test_a_signal_arrives_though_the_pipe_that_wakes_the_loop_is_full():
    async def main() -> int:
        signals = asyncio.Queue()
        restore = _listen_for_signals(signals)
        try:
            for _ in range(5_000):  # each writes one byte; 300 to 500 fill the pipe while the loop is busy
                asyncio.get_running_loop().call_soon_threadsafe(int)
            os.kill(os.getpid(), signal.SIGTERM)
            return await asyncio.wait_for(signals.get(), 5)
        finally:
            restore()

    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal nobody takes must not end the tests
    try:
        assert asyncio.run(main()) == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former[0])
    assert signal.getsignal(signal.SIGINT) == former[1]


def read_until_closed(connections: list[socket.socket]) -> None:
    """Read and drop what the connections bring until all are closed."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                with contextlib.suppress(ConnectionResetError):
                    if key.fileobj.recv(2**16):
                        continue
                selector.unregister(key.fileobj)


def test_a_signal_is_not_lost_while_tokens_come_faster_than_they_are_sent():
    num_clients = 64
    body = json.dumps({**ENDLESS, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()
    with fake_server(drain_timeout_s=0.1, slots=num_clients) as (server, url), contextlib.ExitStack() as stack:
        address = url.removeprefix("http://").split(":")
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(num_clients)]
        for client in clients:
            client.sendall(request)
        reader = threading.Thread(target=read_until_closed, args=[clients])
        reader.start()
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(20) == 0
        finally:
            server.kill()
            reader.join()


def test_a_second_interrupt_ends_at_once():
    with (
        fake_server(step_s=0.01, drain_timeout_s=60) as (server, url),
        httpx.stream("POST", f"{url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=20) as response,
    ):
        lines = response.iter_lines()  # kept: the connection is closed with it
        next(lines)
        server.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(10) in (130, -signal.SIGINT)  # how Python ends on KeyboardInterrupt


def test_a_port_that_is_taken_is_named_before_the_model_is_looked_at(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=rf"127\.0\.0\.1:{port} .*--port"):
            serve(tmp_path / "no such model", port=port)


def test_two_servers_that_start_at_once_cannot_hold_one_port():
    with (
        bind("127.0.0.1", 0) as first,
        pytest.raises(BadInput, match="--port"),
        bind("127.0.0.1", first.getsockname()[1]),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "port", "names"),
    [
        ("127.0.0.1", 65536, "--port"),
        ("127.0.0.1", -1, "--port"),
        ("no.such.host.x", 0, "--host"),
        ("192.0.2.1", 0, "--host"),
    ],
)
def test_an_address_that_cannot_be_is_bad_input(host, port, names):
    with pytest.raises(BadInput, match=names), bind(host, port):
        pass


def test_a_missing_model_is_bad_input_and_frees_the_port(tmp_path):
    with pytest.raises(BadInput, match="no such model"):
        serve(tmp_path / "no such model", port=0)


def test_a_spoiled_file_is_named_as_such_before_anything_reads_it(onnx_copy):
    (onnx_copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: altered"):
        serve(onnx_copy, port=0)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: not JSON"):
        Text.open(onnx_copy)


def test_without_a_key_serve_answers_only_what_is_addressed_to_this_machine(onnx_dir):
    script = "import sys; from serving.server import serve; serve(sys.argv[1], port=0)"
    with process("-c", script, str(onnx_dir)) as (_, url):
        status = httpx.get(f"{url}/health", headers={"Host": "rebound.example"}).status_code
        assert (status, httpx.get(f"{url}/health").status_code) == (403, 200)


@pytest.mark.parametrize("keys", [[], [""], ["short"], ["has\nnewline12"], ["fine-key-123", " "]])
def test_keys_that_protect_nothing_are_bad_input(keys, tmp_path):
    with pytest.raises(BadInput, match="api_keys") as caught:
        serve(tmp_path, api_keys=keys)
    assert not any(key.strip() and key in str(caught.value) for key in keys)
    assert check_keys(None) == []
    assert check_keys([" fine-key-123\n"]) == ["fine-key-123"]
