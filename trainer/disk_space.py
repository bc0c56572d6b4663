"""Room on the disk for what a run will write: looked at before step 0, and again before its last checkpoint."""

import os
import shutil
from pathlib import Path

import torch

from serving.directory import BadInput
from trainer.config import Optim, RunConfig
from trainer.optim import state_numel
from trainer.out_of_memory import in_words

_FP32_BYTES = 4


def check(config: RunConfig, model: torch.nn.Module) -> str:
    """Raise BadInput if not even the model can be written; return a warning if the checkpoints may not be."""
    folder, free = config.run.folder, free_bytes(config.run.folder)
    if free is None:
        return ""
    found, count = f"{in_words(free)} is free there", num_checkpoints(config)
    if model_bytes(model) > free:
        raise BadInput(
            f"run.dir: {folder} has no room for the model, which needs {in_words(model_bytes(model))}; {found}; "
            "free some space or choose another run.dir"
        )
    one = checkpoint_bytes(model, config.optim)
    already = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed = model_bytes(model) + max(0, count * one - already)
    if needed <= free:
        return ""
    kept = f"{count} checkpoints at a time" if config.checkpoint.every else "the last checkpoint"
    return (
        f"warning: run.dir: {folder} may have no room for {kept} and the model, which need {in_words(needed)}; "
        f"{found}; free some space{', lower checkpoint.keep' if config.checkpoint.every else ''} or choose another "
        "run.dir"
    )


def has_room_for_one_more(config: RunConfig, model: torch.nn.Module) -> bool:
    """Whether a checkpoint and then the model can be written, as far as anybody says."""
    free = free_bytes(config.run.folder)
    return free is None or checkpoint_bytes(model, config.optim) + model_bytes(model) <= free


def num_checkpoints(config: RunConfig) -> int:
    """Return how many lie there at a time: one more than are kept, or just the last one; and the best."""
    return (config.checkpoint.keep + 1 if config.checkpoint.every else 1) + config.checkpoint.best


def model_bytes(model: torch.nn.Module) -> int:
    """Return the size of the model directory's weights: of a LoRA, the merged model and the adapter."""
    return sum(parameter.nbytes for parameter in model.parameters()) + _buffer_bytes(model)


def checkpoint_bytes(model: torch.nn.Module, optim: Optim) -> int:
    """Return the size of a checkpoint: each weight that learns, and what the optimizer keeps, in fp32."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _FP32_BYTES * (learning + state_numel(model, optim)) + _buffer_bytes(model)


def free_bytes(folder: Path) -> int | None:
    """Return what is free on the disk where `folder` lies, or will lie; None where nobody says."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)), None)
    try:
        usage = shutil.disk_usage(place or "/")
    except OSError:
        return None
    return usage.free if usage.total else None


def _buffer_bytes(model: torch.nn.Module) -> int:
    saved = model.state_dict(keep_vars=True).keys()
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name in saved)
