"""Ray's files and processes, made up in a folder of their own."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from launch.doctor import ray_state

PROC = Path("/proc")


@pytest.fixture(autouse=True)
def ray_folder(tmp_path, monkeypatch):
    """An empty folder for Ray's sessions, an empty home, no variable of Ray's."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with tempfile.TemporaryDirectory(prefix="trivet-", dir="/tmp") as short:  # pytest's own path is too long for Ray
        monkeypatch.setenv("RAY_TMPDIR", short)
        (Path(short) / "ray").mkdir()
        yield Path(short, "ray")


def session(folder, name, size_bytes=1024**2):
    (folder / name / "logs").mkdir(parents=True)
    (folder / name / "logs" / "raylet.out").write_bytes(os.urandom(size_bytes))
    return folder / name


def test_nothing_is_wrong_where_ray_never_ran(by_subject):
    findings = by_subject(ray_state.ray_state())
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert "Ray sessions" not in findings


def test_dead_sessions_are_a_note_with_their_size_and_a_command_that_removes_them(ray_folder):
    session(ray_folder, "session_1")
    session(ray_folder, "session_2")
    (ray_folder / "session_latest").symlink_to(ray_folder / "session_2")
    [finding] = ray_state.dead_sessions([])
    assert (finding.state, finding.value, finding.unit) == ("note", 2.0, "MiB")
    subprocess.run(["bash", "-c", finding.fix], check=True)
    assert list(ray_folder.iterdir()) == []


def test_a_session_that_a_process_uses_is_not_to_be_removed(ray_folder):
    dead, alive = session(ray_folder, "session_1"), session(ray_folder, "session_2")
    [finding] = ray_state.dead_sessions([f"/x/raylet --session_name={alive.name}"])
    assert str(dead) in finding.fix
    assert str(alive) not in finding.fix
    assert ray_state.dead_sessions([f"raylet {dead.name} {alive.name}"]) == []


def test_processes_are_read_from_the_process_table(tmp_path, ray_folder, by_subject):
    (tmp_path / "proc/17").mkdir(parents=True)
    (tmp_path / "proc/17/cmdline").write_bytes(b"/venv/ray/core/raylet\0--session_name=session_1\0")
    session(ray_folder, "session_1")
    findings = by_subject(ray_state.ray_state(tmp_path / "proc"))
    assert "Ray sessions" not in findings
    assert "1 processes" in findings["Ray cluster"].found


def test_an_address_in_the_environment_is_a_note(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    [finding] = ray_state.cluster([])
    assert (finding.state, finding.fix) == ("note", "unset RAY_ADDRESS")
    assert "10.0.0.1:6379" in finding.found


def test_a_running_cluster_and_the_address_of_a_dead_one_are_told_apart(ray_folder):
    (ray_folder / "ray_current_cluster").write_text("10.0.0.1:6379")
    [finding] = ray_state.cluster(["/x/gcs_server --port=6379"])
    assert "10.0.0.1:6379 (by `ray start`)" in finding.found
    [finding] = ray_state.cluster([])
    assert finding.fix == f"rm {ray_folder / 'ray_current_cluster'}"


@pytest.mark.slow
def test_a_sweeps_ray_starts_where_another_cluster_is_named(ray_folder, monkeypatch):
    """Ray refuses the options of a new cluster wherever it finds the address of another, running or not."""
    ray = pytest.importorskip("ray")
    from launch import sweep_ray

    (ray_folder / "ray_current_cluster").write_text("127.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with sweep_ray._ray(1):
        assert ray.cluster_resources()["CPU"] == 1
        findings = {finding.subject: finding for finding in ray_state.dead_sessions(ray_state._command_lines(PROC))}
        assert findings == {}  # the running one is not dead
    ray.shutdown()


def test_a_folder_whose_path_is_too_long_for_sockets_is_a_problem(monkeypatch, tmp_path):
    """107 bytes less the 68 of `/ray/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store`."""
    monkeypatch.setenv("RAY_TMPDIR", "/" + 38 * "x")
    assert ray_state.socket_path() == []
    monkeypatch.setenv("RAY_TMPDIR", "/" + 39 * "x")
    [finding] = ray_state.socket_path()
    assert (finding.state, finding.fix) == ("problem", "export RAY_TMPDIR=/tmp")
    assert "1 bytes too long" in finding.found


def test_usage_reports_are_off_only_by_the_users_own_file_or_variable(tmp_path, monkeypatch):
    assert "ray start" in ray_state.usage_statistics()[0].found
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/config.json").write_text(json.dumps({"usage_stats": False}))
    assert ray_state.usage_statistics()[0].found == "off"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert ray_state.usage_statistics()[0].state == "note"


def test_a_token_that_others_can_read_is_a_note_and_is_not_shown(tmp_path):
    (tmp_path / "home/.ray").mkdir(parents=True)
    path = tmp_path / "home/.ray/auth_token"
    path.write_text("canary")
    path.chmod(0o644)
    [finding] = ray_state.token()
    assert (finding.state, finding.fix) == ("note", f"chmod 600 {path}")
    assert "canary" not in str(finding)
    path.chmod(0o600)
    assert ray_state.token()[0].state == "ok"
