"""Memory, disks and network: problems caused for real where that is possible, else read from a made-up /proc."""

import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from launch.doctor import files, machine, network

GIB = 1024**3
MEMINFO = "MemTotal:       {total} kB\nMemAvailable:   {available} kB\nSwapTotal:      0 kB\n"


def made_up(root: Path, *, total_gib=16.0, available_gib=8.0, cgroup="0::/\n", **cgroup_files: str) -> Path:
    """Write a /proc and a /sys with these readings; cgroup files by name, `cpu__max` for cpu.max."""
    (root / "proc/self").mkdir(parents=True)
    kib = {"total": int(total_gib * 1024**2), "available": int(available_gib * 1024**2)}
    (root / "proc/meminfo").write_text(MEMINFO.format(**kib))
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in cgroup_files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_memory_is_what_is_available_in_gib(tmp_path):
    [finding] = machine.memory(made_up(tmp_path))
    assert (finding.state, finding.value, finding.unit) == ("ok", 8.0, "GiB")
    assert "8.0 of 16.0 GiB available" in finding.found


def test_little_memory_is_a_note_with_the_command_that_shows_who_has_it(tmp_path):
    [finding] = machine.memory(made_up(tmp_path, available_gib=0.5))
    assert finding.state == "note"
    assert finding.fix.startswith("ps ")


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", {"memory.max": 1.25, "memory.current": 1.0}),
        ("0::/job\n", {"memory.max": "max", "job/memory.max": 1.25, "job/memory.current": 1.0}),
        ("0::/job\n", {"memory.max": 1.25, "memory.current": 1.0, "job/memory.max": "max"}),
        (
            "4:memory:/\n0::/\n",
            {"memory/memory.limit_in_bytes": 1.25, "memory/memory.usage_in_bytes": 1.0},
        ),
    ],
    ids=["v2", "v2-inner", "v2-outer", "v1"],
)
def test_what_a_containers_limit_leaves_counts_below_the_machines_memory(tmp_path, cgroup, files):
    made_up(tmp_path, available_gib=21.5, total_gib=23.5, cgroup=cgroup)
    for name, gib in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{gib if gib == 'max' else int(gib * GIB)}\n")
        (path.parent / "memory.stat").touch()
    [finding] = machine.memory(tmp_path)
    assert (finding.value, finding.state) == (0.25, "note")
    assert finding.found.startswith("0.2 of 23.5 GiB available")
    assert "the machine has 21.5" in finding.found


def test_a_container_with_fewer_cores_than_it_sees_gets_the_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    _, finding = machine.machine(made_up(tmp_path, cpu__max="250000 100000"))
    assert (finding.state, finding.value, finding.fix) == ("note", 2.5, "export OMP_NUM_THREADS=2")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert machine.machine(tmp_path)[1].state == "ok"


def test_the_narrowest_of_nested_quotas_counts(tmp_path):
    made_up(tmp_path, cgroup="0::/job\n", cpu__max="150000 100000", job_in_cpu__max="400000 100000")
    assert machine.cpu_quota(tmp_path) == 1.5


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LITTLE_DISK_BYTES", 10**18)
    assert files.space(tmp_path)[0].state == "problem"


def test_a_disk_without_room_for_more_files_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LITTLE_DISK_BYTES", 0)
    monkeypatch.setattr(files, "FEW_INODES", 10**18)
    [finding] = files.space(tmp_path)
    assert (finding.state, finding.unit) == ("problem", "files")


@pytest.fixture
def tmpfs(tmp_path):
    """Return a function that mounts a small file system in memory; skips where this user may not mount."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "small disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_in_memory_with_no_room_is_a_problem_and_its_files_are_said_to_be_lost(tmpfs, by_subject):
    folder = tmpfs("2M")
    assert files.space(folder)[0].state == "problem"
    findings = files.writing(folder)
    assert findings[-1].state == "problem"
    assert "No space left" in findings[-1].found
    shutil.rmtree(folder, ignore_errors=True)


def test_a_file_system_in_memory_is_named_and_is_a_note(tmpfs, by_subject):
    folder = tmpfs("300M")
    finding = by_subject(files.writing(folder))[f"file system of {folder}"]
    assert (finding.state, finding.found) == ("note", "tmpfs; its files don't outlive the next start")


def test_speeds_are_measured_and_nothing_is_left_behind(tmp_path, by_subject):
    findings = by_subject(files.writing(tmp_path))
    assert findings[f"writing to {tmp_path}"].value > 0
    assert findings[f"writing to {tmp_path}"].unit == "MB/s"
    assert findings[f"reading from {tmp_path}"].value > 0
    assert findings[f"small file in {tmp_path}"].unit == "ms"
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_a_note(tmp_path, monkeypatch, by_subject):
    monkeypatch.setattr(files, "SLOW_MB_PER_S", 10**9)
    assert by_subject(files.writing(tmp_path))[f"writing to {tmp_path}"].state == "note"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    [finding] = files.writing(tmp_path / "gone")
    assert finding.state == "problem"
    assert "No such file" in finding.found


def test_a_file_system_without_locks_is_a_problem(tmp_path, monkeypatch, by_subject):
    def unsupported(*arguments):
        raise OSError(37, "No locks available")

    assert files.locks(tmp_path)
    monkeypatch.setattr("fcntl.flock", unsupported)
    finding = by_subject(files.writing(tmp_path))[f"file system of {tmp_path}"]
    assert finding.state == "problem"
    assert "without file locks" in finding.found


def test_a_network_file_system_is_a_note(tmp_path, monkeypatch, by_subject):
    monkeypatch.setattr(files, "file_system_type", lambda folder: "nfs4")
    finding = by_subject(files.writing(tmp_path))[f"file system of {tmp_path}"]
    assert finding.state == "note"
    assert "over the network" in finding.found


def test_the_type_is_that_of_the_longest_mount_point(tmp_path):
    mounts = tmp_path / "mountinfo"
    inner = tmp_path / "data set"
    inner.mkdir()
    lines = [
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
        f"28 27 0:24 / {str(inner).replace(' ', chr(92) + '040')} rw shared:1 - nfs4 server:/x rw",
        "29 27 0:25 / /elsewhere rw - tmpfs tmpfs rw",
    ]
    mounts.write_text("\n".join(lines) + "\n")
    assert files.file_system_type(inner, mounts) == "nfs4"
    assert files.file_system_type(tmp_path, mounts) == "ext4"


def test_loopback_is_measured_within_its_time():
    started = time.monotonic()
    [finding] = network.loopback()
    assert (finding.state, finding.unit) == ("ok", "MB/s")
    assert finding.value > 0
    assert time.monotonic() - started < 10


def test_a_name_that_does_not_resolve_is_a_problem(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    [finding] = network.host_name()
    assert finding.state == "problem"
    assert "echo 127.0.0.1 no-such-host.invalid" in finding.fix


def test_a_name_that_is_a_loopback_address_is_a_note_with_the_interface_to_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(network, "addresses", lambda: {"lo": "127.0.0.1", "eth7": "10.0.0.5"})
    monkeypatch.setattr(network, "_way_out", lambda: None)
    [finding] = network.host_name()
    assert (finding.state, finding.fix) == ("note", "export GLOO_SOCKET_IFNAME=eth7")
    monkeypatch.setattr(network, "addresses", lambda: {"lo": "127.0.0.1"})
    assert network.host_name()[0].state == "ok"


def test_an_interface_that_is_not_there_is_a_problem(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    [finding] = network.host_name()
    assert (finding.state, finding.fix) == ("problem", "unset GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.host_name()[0].state == "ok"


def test_the_way_out_is_the_interface_of_the_default_route(tmp_path):
    routes = tmp_path / "route"
    routes.write_text("Iface\tDestination\tGateway\ndocker0\t000011AC\t00000000\nens5\t00000000\t0102A8C0\n")
    assert network._way_out(routes) == "ens5"


@pytest.fixture
def online(monkeypatch):
    for name in (*network.OFFLINE_VARIABLES, "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_hub_that_does_not_answer_is_a_note_and_its_password_is_not_shown(monkeypatch, online):
    port = closed_port()
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:canary@127.0.0.1:{port}")
    [finding] = network.hub()
    assert finding.state == "note"
    assert f"http://127.0.0.1:{port} does not answer" in finding.found
    assert "canary" not in str(finding)
    assert finding.fix.startswith("export HF_HUB_OFFLINE=1")


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_hub_that_answers_whatever_it_says_is_reached(monkeypatch, online, status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        [finding] = network.hub()
    assert (finding.state, finding.unit) == ("ok", "ms")


def test_offline_by_choice_asks_nobody(monkeypatch, online):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **named: pytest.fail("asked"))
    [finding] = network.hub()
    assert finding.state == "ok"
    assert "HF_HUB_OFFLINE" in finding.found


def test_a_proxy_that_local_requests_would_take_is_a_note_without_its_password(monkeypatch, online):
    monkeypatch.setenv("http_proxy", "http://user:canary@proxy.example:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    [finding] = network.proxies()
    assert (finding.state, finding.fix) == ("note", "export NO_PROXY=localhost,127.0.0.1")
    assert "proxy.example:3128" in finding.found
    assert "canary" not in finding.found
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert network.proxies()[0].state == "ok"
