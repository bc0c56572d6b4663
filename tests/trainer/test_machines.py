"""A rank finds the network that leads to the others, and refuses a world of one where several were asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.directory import BadInput
from trainer import machines

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BY_AGENT = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},  # python -m launch.train
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch, one process
        {"MASTER_ADDR": "node1"},  # a cluster that sets it for every job
        {**ALONE, **BY_AGENT},
        {**ALONE, **BY_AGENT, "ACCELERATE_USE_DEEPSPEED": "true"},
    ],
)
def test_a_process_that_is_where_it_was_meant_to_be_goes_on(environment):
    machines.refuse_lone_worlds(environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (ALONE, "num_processes: the launch config asks for several processes"),
        ({**ALONE, "ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "1"}, "deepspeed_multinode_launcher: DeepSpeed's"),
    ],
)
def test_a_process_that_would_train_alone_in_silence_is_refused(environment, said):
    with pytest.raises(BadInput, match=said):
        machines.refuse_lone_worlds(environment)


MULTI_CPU = "{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_CPU, use_cpu: true, num_machines: 1, num_processes: 2, machine_rank: 0}"  # noqa: E501
DEEPSPEED = "{compute_environment: LOCAL_MACHINE, distributed_type: DEEPSPEED, use_cpu: false, deepspeed_config: {zero_stage: 2, zero3_init_flag: false}, num_machines: 2, num_processes: 2, machine_rank: 0, main_process_ip: 127.0.0.1, main_process_port: 29511}"  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch_config", "flags", "said"),
    [
        (None, ["--cpu", "--num_processes", "2", "--num_machines", "1"], "num_processes: the launch config asks"),
        (MULTI_CPU, [], "num_processes: the launch config asks for several processes"),
        (DEEPSPEED, [], "deepspeed_multinode_launcher: DeepSpeed's own launcher found"),
    ],
    ids=["--cpu", "MULTI_CPU", "DeepSpeed on two machines"],
)
def test_what_accelerate_launches_as_worlds_of_one_ends_with_an_error(tmp_path, launch_config, flags, said):
    if launch_config:
        (tmp_path / "launch.yaml").write_text(launch_config)
        flags = ["--config_file", str(tmp_path / "launch.yaml"), *flags]
    run = {"run": {"name": "alone", "dir": str(tmp_path / "runs"), "steps": 1}, "batch": {"rows": 2, "max_length": 32}}
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"objective": {"type": "causal_lm"}} | SMALL))
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "launch.train"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # `deepspeed` is one
    ours = {"PYTHONPATH": str(ROOT), "PATH": programs, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "run.yaml")],
        env={name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")} | ours,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert said in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "runs").exists()


SMALL = {
    "model": {"type": "new", "hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2},
    "tokenizer": {"type": "train", "vocab_size": 300},
    "data": {"type": "embedded"},
    "strategy": {"type": "scratch"},
}


def test_the_loopback_leads_to_this_machine():
    assert machines.interface_towards("127.0.0.1") == machines.interface_towards("localhost") == "lo"
    assert machines.interface_of("127.0.1.1") == "lo"


def test_a_name_that_resolves_to_the_loopback_tells_nothing_about_the_network(monkeypatch):
    monkeypatch.setattr(machines.socket, "socket", resolving_to_the_loopback(machines.socket.socket))
    assert machines.interface_towards("node1") is None


def test_an_address_of_this_machine_leads_by_its_own_interface():
    for name, address in machines.addresses().items():
        assert machines.interface_towards(address) == name


def test_a_host_that_cannot_be_found_leads_nowhere():
    assert machines.interface_towards("no-such-machine.invalid") is None
    assert machines.interface_of("198.51.100.7") is None


@pytest.mark.parametrize(
    ("environment", "interface"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "lo"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, None),  # one machine: as torch would have it
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
    ],
)
def test_ranks_of_several_machines_talk_by_the_way_to_the_main_one(monkeypatch, environment, interface):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", **environment}.items():
        monkeypatch.setenv(name, value)
    machines.use_reachable_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == interface


def resolving_to_the_loopback(real):
    """A socket class for which every name is 127.0.1.1, as Debian writes a machine's own name into /etc/hosts."""

    class Socket(real):
        def connect(self, address):
            super().connect(("127.0.1.1", address[1]))

    return Socket
