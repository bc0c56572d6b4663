"""Run a check so that it cannot take the doctor with it: with a time-out, and native code in a process of its own."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from launch.doctor import repair
from launch.doctor.findings import Finding, collect, name_of

T = TypeVar("T")


def bounded(check: Callable[[], Iterable[Finding]], limit_s: float, fix: str = "") -> list[Finding]:
    """Return the findings of a check that may hang (a dead network drive, a name server that does not answer).

    After `limit_s` the check is left behind in its thread and reported; the thread does not keep the process alive.
    """
    findings: list[Finding] = []

    def look() -> None:
        findings.extend(collect([check], fix or repair.reinstall()))  # that reads metadata, which may hang too

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        hang = f"no answer within {limit_s:g} s: a drive or a service hangs"
        return [Finding(name_of(check), hang, "problem", fix or "mount; df -h  # which of them is it?")]
    return findings


def asked(question: Callable[[], T], otherwise: T, limit_s: float, fix: str = "") -> tuple[T, list[Finding]]:
    """Return the answer and no finding; of a question that breaks or hangs, `otherwise` and the finding about it."""
    answers: list[T] = []

    @functools.wraps(question)
    def check() -> list[Finding]:
        answers.append(question())
        return []

    findings = bounded(check, limit_s, fix)
    return (otherwise, findings) if findings else (answers[0], [])


def in_child(module: str, function: str, limit_s: float, **arguments: Any) -> list[Finding]:
    """Return the findings of `module.function(**arguments)`, run in a child process.

    Libraries with native code may hang or die where their wheels or drivers don't fit; then that is the finding.
    """
    call = json.dumps({"module": module, "function": function, "arguments": arguments})
    path = os.pathsep.join(filter(None, [str(repair.HOME), os.environ.get("PYTHONPATH")]))
    # -P: a folder of the same name where the user stands must not come first.
    command = [sys.executable, "-P", "-c", "from launch.doctor import apart; apart.answer()", call]
    env = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [Finding(function, f"no answer within {limit_s:g} s", "problem", repair.reinstall())]
    if done.returncode == 0:
        return [Finding(**fields) for fields in json.loads(done.stdout)]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        reason = f"killed by {signal.Signals(-done.returncode).name}: its libraries don't fit together or this machine"
    else:
        reason = said[-1].strip() if said else f"ended with exit code {done.returncode}"
    return [Finding(function, reason[:300], "problem", repair.reinstall())]


def answer() -> None:
    """Do, in the child, the call of the last argument, and write its findings to standard output as JSON."""
    report = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not come between
    call = json.loads(sys.argv[-1])
    findings = getattr(importlib.import_module(call["module"]), call["function"])(**call["arguments"])
    with os.fdopen(report, "w") as file:
        json.dump([dataclasses.asdict(finding) for finding in findings], file)
