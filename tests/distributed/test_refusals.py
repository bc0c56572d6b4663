"""What a parallel run cannot be: refused with exit code 2 and one line, before anything is started or written."""

import json
import socket

import pytest
import torch

from serving.directory import BadInput
from trainer import shards, zero


@pytest.fixture
def config(modes):
    """The config of a run that never starts, and the function that makes others of it."""
    return lambda name, **changes: modes.config(f"refused-{name}", **changes)


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["--nproc", "3"], {}, "batch.rows: 4 rows cannot be shared by 3 processes; use a multiple of it"),
        (
            ["--nproc", "2"],
            {"batch": {"micro_rows": 4}},
            "batch.micro_rows: 4 does not divide the 2 rows of a process; use a divisor",
        ),
        (
            ["--parallel", "zero3"],
            {"optim": {"type": "sgd"}},
            "optim.type: sgd found; accepted with zero3: adamw; use that, or --parallel ddp",
        ),
        (
            ["--parallel", "fsdp2"],
            {"optim": {"type": "adafactor"}},
            "optim.type: adafactor found; accepted with fsdp2: adamw, sgd; use that, or --parallel ddp",
        ),
        (
            ["--parallel", "zero3-offload"],
            {"precision": {"type": "fp16"}},
            "precision.type: fp16 found; accepted with zero3-offload: fp32, bf16; use that, or --parallel ddp",
        ),
        (
            ["--parallel", "fsdp2"],
            {"batch": {"compile": True}},
            "batch.compile: true found; accepted with fsdp2: false; use that, or --parallel ddp",
        ),
        (
            ["--parallel", "zero4"],
            {},
            "--parallel: 'zero4' found; accepted: ddp, zero1, zero2, zero3, zero3-offload, fsdp2",
        ),
    ],
)
def test_the_command_refuses_before_any_process_is_started(trivet, config, monkeypatch, arguments, changes, said):
    from launch import processes

    monkeypatch.setattr(processes, "Group", lambda *_: pytest.fail("a process was started"))
    path = config("command")
    values = json.loads(path.read_text())
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change
    path.write_text(json.dumps(values))
    code, _, err = trivet("train", path, *arguments)
    assert (code, err.strip()) == (2, f"error: {said}")


def test_a_second_ctrl_c_is_in_status_json_though_no_rank_could_write_it(trivet, config, monkeypatch):
    from launch import roll_call
    from trainer import run_folder

    path = config("interrupted")
    folder = path.parent / "runs" / "refused-interrupted"

    def killed(*_, **__):
        folder.mkdir(parents=True)
        run_folder.write_status(folder, "running", code=None, step=3)
        return 130

    monkeypatch.setattr(roll_call, "start_together", killed)
    assert trivet("train", path, "--nproc", "2")[0] == 130
    status = run_folder.read_status(folder)
    assert [status[key] for key in ("state", "code", "step", "reason")] == ["failed", 130, 3, "a second Ctrl-C"]


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "TORCHELASTIC_RUN_ID": "test"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "TORCHELASTIC_RUN_ID": "test"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            "gradient_clipping: 1.0 found in the launch config, but",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"},
            "gradient_accumulation_steps: 7 found in the launch config, but batch.rows and batch.micro_rows make it 4;",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            "zero_optimization.offload_optimizer.device: nvme found in the launch config; accepted: none, cpu",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no.json"}, "deepspeed_config_file: no.json cannot be read"),
        ({**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: 'bf16' in the launch config, but"),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version: 1 found in the launch config; accepted: 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true found in the launch config; accepted: f"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: true found"),
    ],
)
def test_a_launch_config_that_says_otherwise_than_the_run_config_is_refused(
    config, monkeypatch, capfd, environment, said
):
    from launch.train import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = config("launch")
    assert main([str(path)]) == 2
    assert f"error: {said}" in capfd.readouterr().err
    assert not (path.parent / "runs" / "refused-launch").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which computes in fp16")
def test_fp16_is_refused_without_a_gpu_by_the_run_and_by_its_dry_run(trivet, config, capfd):
    from launch.train import main

    said = "error: precision.type: fp16 found, and no GPU; accepted on a CPU: fp32, bf16; use one of them"
    path = config("fp16", precision={"type": "fp16"})
    code, _, err = trivet("train", path, "--dry-run")
    assert (code, err.strip()) == (2, said)
    assert main([str(path)]) == 2
    assert said in capfd.readouterr().err
    assert not (path.parent / "runs" / "refused-fp16").exists()


def test_a_rank_that_cannot_reach_the_main_address_says_so_itself_after_the_stated_time(
    config, monkeypatch, capfd, free_port
):
    from launch.train import main

    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main([str(config("unreachable")), "run.timeout_s=1"]) == 2
    said = (
        f"error: MASTER_ADDR: 127.0.0.1:{free_port} found unreachable from rank 1 of 2 ({socket.gethostname()}) for 1 s"
    )
    assert said in capfd.readouterr().err


def test_processes_that_form_no_world_together_are_refused(config, monkeypatch):
    """As they would under a launch config that Accelerate reads in another way than the launcher."""
    from accelerate import Accelerator

    from launch import config_file
    from trainer import distributed
    from trainer.config import RunConfig

    run, alone = config_file.load(config("lone"), [], RunConfig), Accelerator(cpu=True)
    monkeypatch.setattr(distributed, "_join", lambda *_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="WORLD_SIZE: 2 processes found, started by the launcher, but they form a wo"):
        distributed.start(run)


def test_what_a_deepspeed_file_says_must_be_what_the_run_config_says(modes, monkeypatch, tmp_path):
    from launch import config_file
    from trainer.config import RunConfig

    run = config_file.load(modes.config("refused-file"), [], RunConfig)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    agreed = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.3,
        "bf16": {"enabled": False}, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(agreed))
    zero.check(run)
    assert zero.stage() == 3
    assert zero.is_offloaded()
    for change, said in (
        ({"train_batch_size": 16}, r"train_batch_size: 16 found in the launch config, but batch\.rows is 4"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled: True found in the launch config, but precision\.type is fp32"),
        ({"optimizer": {"type": "Lion"}}, r"optimizer: .*Lion.* found in the launch config, but optim\.type is adamw"),
    ):
        (tmp_path / "ds.json").write_text(json.dumps(agreed | change))
        with pytest.raises(BadInput, match=said):
            zero.check(run)


def test_deepspeed_on_more_processes_than_rows_is_refused_by_the_rows(modes, monkeypatch):
    from launch import config_file
    from trainer.config import RunConfig

    run = config_file.load(modes.config("refused-rows", batch={"micro_rows": None}), [], RunConfig)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(BadInput, match=r"batch\.rows: 4 rows cannot be shared by 8 processes; use a multiple of it"):
        zero.check(run)


def test_an_offload_that_the_machine_has_no_memory_for_is_refused(monkeypatch):
    monkeypatch.setattr(zero, "free_bytes", lambda *_, **__: 1000)
    model = torch.nn.Linear(25, 10, bias=False)  # 250 weights, 16 bytes each, on 2 ranks: 2,000 bytes
    with pytest.raises(BadInput, match="cpu found, which takes 2 KiB of memory for each process"):
        zero.check_space_for_offload(model, world_size=2)
    zero.check_space_for_offload(model, world_size=4)


def test_the_private_names_of_deepspeed_that_checkpoints_use_are_there():
    """A newer DeepSpeed that renames one shows here by name, and not as a checkpoint that cannot be read."""
    import inspect

    import deepspeed
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stage2
    from deepspeed.utils import mixed_precision_linkage
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    assert deepspeed.__version__.startswith("0.19."), "run tests/distributed with the new one, and then say so here"
    for kind, methods, fields in (
        (Stage2, ["_lazy_init_hp_params_optimizer_state", "update_lp_params"],
         ["_hp_optimizer_states_linked", "single_partition_of_fp32_groups", "averaged_gradients"]),
        (Stage3, ["_get_fp32_opt_state_partition", "_partition_all_parameters",
                  "_reassign_or_swap_out_partitioned_parameters"],
         ["fp32_partitioned_groups_flat", "averaged_gradients"]),
    ):  # fmt: skip
        assert all(callable(getattr(kind, name, None)) for name in methods), kind
        assert all(f"self.{name} =" in inspect.getsource(kind) for name in fields), kind
    # Stages 1 and 2 hang these on each weight; `get_hp_fragment` finds its part of the fp32 copy.
    assert "lp_param._hp_mapping =" in inspect.getsource(mixed_precision_linkage)
    assert "lp_fragment_address" in tensor_fragment.__dataclass_fields__
    assert list(inspect.signature(tensor_fragment.get_hp_fragment).parameters) == [
        "self", "optim_state_key",
    ]  # fmt: skip
    assert {"start", "numel"} <= fragment_address.__dataclass_fields__.keys()
    assert "param.ds_tensor" in inspect.getsource(partition_parameters)
    assert "param.ds_shape" in inspect.getsource(partition_parameters)
    assert list(inspect.signature(Stage3._get_fp32_opt_state_partition).parameters)[1:] == [
        "param", "release_swap_buffers", "optim_state_key",
    ]  # fmt: skip
    assert shards.FACTOR == "factor", "a name that checkpoints already written have"
