"""Two network namespaces, joined by one virtual cable, stand for two nodes: the losses of one machine.

Where namespaces are not allowed two launches on the loopback stand for them, and a warning says so.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from launch import config_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
LONGEST_LAUNCH_S = 300
TIMEOUT_S = 10
WORDS = ["the", "quick", "brown", "fox", "returns", "a", "list", "of", "lines", "in", "every", "file", "that", "it"]
slow_modes = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3", "fsdp2", "multi_node.yaml")]


@dataclass
class Node:
    """One of the two: the words before a command that is to run there, its address, and its cable's end."""

    prefix: list[str]
    address: str
    interface: str = ""

    def run(self, *command: object, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self.prefix, *map(str, command)], **options)

    def cut(self) -> None:
        """Pull the cable, without a word to either end."""
        subprocess.run([*self.prefix, "ip", "link", "set", self.interface, "down"], check=True)

    def mend(self) -> None:
        subprocess.run([*self.prefix, "ip", "link", "set", self.interface, "up"], check=True)

    def bytes_sent(self) -> int:
        """Bytes that left by the cable."""
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(subprocess.run([*self.prefix, "cat", counter], capture_output=True, check=True).stdout)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other; the first one's address is where they meet."""
    names, ends = [f"trivet{os.getpid()}{side}" for side in "ab"], [f"tv{os.getpid()}{side}" for side in "ab"]
    made = [Node(["ip", "netns", "exec", name], f"10.77.0.{i + 1}", ends[i]) for i, name in enumerate(names)]
    try:
        try:
            for line in (
                *(f"ip netns add {name}" for name in names),
                f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}",
                *(f"ip -n {name} addr add {made[i].address}/24 dev {ends[i]}" for i, name in enumerate(names)),
                *(f"ip -n {name} link set {end} up" for i, name in enumerate(names) for end in ("lo", ends[i])),
            ):
                subprocess.run(line.split(), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip()
            warnings.warn(
                f"no network namespaces ({why}): two launches on the loopback stand for two nodes", stacklevel=1
            )
            made = [Node([], "127.0.0.1"), Node([], "127.0.0.1")]
        yield made
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def write_config(tmp_path):
    """Return a function that writes the config of a tiny run from scratch and returns its path."""
    random = Random(0)
    for name, count in (("train", 60), ("held-out", 3)):
        rows = [{"text": " ".join(random.choices(WORDS, k=random.randint(3, 30)))} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, **changes: dict[str, Any]) -> Path:
        files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held-out.jsonl")}
        values = {
            "run": {"name": name, "dir": str(tmp_path / "runs"), "steps": STEPS},
            "objective": {"type": "causal_lm"},
            "model": {"type": "new", "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4},
            "tokenizer": {"type": "train", "vocab_size": 300},
            "data": {"type": "files", **files},
            "strategy": {"type": "scratch"},
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "batch": {"rows": 4, "max_length": 32},
            "evaluation": {"every": 3},
            "checkpoint": {"every": 100},
            "log": {"tensorboard": False},
        }
        for section, change in changes.items():
            values[section] |= change
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path

    return write


@pytest.fixture
def train_on(nodes, tmp_path, free_port):
    """Return a function that trains a config on both nodes and returns each one's exit code and what it printed.

    With `stop` it sends SIGUSR1 to the `trivet` of node 1 when the run has taken that many steps, with `cut` it pulls
    the cable.
    """

    def command(path: Path, parallel: str, rank: int) -> list[object]:
        if parallel == "multi_node.yaml":
            launch = ["accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / parallel]
            meeting = ["--main_process_ip", nodes[0].address, "--main_process_port", free_port]
            return [sys.executable, "-m", *launch, "--machine_rank", rank, *meeting, "-m", "launch.train", path]
        meeting = ["--main-address", f"{nodes[0].address}:{free_port}", "--join-timeout-s", 120]
        place = ["--nodes", 2, "--machine-rank", rank, *meeting]
        return [sys.executable, "-m", "trivet", "train", path, "--parallel", parallel, *place]

    def train(path: Path, parallel: str, stop: int = 0, *, cut: int = 0) -> list[tuple[int, str]]:
        logs = [tmp_path / f"{path.stem}-{rank}.log" for rank in (0, 1)]
        started = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        for rank, node in enumerate(nodes):
            with logs[rank].open("wb") as output:
                options = {"env": environment, "cwd": tmp_path, "stdout": output, "stderr": subprocess.STDOUT}
                started.append(node.run(*command(path, parallel, rank), **options))
        try:
            if stop or cut:
                wait_for(lambda: len(losses(path)) >= stop + cut or started[1].poll() is not None)
            if stop:
                started[1].send_signal(signal.SIGUSR1)
            if cut:
                nodes[0].cut()
            deadline = time.monotonic() + (TIMEOUT_S + 60 if cut else LONGEST_LAUNCH_S)
            codes = [process.wait(timeout=max(0, deadline - time.monotonic())) for process in started]
        finally:
            if cut:
                nodes[0].mend()
            for process in started:
                end(process)
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]

    return train


@pytest.fixture
def train_here():
    """Return a function that trains a config in this one process."""
    import torch

    from launch.train import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda path: main([str(path)])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("parallel", ["ddp", *slow_modes])
def test_two_nodes_take_the_steps_of_one_machine(write_config, train_here, train_on, nodes, parallel):
    alone, together = write_config("alone"), write_config("together")
    assert train_here(alone) == 0
    sent_before = [node.bytes_sent() for node in nodes if node.interface]

    ended = train_on(together, parallel)

    assert [code for code, _ in ended] == [0, 0], "\n".join(text[-3000:] for _, text in ended)
    # The sums run in another order than in one process, which shows in the last digits.
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(together)) == STEPS
    assert held_out(together) == pytest.approx(held_out(alone), rel=1e-5)
    assert result(together)["world_size"] == 2
    assert result(together)["total_parameters"] == result(alone)["total_parameters"]
    # Each rank sends about half of all gradients to the other in each step, by the cable.
    gradients = 4 * result(alone)["trainable_parameters"] * STEPS
    sent = [node.bytes_sent() for node in nodes if node.interface]
    assert all(after - before > gradients / 2 for before, after in zip(sent_before, sent, strict=True))


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both_with_75_and_the_same_command_goes_on(write_config, train_here, train_on):
    whole, stopped = write_config("whole", run={"steps": 400}), write_config("stopped", run={"steps": 400})
    assert train_here(whole) == 0

    ended = train_on(stopped, "ddp", stop=5)
    assert [code for code, _ in ended] == [75, 75], "\n".join(text[-3000:] for _, text in ended)
    status = json.loads((run_folder(stopped) / "status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 75)
    assert 5 <= status["step"] < 400

    ended = train_on(stopped, "ddp")
    assert [code for code, _ in ended] == [0, 0], "\n".join(text[-3000:] for _, text in ended)
    assert f"step-{status['step']:08}" in ended[0][1]
    assert len(losses(stopped)) == 400
    assert losses(stopped)[:50] == pytest.approx(losses(whole)[:50], rel=1e-4)


@pytest.mark.slow
def test_a_cut_cable_ends_both_nodes_within_a_minute_of_the_timeout_and_each_says_who_was_lost(
    write_config, train_on, nodes
):
    if not nodes[0].interface:
        pytest.skip("needs network namespaces")
    path = write_config("cut", run={"steps": 100_000, "timeout_s": TIMEOUT_S})

    ended = train_on(path, "ddp", cut=5)

    first, second = ([line for line in text.splitlines() if line.startswith("error: ")] for _, text in ended)
    assert [code for code, _ in ended] == [1, 1], "\n".join(text[-3000:] for _, text in ended)
    [lost] = first
    assert lost.startswith(f"error: rank 1 was lost: host {socket.gethostname()}, phase ")
    assert "; no sign for " in lost
    assert "killed, or its machine or network is gone; rank 0 waits in phase " in lost
    [gone] = second
    assert gone.startswith("error: the store at 10.77.0.1:")
    assert "gives no answer: rank 0, its machine or the network is gone; started again, the run goes on" in gone


@pytest.mark.slow
def test_the_doctor_measures_a_slow_cable_and_finds_a_folder_that_only_one_node_has(nodes, tmp_path, free_port):
    if not nodes[0].interface:
        pytest.skip("needs network namespaces")
    cable = ["dev", nodes[0].interface, "root"]
    limit = ["tbf", "rate", "80mbit", "burst", "64kb", "latency", "1s"]
    assert nodes[0].run("tc", "qdisc", "add", *cable, *limit).wait() == 0
    place = ["--nodes", 2, "--main-address", f"{nodes[0].address}:{free_port}", "--join-timeout-s", 120]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    # A command of a namespace has mounts of its own.
    for rank, first in enumerate(["true", f"mount -t tmpfs none {tmp_path} && cd {tmp_path}"]):
        command = [sys.executable, "-m", "trivet", "doctor", "--json", *place, "--machine-rank", rank]
        options = {"env": environment, "cwd": tmp_path, "stdout": subprocess.PIPE, "text": True}
        started.append(nodes[rank].run("sh", "-c", f'{first} && exec "$@"', "sh", *command, **options))
    said = json.loads(started[0].communicate(timeout=LONGEST_LAUNCH_S)[0])
    assert nodes[0].run("tc", "qdisc", "del", *cable).wait() == 0
    assert [process.wait(timeout=600) for process in started] == [1, 0]

    found = {row["subject"]: row for row in said["findings"]}
    assert found["ranks"]["value"] == 2
    assert f"gloo over {nodes[0].interface}" in found["ranks"]["found"]
    assert 0 < found["all-reduce bandwidth"]["value"] < 10.5  # 80 Mbit/s are 10 MB/s, and what the burst lets through
    assert found["shared folder"]["state"] == "problem"
    assert f"{tmp_path}: a file made on" in found["shared folder"]["found"]


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in lines(path) if line["kind"] == "train"]


def held_out(path: Path) -> list[float]:
    return [line["eval_loss"] for line in lines(path) if line["kind"] == "eval"]


def lines(path: Path) -> list[dict[str, Any]]:
    file = run_folder(path) / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def result(path: Path) -> dict[str, Any]:
    return json.loads((run_folder(path) / "result.json").read_text())


def run_folder(path: Path) -> Path:
    run = config_file.read_yaml(path)["run"]
    return Path(run["dir"]) / run["name"]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a `trivet train` with all that it started, as a second Ctrl-C does."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # two signals of one kind at once are one
    process.kill()
    process.wait()


def wait_for(condition) -> None:
    deadline = time.monotonic() + LONGEST_LAUNCH_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
