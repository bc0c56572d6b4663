"""From a torch module to an onnx_ir graph: traced, tidied, and each layer as often as the model has it."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from transformers.utils import logging as transformers_logging

from serving.export.layers import Layers, repeat

OPSET = 21


def trace(
    module: torch.nn.Module,
    inputs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    layers: Layers | None = None,
    opset: int = OPSET,
) -> ir.Model:
    """Return the graph of `module`. `layers`: those that stand for others, which are marked; see layers.repeat.

    The weights are not copied: the graph holds the module's own memory until it is saved.
    """
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        forget_source_lines(program.model)
        _hide_weights(program.model, module)
        program.optimize()
    model = program.model
    model.opset_imports["com.microsoft"] = 1
    if layers is not None:
        repeat(model, layers)
    return model


def give_weights(model: ir.Model, module: torch.nn.Module) -> None:
    """Turn the inputs that are named as weights of `module` into initializers with their values."""
    values = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in values]:
        tensor = values[value.name].detach()
        graph.inputs.remove(value)
        value.const_value = TorchTensor(tensor, name=value.name)
        graph.initializers[value.name] = value


def _hide_weights(model: ir.Model, module: torch.nn.Module) -> None:
    """Make inputs of the weights: nothing then depends on their values, and what is tidied holds for any layer."""
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for name, value in list(model.graph.initializers.items()):
        if name in names:
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)


def forget_source_lines(model: ir.Model) -> None:
    """Take the tracer's stack traces out of the graph: they name folders of the machine that exports, and its user."""
    for node in model.graph.all_nodes():
        for each in (node, *node.outputs):
            each.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings, log lines and progress bars; errors still raise."""
    level, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()
