"""LoRA adapters kept beside their base in one graph.

The update of a row is (x A[index]) B[index]: `lora_index` picks an adapter for each row of a batch, 0 none. B holds the
adapter's true scale; ranks are padded with zeros to the largest, and so is a layer that only some adapters change.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.export import lora_folder
from serving.export.adapters import Adapter
from serving.export_paths import ExportError
from serving.loras import STACKS


class Selection:
    """Which adapter each row of the batch takes; set before the model runs."""

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None


class WithLoras(torch.nn.Module):
    """A layer, and beside it the updates of all adapters."""

    def __init__(self, layer: torch.nn.Module, selection: Selection, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.selection = layer, selection
        self.lora_A = torch.nn.Parameter(a, requires_grad=False)
        self.lora_B = torch.nn.Parameter(b, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer says, with each row's update."""
        index, output = self.selection.index, self.layer(x)
        assert index is not None
        rows = x if x.dim() == 3 else x.reshape(index.shape[0], -1, x.shape[-1])  # some models flatten the batch
        update = torch.matmul(torch.matmul(rows, self.lora_A[index]), self.lora_B[index])
        return output + (update if x.dim() == 3 else update.reshape(output.shape))


def check_fits(config: PreTrainedConfig, adapters: Sequence[Adapter]) -> None:
    """Raise ExportError, before the weights are read, where an adapter updates what the base has not."""
    if not adapters:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for adapter in adapters:
        for name, (a, b) in adapter.updates.items():
            try:
                found = _sizes(model.get_submodule(name))
            except AttributeError:
                found = None
            if found != (a.shape[0], b.shape[1]):
                has = f"has it as {found[0]} x {found[1]}" if found else "has no such linear layer"
                raise ExportError(
                    f"--loras: {adapter.folder} updates {name}, {a.shape[0]} x {b.shape[1]}, but this model {has}: it "
                    f"was trained on another base ({adapter.base})"
                )


def put_into(model: PreTrainedModel, adapters: Sequence[Adapter], selection: Selection) -> None:
    """Put the updates of all adapters beside the layers of `model`, which they fit."""
    rank = max(adapter.rank for adapter in adapters)
    for name in sorted({name for adapter in adapters for name in adapter.updates}):
        layer = model.get_submodule(name)
        sizes = _sizes(layer)
        assert sizes is not None
        a, b = torch.zeros(len(adapters) + 1, sizes[0], rank), torch.zeros(len(adapters) + 1, rank, sizes[1])
        for index, adapter in enumerate(adapters, 1):
            if name in adapter.updates:
                left, right = adapter.updates[name]
                a[index, :, : left.shape[1]], b[index, : right.shape[0]] = left, right
        model.set_submodule(name, WithLoras(layer, selection, a.to(model.dtype), b.to(model.dtype)))


@contextmanager
def merged(model: PreTrainedModel, adapter: Adapter, base: Path) -> Iterator[None]:
    """While open, the adapter is merged into `model`, of `base`, by PEFT: what the graph is compared with.

    Afterwards the model is as it was, bit for bit. Raises ExportError where the adapter does not fit, or where what
    lies beside it says that the base has changed since.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ExportError("--loras: needs PEFT, which merges for the proof; run: pip install 'trivet[train]'") from None
    layers = {model.get_submodule(name) for name in adapter.updates}
    weights = {layer: (layer.weight, layer.weight.data) for layer in layers}
    for weight, values in weights.values():
        weight.data = values.clone()
    lora_folder.apply(model, adapter.folder, base)
    lora_folder.merge(model, adapter.folder, base)
    try:
        yield
    finally:
        for layer, (weight, values) in weights.items():
            layer.weight, weight.data = weight, values  # of a tied head the merged weight is another one
        del model.peft_config  # or the next one would be put beside it


def _sizes(layer: torch.nn.Module) -> tuple[int, int] | None:
    """Return how many numbers go into a linear layer and come out, None for another one."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return (layer.in_features, layer.out_features) if isinstance(layer, torch.nn.Linear) else None


def stacks_as_inputs(model: ir.Model, folder: Path) -> None:
    """Make inputs of the adapters' stacks, and write their values to `folder`."""
    stacks = {}
    for name, value in list(model.graph.initializers.items()):
        if name.endswith((".lora_A", ".lora_B")):
            stacks[name] = value.const_value.numpy()
            del model.graph.initializers[name]
            value.const_value, value.shape = None, ir.Shape(["adapters", *value.shape[1:]])
            model.graph.inputs.append(value)
    write_stacks(stacks, folder)


def write_stacks(stacks: dict[str, np.ndarray], folder: Path) -> None:
    """Write the adapters' stacks to `folder`: see serving/loras.py."""
    half = ir.DataType.BFLOAT16.numpy()
    plain = {name: values.view("uint16") if values.dtype == half else values for name, values in stacks.items()}
    (folder / STACKS).write_bytes(save(plain))
