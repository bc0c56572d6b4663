"""The rank that is killed, hangs, fails or refuses is named by the others: where it was, and why. Real processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import endings
from trainer import run_folder, status
from trainer.status import Place
from trainer.verdict import hang_block

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
HOST = socket.gethostname()
SHORT_S = 3


@pytest.fixture
def ranks(tmp_path, free_port):
    """Return a function that starts two ranks, the second with a fault; returns each one's code and what it said.

    Fails where they have not ended two minutes after the time limit.
    """
    (tmp_path / "run").mkdir()
    run_folder.write_status(tmp_path / "run", "running", code=None, step=4)

    def run(last: str, timeout_s: int = SHORT_S, *, in_group: bool = False) -> list[tuple[int, str]]:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        world["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or torch tells at length that the store went with rank 0
        environment = {**os.environ, **world, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if in_group:
            (tmp_path / "left").mkdir()
            environment[status.EXIT_FOLDER] = str(tmp_path / "left")
        command = [sys.executable, str(FOLDER / "watched.py"), str(tmp_path / "run"), last, str(timeout_s)]
        started = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            longest_s = timeout_s + 120
            first = started[0].communicate(timeout=longest_s)[0]
            if last == "hang_in_c":
                started[1].kill()  # as the agent does
            second = started[1].communicate(timeout=longest_s)[0]
            return [(started[0].returncode, first), (started[1].returncode, second)]
        finally:
            for process in started:
                process.kill()
                process.wait()

    return run


def said_of(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def test_a_rank_that_was_killed_is_named_with_host_phase_and_step(ranks):
    (code, said), (died, _) = ranks("kill")
    assert (code, died) == (1, -9)
    where = f"rank 1 was lost: host {HOST}, phase forward, step 7; no sign for "
    assert said.startswith(f"PeerLost: {where}")
    assert " s: killed, or its machine or network is gone; rank 0 waits in phase backward, step 7" in said
    assert said.endswith("; started again, the run goes on from step 4\n")
    assert said.count("\n") == 1


def test_a_rank_that_hangs_is_named_once_with_its_python_stack_and_the_run_ends(ranks, tmp_path):
    ended = ranks("hang")
    assert [code for code, _ in ended] == [1, 1]
    told = [text for _, text in ended if text]
    assert len(told) == 1, told
    first, headline, *stack = told[0].splitlines()
    assert first == (
        f"error: rank 1 hangs: host {HOST}, phase forward, step 7; it has not moved for {SHORT_S} s, and 1 other waits "
        "for it; raise run.timeout_s if that may take longer; started again, the run goes on from step 4"
    )
    assert headline == "Python stack of rank 1:"
    assert stack[-2].endswith("in hang")
    assert stack[-1] == "    time.sleep(3600)"
    assert "Python stack of rank 0" not in told[0]
    found = said_of(tmp_path)
    assert (found["state"], found["code"], found["step"]) == ("failed", 1, 4)
    assert found["reason"].startswith("rank 1 hangs: ")


def test_a_rank_that_holds_the_interpreter_is_named_with_its_stack_too(ranks, tmp_path):
    (code, said), _ = ranks("hang_in_c", in_group=True)
    assert (code, said) == (1, ""), "who is above tells"
    told = endings.error(tmp_path / "left", by_kernel=False)
    assert told.startswith(f"error: rank 1 hangs: host {HOST}, phase forward, step 7; ")
    assert "in hang_in_c" in told.partition("Python stack of rank 1:")[2]


def test_a_rank_that_failed_by_itself_is_named_with_its_error(ranks):
    (code, said), (failed, own) = ranks("fail")
    assert (code, failed) == (1, 1)
    assert own == "ValueError: this rank's own fault\n"
    where = f"host {HOST}, phase forward, step 7"
    assert said.startswith(f"PeerLost: rank 1 failed: {where}: ValueError: this rank's own fault; started again")


def test_what_one_rank_refuses_all_refuse(ranks):
    (code, said), (refused, _) = ranks("refuse")
    assert (code, refused) == (2, 2)
    assert said == f"BadInput: data.train: no such file; check the path (found on rank 1, host {HOST})\n"


# --- who hangs -------------------------------------------------------------------------------------------------------


def in_file(path: str) -> str:
    return f'  File "/app/trainer/loop.py", line 1, in train\n  File "/x{path}", line 2, in f\n    f()\n'


@pytest.mark.parametrize(
    ("moves", "innermost", "hanging"),
    [
        ([5, 4, 5], ["/torch/distributed/c10d.py"] * 3, [1]),
        ([4, 4, 4], ["/torch/distributed/c10d.py", "/app/data.py", "/torch/distributed/c10d.py"], [1]),
        ([4, 4, 4], ["/torch/autograd/graph.py", "/torch/distributed/c10d.py", "/app/data.py"], [2]),
        ([4, 4, 5], ["/app/data.py", "/app/data.py", "/torch/distributed/c10d.py"], [0, 1]),
        ([4, 4, 4], ["/torch/autograd/graph.py"] * 3, [0, 1, 2]),
        ([4, 4, 4], ["/torch/distributed/c10d.py", "", "/torch/distributed/c10d.py"], [1]),
    ],
)
def test_who_moved_least_hangs_and_among_equals_who_is_in_no_collective(moves, innermost, hanging):
    places = {rank: Place(rank, f"host-{rank}", "forward", 3, count) for rank, count in enumerate(moves)}
    stacks = {rank: in_file(path) for rank, path in enumerate(innermost) if path}
    first, *rest = hang_block(places, stacks, 600).splitlines()
    for rank in range(3):
        assert (f"rank {rank} hangs: host host-{rank}, phase forward, step 3" in first) == (rank in hanging)
        assert (f"Python stack of rank {rank}:" in rest) == (rank in hanging)
