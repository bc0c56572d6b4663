"""From a torch module to an onnx_ir graph: traced, tidied, and each layer as often as the model has it."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from transformers.utils import logging as transformers_logging

from serving.export.layers import CannotRepeat, find_layers, one_of_each_kind, repeat
from serving.export_paths import ExportError

OPSET = 21


class Example(NamedTuple):
    """What a module is traced with: inputs, which of their sizes may change, and the graph's names for it all."""

    inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    input_names: Sequence[str]
    output_names: Sequence[str]


def graph_of(
    module: torch.nn.Module, num_layers: int, example: Callable[[Sequence[int]], Example], *, asks: Sequence[Any] = ()
) -> ir.Model:
    """Return the graph of `module` with its weights, which are the module's own memory until the graph is saved.

    `example` is given the numbers of the layers that run: those that stand for all, or all of them where the module
    does not keep its layers in one list. `asks` is for layers.find_layers. Raises ExportError where the module's own
    code cannot be traced.
    """
    layers = find_layers(module, num_layers, asks)
    model = None
    if layers is not None:
        # Some models have settings for each layer elsewhere than in it, which the few that are traced do not fit.
        with suppress(CannotRepeat, ExportError), one_of_each_kind(module, layers):
            model = repeat(trace(module, example(layers.traced)), layers)
    if model is None:
        model = trace(module, example(range(num_layers)))
    give_weights(model, module)
    return model


def trace(module: torch.nn.Module, example: Example, *, opset: int = OPSET) -> ir.Model:
    """Return the graph of `module`, tidied, whose weights are inputs of it after those named: see `give_weights`."""
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                kwargs=example.inputs,
                dynamo=True,
                dynamic_shapes=example.dynamic_shapes,
                opset_version=opset,
                input_names=example.input_names,
                output_names=example.output_names,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            forget_source_lines(program.model)
            _hide_weights(program.model, module)
            program.optimize()
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"{_name(module)} cannot be traced into a graph ({_reason(error)})") from error
    program.model.opset_imports["com.microsoft"] = 1
    return program.model


def _name(module: torch.nn.Module) -> str:
    return type(getattr(module, "model", module)).__name__


def _reason(error: Exception) -> str:
    """Return the first line of what the tracer stumbled over."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:200]}"


def give_weights(model: ir.Model, module: torch.nn.Module) -> None:
    """Turn the inputs that are named as weights of `module` into initializers with their values."""
    values = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in values]:
        graph.inputs.remove(value)
        value.const_value = TorchTensor(values[value.name], name=value.name)
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
