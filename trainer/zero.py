"""DeepSpeed's settings: what a launch config may say, and what follows from the run config. Set nowhere else.

The launch config owns stage and offload; the run config owns batch, clipping, precision and optimizer.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from serving.directory import BadInput
from trainer import modes
from trainer.config import RunConfig
from trainer.free_memory import free_bytes
from trainer.out_of_memory import in_words

_ENVIRONMENT = "ACCELERATE_DEEPSPEED_"
_UNSET = ("", "none", "auto")
_LARGEST_BUCKET = 500_000_000  # DeepSpeed's own; as large as this it reserves it, however few gradients there are
_ALIGNED = 64  # numbers: DeepSpeed wants an even count, memory likes a cache line
_KEPT_WHOLE = 10  # times the width of the model: smaller weights (norms, biases) are cheaper to keep than to gather
_BYTES_OFFLOADED = 16  # of each weight that learns: its fp32 copy, its gradient, two moments


def check(config: RunConfig) -> None:
    """Raise BadInput where the launch config contradicts the run config, or asks for what is not supported.

    And where the ranks that were started cannot share the batch, from which DeepSpeed's numbers follow.
    """
    settings = _own_settings()
    offload = {key: str(_at(settings, key) or "none").lower() for key in _OFFLOAD}
    for key, device in offload.items():
        if device not in ("none", "cpu"):
            raise BadInput(f"{key}: {device} found in the launch config; accepted: none, cpu")
    for key, said, value in _owned_by_the_run(config):
        found = _at(settings, key)
        if found is not None and str(found).lower() not in _UNSET and not _same(found, value):
            raise BadInput(
                f"{key}: {found} found in the launch config, but {said}; the run config owns it: remove {key} from the "
                "launch config"
            )


def stage() -> int:
    """Return the stage that the launch config asks for."""
    in_file = _at(_file(), "zero_optimization.stage")
    return int(in_file if in_file is not None else os.environ.get(f"{_ENVIRONMENT}ZERO_STAGE", 2))


def is_offloaded() -> bool:
    """Return whether the launch config moves anything from the GPU to the memory of the machine."""
    settings = _own_settings()
    return any(str(_at(settings, key) or "none").lower() == "cpu" for key in _OFFLOAD)


def check_space_for_offload(model: torch.nn.Module, *, world_size: int) -> None:
    """Raise BadInput where the machine has no memory for what is to be moved there."""
    free = free_bytes(torch.device("cpu"), world_size=world_size)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = _BYTES_OFFLOADED * learning // world_size
    if free is not None and needed > free:
        raise BadInput(
            f"offload_optimizer_device: cpu found, which takes {in_words(needed)} of memory for each process, but "
            f"{in_words(free)} can be had; use more machines, strategy.type=lora, or a smaller model"
        )


def derive(
    settings: dict[str, Any], config: RunConfig, model: torch.nn.Module, *, micro_rows: int, world_size: int
) -> int:
    """Fill in DeepSpeed's `settings` what follows from the run config; return the accumulation."""
    accumulation = config.batch.rows // (micro_rows * world_size)
    settings["train_micro_batch_size_per_gpu"] = micro_rows
    settings["gradient_accumulation_steps"] = accumulation
    settings["gradient_clipping"] = config.optim.max_grad_norm
    settings["zero_force_ds_cpu_optimizer"] = False  # its own Adam is compiled at the first start, for minutes
    zero = settings["zero_optimization"]
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    bucket = min(_LARGEST_BUCKET, -(-learning // _ALIGNED) * _ALIGNED)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(key, bucket)
    if int(zero["stage"]) == 3:
        width = getattr(getattr(model, "config", None), "hidden_size", 0)
        zero.setdefault("stage3_param_persistence_threshold", _KEPT_WHOLE * width)
        zero.setdefault("stage3_prefetch_bucket_size", bucket // 10)
    return accumulation


def divide(model: torch.nn.Module, settings: dict[str, Any], precision: str) -> None:
    """Divide the weights for stage 3, one by one: the engine would first move the whole model to each GPU."""
    from deepspeed.runtime.zero.partition_parameters import Init

    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization")
    own = {name: settings[name] for name in names} | {"bf16": {"enabled": precision == "bf16"}}
    Init(module=model, config_dict_or_path=own, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)


_OFFLOAD = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")


def _owned_by_the_run(config: RunConfig) -> list[tuple[str, str, Any]]:
    """What DeepSpeed has a name of its own for, what the run config says of it, and what it should be then."""
    batch, precision = config.batch, config.precision.type
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro_rows = modes.micro_rows(config, world_size)
    accumulation, optim = batch.rows // (micro_rows * world_size), config.optim
    return [
        ("train_batch_size", f"batch.rows is {batch.rows}", batch.rows),
        ("train_micro_batch_size_per_gpu", f"batch.micro_rows is {micro_rows}", micro_rows),
        ("gradient_accumulation_steps", f"batch.rows and batch.micro_rows make it {accumulation}", accumulation),
        ("gradient_clipping", f"optim.max_grad_norm is {optim.max_grad_norm}", optim.max_grad_norm),
        ("bf16.enabled", f"precision.type is {precision}", precision == "bf16"),
        ("fp16.enabled", f"precision.type is {precision}", False),
        ("optimizer", f"optim.type is {optim.type}", optim.type),
        ("scheduler", f"optim.schedule is {optim.schedule}", optim.schedule),
    ]


def _own_settings() -> dict[str, Any]:
    """What the launch config says of DeepSpeed, by DeepSpeed's names: its file, or the fields of Accelerate's."""
    if found := _file():
        return found
    names = {
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    }
    devices = {key: os.environ.get(f"{_ENVIRONMENT}{key.split('.')[1].upper()}_DEVICE") for key in _OFFLOAD}
    zero = {key.split(".")[1]: {"device": device} for key, device in devices.items()}
    return {**{key: os.environ.get(name) for key, name in names.items()}, "zero_optimization": zero}


def _file() -> dict[str, Any]:
    path = os.environ.get(f"{_ENVIRONMENT}CONFIG_FILE", "none")
    if path.lower() in _UNSET:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"deepspeed_config_file: {path} cannot be read ({error}); mend it, or use zero_stage") from None
    if not isinstance(content, dict):
        raise BadInput(f"deepspeed_config_file: {path} holds no object; mend it, or use zero_stage")
    return content


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, bool) or isinstance(found, bool):
        return str(found).lower() == str(value).lower()
    try:
        return float(found) == float(value)
    except (TypeError, ValueError):
        return found == value
