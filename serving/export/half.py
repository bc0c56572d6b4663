"""Half precision: whether a model's numbers fit into it, and the model as it is traced in it.

Normalisations, softmax and rotary angles stay in fp32, as transformers computes them for a model in half precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from serving.export_options import Dtype
from serving.export_paths import ExportError

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST = {dtype: torch.finfo(TORCH_DTYPES[dtype]).max for dtype in ("fp16",)}  # the others reach as far as fp32


def check_weights(model: PreTrainedModel, dtype: Dtype) -> None:
    """Raise ExportError, naming it, for a weight that `dtype` cannot hold."""
    if (largest := _LARGEST.get(dtype)) is None:
        return
    for name, weight in model.named_parameters():
        if (found := max(abs(float(end)) for end in torch.aminmax(weight))) > largest:
            raise ExportError(f"--dtype {dtype}: the weight {name} holds {found:.3g}, {_beyond(largest)}")


@contextmanager
def watched(model: PreTrainedModel, dtype: Dtype) -> Iterator[None]:
    """While open, note what every part of the fp32 `model` answers; then raise ExportError if `dtype` cannot hold it.

    The CPU computes much of fp16 in fp32 and would hide what overflows on a GPU.
    """
    if (largest := _LARGEST.get(dtype)) is None:
        yield
        return
    peaks: dict[str, float] = {}

    def note(name: str) -> Any:
        def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            answer = output[0] if isinstance(output, tuple) else output
            if isinstance(answer, torch.Tensor) and answer.is_floating_point() and answer.numel():
                peaks[name] = max(peaks.get(name, 0.0), float(answer.abs().max()))

        return after

    hooks = [each.register_forward_hook(note(name)) for name, each in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if too_large := {name: peak for name, peak in peaks.items() if peak > largest}:
        first = next(iter(too_large))
        raise ExportError(
            f"--dtype {dtype}: {first} answers {too_large[first]:.3g} to the texts of the proof, {_beyond(largest)}"
        )


def hollow(model: PreTrainedModel, dtype: Dtype) -> None:
    """Give the model weights in `dtype` that take no memory: to be traced, not to compute. Buffers stay as they are."""
    for weight in model.parameters():
        weight.data = torch.zeros((), dtype=TORCH_DTYPES[dtype]).expand(weight.shape)


def _beyond(largest: float) -> str:
    return f"beyond {largest:g}, the largest number of that format; use --dtype fp32, or bf16 for a GPU"
