"""One chat question to a real `trivet serve` process over HTTP, by the standard library alone."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from launch.processes import python_module

START_TIMEOUT_S = 180.0  # a model of 500 MB is hashed and loaded first

Advance = Callable[[str], None]


@dataclass(frozen=True)
class ServedAnswer:
    """What came back from a real server process, and how it ended."""

    text: str
    pieces: int
    first_s: float
    exit_code: int


def ask_server(onnx_dir: Path, question: str, advance: Advance) -> ServedAnswer:
    """Start `trivet serve` on a free port, ask one chat question streaming, and stop it."""
    advance("starting")
    command = [*python_module("launch.cli"), "serve", str(onnx_dir), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    too_late = threading.Timer(START_TIMEOUT_S, server.kill)
    too_late.start()
    try:
        url = f"{_url(server)}/v1/chat/completions"
        advance("asking")
        started = time.perf_counter()
        pieces, first_s = [], 0.0
        for event in _events(url, {"messages": [{"role": "user", "content": question}], "max_tokens": 48}):
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first_s = first_s or time.perf_counter() - started
                pieces.append(event["choices"][0]["delta"]["content"])
        advance("stopping")
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=START_TIMEOUT_S)
        return ServedAnswer("".join(pieces), len(pieces), first_s, server.returncode)
    finally:
        too_late.cancel()
        server.kill()
        server.wait()


def _url(server: subprocess.Popen[str]) -> str:
    """Wait for the line that says where the server listens."""
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("serving "):
            return line.split()[-1]
    raise RuntimeError(f"the server ended before it was ready: {''.join(lines)[-500:]}")


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Post `body` for a streamed answer; yield its server-sent events."""
    request = Request(url, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"})
    direct = build_opener(ProxyHandler({}))  # the server is on this machine, whatever proxy the environment names
    with direct.open(request, timeout=START_TIMEOUT_S) as lines:
        for line in lines:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)
