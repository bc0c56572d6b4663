"""Two machines, stood for by two launches on the loopback: a rank that dies on one is named on both, and both go on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import process_marks

STEPS = 300
LONGEST_S = 600


@pytest.mark.slow
def test_a_rank_killed_on_one_machine_is_named_on_both_and_both_go_on(modes, tmp_path, free_port):
    path = modes.config("two-machines", run={"steps": STEPS, "timeout_s": 60}, checkpoint={"every": 2})
    logs, started = [tmp_path / f"machine-{rank}.log" for rank in (0, 1)], []
    try:
        for rank, log in enumerate(logs):
            place = ["--nodes", "2", "--machine-rank", str(rank), "--main-address", f"127.0.0.1:{free_port}"]
            command = [sys.executable, "-m", "trivet", "train", str(path), *place, "--max-restarts", "1"]
            environment = {**os.environ, **modes.environment(), "TRIVET_TEST_MACHINE": f"{tmp_path}-{rank}"}
            with log.open("wb") as output:
                pipes = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": tmp_path}
                started.append(subprocess.Popen(command, env=environment, **pipes))
        checkpoints = modes.run_folder("two-machines") / "checkpoints"
        wait_for(lambda: any(checkpoints.glob("step-*")))
        [victim] = process_marks.ranks(process_marks.marked(f"TRIVET_TEST_MACHINE={tmp_path}-1"))
        os.kill(victim, signal.SIGKILL)
        codes = [process.wait(timeout=LONGEST_S) for process in started]
    finally:
        for process, rank in zip(started, (0, 1), strict=True):
            process_marks.kill_marked(f"TRIVET_TEST_MACHINE={tmp_path}-{rank}")
            process.wait()
    first, second = (log.read_text() for log in logs)
    assert codes == [0, 0], first[-3000:] + second[-3000:]
    assert "error: rank 1 was killed from outside (kill -9), or the machine's memory ran out; host " in second
    assert "error: rank 1 was lost: host " in first
    for said in (first, second):
        assert said.count("restart 1 of 1: the run goes on from its last checkpoint") == 1
    assert len(modes.lines("two-machines", "train")) == STEPS
    assert (modes.run_folder("two-machines") / "model").is_dir()


def wait_for(condition) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
