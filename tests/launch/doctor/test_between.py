"""What the doctor says about the network, the clocks and the folder between ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.doctor import ranks

ROOT = Path(__file__).resolve().parents[3]
HOSTS = ["alpha", "alpha", "beta"]


@pytest.mark.slow
def test_two_processes_of_this_machine_measure_what_is_between_them(tmp_path):
    command = [sys.executable, "-m", "trivet", "doctor", "--nproc", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["healthy"]
    found = {row["subject"]: row for row in said["findings"]}
    assert list(found) == ["ranks", "all-reduce latency", "all-reduce bandwidth", "clocks", "shared folder"]
    assert {row["area"] for row in said["findings"]} == {"between ranks"}
    assert found["ranks"]["value"] == 2
    assert found["all-reduce latency"]["value"] > 0
    assert found["all-reduce bandwidth"]["value"] > 0
    assert abs(found["clocks"]["value"]) < ranks.CLOCK_NOTE_S  # it is one clock
    assert found["shared folder"]["found"] == f"{tmp_path} is seen by all ranks, with locks"
    assert not list(tmp_path.iterdir())


def test_ranks_that_reach_the_main_port_and_not_each_other_are_a_problem_with_its_mend(tmp_path, free_port):
    program = "import sys; from launch.doctor import ranks; ranks.MEET_WITHIN_S = 1; sys.exit(ranks.main())"
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **place}
    report = tmp_path / "findings.json"
    command = [sys.executable, "-c", program, str(report), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    [finding] = json.loads(report.read_text())
    assert finding["state"] == "problem"
    assert finding["found"].startswith("they do not reach each other within 1 s (")
    assert "ports above 1023" in finding["fix"]


@pytest.mark.parametrize(
    ("offsets_s", "state", "said"),
    [
        ([0.0, 0.01, -0.05], "ok", "50 ms apart at most"),
        ([0.0, 0.0, -0.5], "note", "500 ms apart at most, between alpha and beta"),
        ([0.0, 0.0, 7200.0], "problem", "7200000 ms apart at most, between alpha and beta"),
    ],
)
def test_clocks_that_differ_are_named_by_their_machines(offsets_s, state, said):
    finding = ranks.clock_finding(offsets_s, HOSTS)
    assert finding.state == state
    assert finding.found.startswith(said)
    assert bool(finding.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("seen", "kept_out", "state", "said"),
    [
        ([True] * 3, [True] * 3, "ok", "/shared is seen by all ranks, with locks"),
        ([True, True, False], [True] * 3, "problem", "/shared: a file made on alpha is not on beta"),
        ([True] * 3, [True, True, False], "note", "/shared is seen by all, yet a lock of alpha lets beta in"),
    ],
)
def test_a_folder_that_is_not_shared_or_has_no_locks_is_named_with_the_machine(seen, kept_out, state, said):
    [finding] = ranks.folder_findings(Path("/shared"), HOSTS, seen, kept_out)
    assert finding.state == state
    assert finding.found.startswith(said)


def test_a_file_is_seen_by_its_content_and_its_lock_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SEEN_WITHIN_S", 0.3)
    path = tmp_path / "nonce"
    assert not ranks._sees(path, "a1")
    held = ranks._written(path, "a1")
    assert ranks._sees(path, "a1")
    assert not ranks._sees(path, "b2")  # a file of that name on another disk
    assert not ranks._takes_lock(path)
    held.close()
    assert ranks._takes_lock(path)


def test_the_doctor_of_several_machines_needs_a_place_for_each(trivet):
    code, _, err = trivet("doctor", "--nodes", "2", "--machine-rank", "0")
    assert code == 2
    assert err.startswith("error: --main-address: nothing found beside --nodes 2")
