"""The machines of a run meet, or each says in one line and in time why not. Each machine here is a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import processes
from launch.nodes import Nodes, nodes_of
from serving.directory import BadInput

ROOT = Path(__file__).resolve().parents[2]
JOIN = """
import json, sys
from launch import nodes, roll_call
from serving.directory import BadInput
machines = nodes.Nodes(**json.loads(sys.argv[1]))
if sys.argv[2] == "start":
    sys.exit(roll_call.start_together([sys.executable, "-c", "pass"], {}, machines, nproc=1, parallel="ddp"))
try:
    print(json.dumps(roll_call.join(machines, nproc=int(sys.argv[2]), parallel="ddp")))
except BadInput as error:
    sys.exit(f"error: {error}")
"""
NOWHERE = "198.51.100.7"  # RFC 5737: an address for documentation, of no machine


@pytest.fixture
def machine(free_port):
    """Return a function that starts one machine of a roll call on the loopback; all have ended afterwards."""
    started = []

    def start(
        rank: int, *, count: int = 2, host: str = "127.0.0.1", timeout_s: int = 60, say: object = 1, **changed: str
    ):
        machines = {"count": count, "machine_rank": rank, "host": host, "port": free_port, "join_timeout_s": timeout_s}
        command = [sys.executable, "-c", JOIN, json.dumps(machines), str(say)]
        environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        environment |= {"PYTHONPATH": str(ROOT), **changed}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def error_of(process) -> str:
    """The one line that a machine ends with."""
    said = process.communicate(timeout=600)[1]
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def test_machines_that_are_all_there_go_on_and_know_the_network_between_them(machine):
    for process in [machine(rank, count=3) for rank in (2, 0, 1)]:
        out, err = process.communicate(timeout=600)
        assert (process.returncode, json.loads(out)) == (0, {"GLOO_SOCKET_IFNAME": "lo"})
        assert "all 3 machines are there; ranks talk over lo" in err


def test_an_interface_that_the_user_chose_stays(machine):
    for process in [machine(0, GLOO_SOCKET_IFNAME="ib0"), machine(1, GLOO_SOCKET_IFNAME="ib0")]:
        assert json.loads(process.communicate(timeout=600)[0]) == {}


def test_the_machine_that_is_missing_is_named_to_those_that_came(machine, free_port):
    present = [machine(0, count=3, timeout_s=3), machine(2, count=3)]
    for process in present:
        assert error_of(process).startswith(
            f"error: --nodes: machine 1 of 3 did not come to 127.0.0.1:{free_port} within 3 s"
        )


def test_an_unreachable_main_address_is_named_with_the_rank_after_the_stated_time(machine, free_port):
    started = time.monotonic()
    error = error_of(machine(1, timeout_s=2))
    assert f"--main-address: 127.0.0.1:{free_port} found unreachable from machine 1 of 2" in error
    assert "for 2 s (Connection refused)" in error
    assert time.monotonic() - started < 30


def test_a_main_address_that_cannot_be_resolved_is_one_line_on_both_sides(machine):
    for rank in (0, 1):
        error = error_of(machine(rank, host="no-such-machine.invalid", timeout_s=1))
        assert "--main-address: no-such-machine.invalid:" in error
        assert f"found unreachable from machine {rank} of 2" in error


def test_rank_0_on_a_machine_without_the_main_address_is_refused_at_once(machine):
    error = error_of(machine(0, host=NOWHERE, timeout_s=600))
    assert "--machine-rank: 0 found on" in error
    assert f"--main-address {NOWHERE}:" in error
    assert "accepted: 0 on the machine of that address only, 1 to 1 on others" in error


def test_a_rank_given_twice_ends_every_machine_with_the_same_line(machine):
    processes = [machine(rank, count=3) for rank in (0, 1, 1)]
    errors = {error_of(process) for process in processes}
    assert len(errors) == 1
    assert "--machine-rank: 1 found on" in errors.pop()


def test_machines_started_in_different_ways_are_told_both(machine):
    processes = [machine(0, say=1), machine(1, say=4)]
    for process in processes:
        assert "--nproc: 1 found on machine 0" in (error := error_of(process))
        assert "and 4 on machine 1" in error


def test_machines_that_were_told_different_numbers_of_machines_are_told_both(machine):
    for process in [machine(0, count=2), machine(2, count=3)]:
        assert "--nodes: 2 found on machine 0" in error_of(process)


def test_a_port_that_another_program_has_is_named(machine, free_port):
    with socket.create_server(("", free_port)):
        assert f"--main-address: port {free_port} of 127.0.0.1 found taken by another program" in error_of(machine(0))


def test_something_else_on_the_port_is_not_taken_for_machine_0(machine, free_port):
    with socket.create_server(("127.0.0.1", free_port)) as server:
        other = machine(1, timeout_s=3)
        server.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        server.close()
        assert "found unreachable from machine 1 of 2" in error_of(other)


def test_strangers_that_knock_change_nothing(machine, free_port):
    main = machine(0)
    for words in (b"GET / HTTP/1.0\r\n\r\n", b"", b'{"trivet": 1, "rank": 1}\n', b"[]\n"):
        with connected(free_port) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
    second = machine(1)
    assert [process.wait(timeout=600) for process in (main, second)] == [0, 0]


def test_a_machine_that_died_while_it_waited_may_come_again(machine, free_port):
    main = machine(0, count=3)
    card = {"trivet": 1, "rank": 1, "host": "the dead one", "asked": {}}
    card["asked"] = {"--nodes": 3, "--nproc": 1, "--parallel": "ddp"}
    with connected(free_port) as dead:
        dead.sendall(json.dumps(card).encode() + b"\n")
        time.sleep(0.5)
    others = [machine(rank, count=3) for rank in (1, 2)]
    assert [process.wait(timeout=600) for process in (main, *others)] == [0, 0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_run_began_asks_to_be_started_again(machine, number):
    waiting = machine(1, say="start")
    for line in waiting.stderr:
        if "meets the others" in line:
            break
    waiting.send_signal(number)
    said = waiting.communicate(timeout=600)[1]
    assert waiting.returncode == 75
    assert said == f"stopped by {signal.Signals(number).name} while the machines met; start it again to go on\n"


def test_machine_0_may_be_stopped_and_come_again_while_the_others_wait(machine):
    waiting = [machine(1, count=3), machine(0, count=3, say="start")]
    for line in waiting[1].stderr:
        if "meets the others" in line:
            break
    time.sleep(1)  # so that machine 1 has come; if it has not, it comes to the second one
    waiting[1].send_signal(signal.SIGTERM)
    assert waiting[1].wait(timeout=600) == 75
    others = [machine(0, count=3), machine(2, count=3)]
    assert [process.wait(timeout=600) for process in (waiting[0], *others)] == [0, 0, 0]


# --- what the command line says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rank", "address", "said"),
    [
        (2, 2, "host:1", "--machine-rank: 2 found beside --nodes 2 and --main-address host:1; accepted: 0 to 1"),
        (2, -1, "host:1", "--machine-rank: -1 found"),
        (2, None, "host:1", "--machine-rank: nothing found"),
        (2, 0, None, "--main-address: nothing found beside --nodes 2"),
        (2, 0, "host:0", "--main-address: 'host:0' found; accepted: HOST:PORT with a port from 1 to 65535"),
        (2, 0, "host:http", "--main-address: 'host:http' found"),
        (2, 0, ":29500", "--main-address: ':29500' found"),
        (1, 0, None, "--machine-rank: 0 found without --nodes"),
        (1, None, "host", "--main-address: host found without --nodes"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_starts(count, rank, address, said):
    with pytest.raises(BadInput) as error:
        nodes_of(count, rank, address)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("node1", "node1", 29500), ("10.0.0.1:7", "10.0.0.1", 7), ("[fd00::1]:7", "fd00::1", 7), ("[::1]", "::1", 29500)],
)
def test_the_main_address_has_a_port_of_its_own_or_the_usual_one(address, host, port):
    assert nodes_of(2, 1, address) == Nodes(2, 1, host, port)


def test_one_machine_needs_none_of_this():
    assert nodes_of(1, None, None) is None


def test_deepspeed_is_told_to_use_the_launcher_that_forms_one_world():
    machines = Nodes(3, 2, "node1", 7, 60)
    flags = ["--num_machines", "3", "--machine_rank", "2", "--main_process_ip", "node1", "--main_process_port", "7"]
    flags += ["--rdzv_conf", "timeout=60"]
    assert machines.launch_flags("ddp") == flags
    assert machines.launch_flags("zero3") == [*flags, "--deepspeed_multinode_launcher", "standard"]


def test_the_launcher_is_told_the_processes_of_all_machines_together(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 4)
    machines = Nodes(2, 1, "node1", 7)
    argv, _ = processes.accelerate_command(Path("run.yaml"), ["a.b=1"], nproc=4, parallel="zero2", nodes=machines)
    world = argv[argv.index("--num_processes") :]
    assert world == [
        "--num_processes", "8", *machines.launch_flags("zero2"), "-m", "launch.train", "run.yaml", "a.b=1"
    ]  # fmt: skip


def connected(port: int) -> socket.socket:
    """A connection to a port that is about to be listened on."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
