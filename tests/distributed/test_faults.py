"""`trivet train` whose ranks are killed, hang, fail or are told to stop: told in one block, and gone on with."""

import errno
import json
import os
import signal
import socket
import threading
import time

import pytest

from launch import processes

STEPS, SAVED_AT, TIMEOUT_S = 8, 2, 10
ROUNDING = 1e-5  # as in conftest.py
HOST = socket.gethostname()


@pytest.fixture
def faulty(modes, trivet, monkeypatch, tmp_path):
    """Return a function that calls `trivet train` with faults to come; returns its code and what it said itself."""

    def run(path, faults, *arguments) -> tuple[int, str]:
        compose = processes.accelerate_command

        def composed(*args, **kwargs):
            argv, env = compose(*args, **kwargs)
            at = argv.index("launch.train")
            return [*argv[: at - 1], str(modes.script("faulty.py")), *argv[at + 1 :]], env

        monkeypatch.setattr(processes, "accelerate_command", composed)
        monkeypatch.setenv("FAULTS", json.dumps(faults))
        monkeypatch.setenv("FAULT_FOLDER", str(tmp_path))
        for name, value in modes.environment().items():
            monkeypatch.setenv(name, value)
        code, _, err = trivet("train", path, "--nproc", 2, *arguments)
        return code, err

    return run


def status_of(modes, name: str) -> dict:
    return json.loads((modes.run_folder(name) / "status.json").read_text())


def blocks_of(said: str) -> list[list[str]]:
    """What `trivet` says of each failure: from its line to the next one that says that it goes on."""
    found = []
    for line in said.splitlines():
        if line.startswith("error: "):
            found.append([line])
        elif found and not line.startswith(("restart ", "leaks: ")):
            found[-1].append(line)
    return found


@pytest.mark.slow
def test_whatever_befalls_a_rank_is_told_in_one_block_and_the_run_goes_on_to_the_end(faulty, modes):
    settings = {"run": {"steps": STEPS, "timeout_s": TIMEOUT_S}, "checkpoint": {"every": SAVED_AT}}
    faults = [
        {"rank": 1, "phase": "backward", "step": 4, "do": "kill"},
        {"rank": 1, "phase": "forward", "step": 6, "do": "hang"},
        {"rank": 0, "phase": "data", "step": 7, "do": "hang_in_c"},
        {"rank": 1, "phase": "update", "step": 8, "do": "fail"},
    ]
    code, said = faulty(modes.config("faulty", **settings), faults, "--max-restarts", len(faults))
    assert code == 0, said[-3000:]
    assert [line for line in said.splitlines() if line.startswith("restart ")] == [
        f"restart {number} of 4: the run goes on from its last checkpoint" for number in (1, 2, 3, 4)
    ]
    killed, hung, holding, failed = blocks_of(said)
    assert killed[0].startswith(
        "error: rank 1 was killed from outside (kill -9), or the machine's memory ran out; "
        f"host {HOST}, phase backward, step 4; started again, the run goes on from its last checkpoint, if any"
    )
    assert hung[0].startswith(f"error: rank 1 hangs: host {HOST}, phase forward, step 6; it has not moved for")
    assert hung[0].endswith("and 1 other waits for it; raise run.timeout_s if that may take longer; started again, the "
                            "run goes on from step 4")  # fmt: skip
    assert hung[1] == "Python stack of rank 1:"
    assert "    time.sleep(3600)" in hung
    assert holding[0].startswith(f"error: rank 0 hangs: host {HOST}, phase data, step 7; it has not moved for")
    assert any("in hang_in_c" in line for line in holding)
    assert failed[0] == "error: this rank's own fault"
    alone = modes.alone("alone-faulty", run={"steps": STEPS}, checkpoint={"every": SAVED_AT})
    modes.check_same_numbers("faulty", alone)
    assert status_of(modes, "faulty")["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_trivet_saves_once_on_all_ranks_and_returns_75(faulty, modes, number):
    path = modes.config(f"told-{number.name}", run={"steps": 4000})
    with told(modes, f"told-{number.name}", number):
        code, said = faulty(path, [])
    found = status_of(modes, f"told-{number.name}")
    assert (code, found["state"], found["code"]) == (75, "stopped", 75), said[-3000:]
    assert found["reason"] == f"stopped by {number.name}"
    assert said.count(f"stopped at step {found['step']}; start it again to go on") == 1
    assert modes.checkpoint(f"told-{number.name}", found["step"]).is_dir()


@pytest.mark.slow
def test_a_signal_to_one_rank_is_named_in_status_json_and_trivet_returns_75(faulty, modes):
    fault = {"rank": 1, "phase": "forward", "step": 3, "do": "be_told"}
    code, said = faulty(modes.config("told-one", run={"steps": 4000}), [fault], "--max-restarts", 2)
    assert code == 75, said[-3000:]
    assert "restart" not in said, "who is told to stop is not started again"
    found = status_of(modes, "told-one")
    assert {key: found[key] for key in ("state", "code", "step", "reason")} == {
        "state": "stopped", "code": 75, "step": 3, "reason": "stopped by a signal to rank 1",
    }  # fmt: skip


@pytest.mark.slow
def test_why_another_rank_could_not_write_its_part_of_a_checkpoint_is_told(faulty, modes):
    fault = {"rank": 1, "phase": "checkpoint", "step": 4, "do": "find_no_room"}
    code, said = faulty(modes.config("no-room", run={"steps": STEPS}, checkpoint={"every": SAVED_AT}), [fault])
    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    for told in (*errors, status_of(modes, "no-room")["reason"]):
        assert f"the checkpoint of step 4 cannot be written (rank 1, host {HOST}: " in told
        assert os.strerror(errno.EFBIG) in told
    assert errors[-1].endswith("; mend that; started again, the run goes on from step 2")


@pytest.mark.slow
def test_a_second_signal_while_the_interpreter_ends_takes_nothing_back(faulty, modes):
    fault = {"rank": 1, "phase": "forward", "step": 3, "do": "end_slowly"}
    code, said = faulty(modes.config("told-twice", run={"steps": 4000}), [fault])
    assert (code, status_of(modes, "told-twice")["state"]) == (75, "stopped"), said[-3000:]


@pytest.mark.slow
def test_a_save_that_takes_too_long_is_ended_and_where_the_ranks_were_is_told(faulty, modes):
    path = modes.config("dawdles", run={"steps": 4000}, checkpoint={"every": 5000, "save_timeout_s": 3})
    with told(modes, "dawdles", signal.SIGTERM):
        code, said = faulty(path, [{"rank": 0, "phase": "checkpoint", "do": "dawdle"}], "--max-restarts", 1)
    assert code == 1
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: checkpoint.save_timeout_s: 3 s after SIGTERM the run had not stopped, and was kill")
    assert f"rank 0: host {HOST}, phase checkpoint, step " in error
    assert "restart" not in said


class told:
    """While open, this process, which is `trivet` here, gets a signal once the run has taken three steps."""

    def __init__(self, modes, name: str, number: signal.Signals) -> None:
        self._file, self._number = modes.run_folder(name) / "metrics.jsonl", number
        self._thread = threading.Thread(target=self._tell)
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tell(self) -> None:
        while not self._ended.is_set():
            if self._file.exists() and self._file.read_text().count('"train"') >= 3:
                os.kill(os.getpid(), self._number)
                return
            time.sleep(0.1)
