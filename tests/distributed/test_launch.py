"""`accelerate launch` with each file of configs/accelerate is the same run as `trivet train --nproc --parallel`."""

import sys
from pathlib import Path

import pytest

from launch import config_file, processes

FILES = ("cpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


def test_every_mode_has_a_file_and_the_command_names_it(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 0)
    for mode in processes.PARALLEL:
        argv, env = processes.accelerate_command(Path("x.yaml"), [], nproc=2, parallel=mode)
        path = Path(argv[argv.index("--config_file") + 1])
        assert path.name == f"{mode.replace('-', '_')}.yaml"
        assert path.is_file()
        assert ("ACCELERATE_USE_CPU" in env) == (mode == "ddp")


@pytest.mark.parametrize("name", FILES)
def test_a_launch_config_says_only_what_it_owns_and_takes_a_free_port(name):
    launch = config_file.read_yaml(processes.accelerate_config(name))
    assert "mixed_precision" not in launch
    if name != "cpu":  # one process, and no port
        assert launch["main_process_port"] == 0
    deepspeed = launch.get("deepspeed_config", {})
    assert deepspeed.keys() <= {"zero_stage", "zero3_init_flag", "offload_optimizer_device", "offload_param_device"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_accelerate_launch_alone_trains_the_same_run(modes, name):
    path = modes.config(f"by-hand-{name}")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(processes.accelerate_config(name)), "-m", "launch.train", str(path)]  # fmt: skip
    modes.run(command, {})
    modes.check_same_numbers(f"by-hand-{name}", modes.alone("alone-sft-full", "sft", "full"))
