"""How a group ended is told from what its ranks left, and after a failure the run is started again."""

import os
import signal
import socket
import time

import pytest

from launch import config_file, endings, processes, restarts
from serving import directory
from trainer import run_folder, status
from trainer.config import RunConfig

HOST = socket.gethostname()


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Return a function by which a rank leaves its place and, unless it was killed, its report."""
    monkeypatch.setenv(status.EXIT_FOLDER, str(tmp_path))

    def leave(rank: int, place: tuple[str, int], *report, shown_at: float = 0.0) -> None:
        monkeypatch.setenv("RANK", str(rank))
        here = status.Status()
        here.at(*place)
        here.close()
        os.utime(tmp_path / f"rank-{rank:06d}.started", (shown_at, shown_at))
        if report:
            status.report_exit(*report)

    return leave


def test_of_two_that_were_killed_the_first_is_named(left, tmp_path):
    left(0, ("backward", 7), shown_at=130.0)  # which the launcher ended 30 s later
    left(1, ("forward", 7), shown_at=100.0)
    assert endings.error(tmp_path, by_kernel=False).startswith(
        "error: rank 1 was killed from outside (kill -9), or the machine's memory ran out; "
        f"host {HOST}, phase forward, step 7; started again, the run goes on from its last checkpoint, if any"
    )


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([(1, "error: connection closed by peer"), None], "error: rank 1 was killed"),
        ([(1, "error: rank 1 was lost", status.LOST), None], "error: rank 1 was killed"),
        ([(1, "error: rank 1 was lost", status.LOST), (0,)], "error: rank 1 was lost"),
        ([None, (1, "error: a fault of its own")], "error: a fault of its own"),
        ([(1, "error: rank 1 hangs", status.HUNG), None], "error: rank 1 hangs"),
        ([(1, "error: rank 1 failed", status.LOST), (1, "error: a fault of its own")], "error: a fault of its own"),
        ([(0,), (0,)], ""),
    ],
)
def test_the_cause_is_told_and_not_what_follows_from_it(left, tmp_path, reports, said):
    for rank, report in enumerate(reports):
        left(rank, ("forward", 7), *(report or ()))
    found = endings.error(tmp_path, by_kernel=False)
    assert found.startswith(said) if said else not found


@pytest.mark.parametrize(
    ("place", "asked_to_stop", "leader_code", "expected"),
    [
        (("preparing", 0), True, -15, 75),
        (("preparing", 0), False, -15, 1),
        (("forward", 1), True, -9, 1),
        (("forward", 1), True, 0, 0),
    ],
)
def test_a_group_that_was_told_to_stop_before_its_first_step_has_stopped(
    left, tmp_path, place, asked_to_stop, leader_code, expected
):
    left(0, place)
    assert endings.exit_code(tmp_path, leader_code, asked_to_stop=asked_to_stop) == expected


@pytest.mark.parametrize(
    ("reports", "expected"), [([75, 75], 75), ([75, None], 1), ([75, 1], 1), ([75, 2], 2)], ids=str
)
def test_a_group_whose_ranks_all_saved_has_stopped_whatever_ended_them_after_that(left, tmp_path, reports, expected):
    for rank, code in enumerate(reports):
        left(rank, ("checkpoint", 7), *([] if code is None else [code]))
    assert endings.exit_code(tmp_path, 1, asked_to_stop=False) == expected


def test_a_signal_to_a_rank_before_it_has_begun_is_remembered(monkeypatch):
    from launch import train

    heard = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train.config_file, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(train, "train", lambda config, stop: heard.append(stop.signal_name) or 75)
    assert train.main(["run.yaml"]) == 75
    assert heard == ["SIGTERM"]


STUBBORN = """
import signal, time
from trainer import status
signal.signal(signal.SIGTERM, lambda *_: None)
here = status.Status()
here.at("checkpoint", 9)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_run_that_does_not_save_in_time_is_killed_and_it_is_said_where_it_was(script, on_path, tmp_path):
    with (tmp_path / "said").open("wb") as output, processes.Group(script(STUBBORN), {}, output=output) as group:
        while b"ready" not in (tmp_path / "said").read_bytes():
            time.sleep(0.05)
        told_at = time.monotonic()
        group.stop(signal.SIGTERM, 0.5)
        assert group.wait() == 1
        assert time.monotonic() - told_at < 0.5 + 120
        assert group.error() == (
            f"error: checkpoint.save_timeout_s: 0.5 s after SIGTERM the run had not stopped, and was killed (rank 0: "
            f"host {HOST}, phase checkpoint, step 9); started again, it goes on from its last checkpoint; raise "
            "checkpoint.save_timeout_s if a step and a checkpoint take longer"
        )


def test_a_run_goes_on_after_failures_as_often_as_asked_and_never_after_a_stop(script, on_path, tmp_path, capfd):
    tries = tmp_path / "tries"
    command = script(f"import sys\nopen({str(tries)!r}, 'a').write('x')\nsys.exit(1)")
    for limit in (0, 2):
        tries.write_text("")
        code = processes.run_group(
            command, {}, start_again=lambda failures, limit=limit: {} if failures <= limit else None
        )
        assert (code, tries.read_text()) == (1, "x" * (limit + 1))
    tries.write_text("")
    refusing = script(f"import sys\nopen({str(tries)!r}, 'a').write('x')\nsys.exit(2)")
    assert processes.run_group(refusing, {}, start_again=lambda failures: {}) == 2
    assert tries.read_text() == "x", "bad input stays bad"


def test_a_restart_takes_the_newest_checkpoint_only_if_this_run_has_saved_one(make_run, capfd):
    config, save = make_run
    save(2)
    start_again = restarts.again(config, 2)
    run_folder.write_status(config.run.folder, "running", code=None, step=2)
    assert start_again(1) == {}, "nothing was saved: what checkpoint.resume says still holds"
    assert run_folder.read_status(config.run.folder)["state"] == "failed"
    save(4)
    assert start_again(2) == {status.RESTARTS: "2"}
    assert start_again(3) is None


@pytest.fixture
def make_run(base_config, tmp_path):
    """A run, and a function that makes a checkpoint of it, as far as a restart looks at one."""
    config = config_file.load(base_config, [f"run.dir={tmp_path / 'runs'}"], RunConfig)
    config.run.folder.mkdir(parents=True)

    def save(step: int) -> None:
        folder = config.run.folder / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / directory.MANIFEST).write_text("{}")

    return config, save
