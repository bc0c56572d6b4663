"""Layers that are alike are traced once and repeated in the graph: an export costs as much for 30 layers as for one.

The layers of one kind differ in nothing but the names of their weights. While the model is traced it has one layer of
each kind, between two marks; `repeat` then takes what lies between the marks for each layer that the model really has.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import onnx_ir as ir
import torch

_DOMAIN = "trivet.mark"
_BEGIN, _END = "Begin", "End"
_NUMBERS_OF_A_LAYER = {"layer_idx", "layer_id"}
_OF_THE_CACHE = ("past_", "present_")
_OF_EVERY_MODULE = vars(torch.nn.Module()).keys()


class CannotRepeat(Exception):
    """The traced layers do not lie one after another, or have something to do with each other: trace them all."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model: `path` of their list in it, and for each the first one that is of its kind."""

    path: str
    first_alike: list[int]

    @property
    def traced(self) -> list[int]:
        """The layers that stand for all."""
        return sorted(set(self.first_alike))

    def weights(self, layer: int) -> str:
        """Return what the names of a layer's weights begin with."""
        return f"{self.path}.{layer}."

    def renamed(self, name: str, traced: int, layer: int) -> str:
        """Return the name in `layer` for that of a weight or a part of the cache in a traced layer; others stay."""
        if name.startswith(self.weights(traced)):
            return self.weights(layer) + name.removeprefix(self.weights(traced))
        if name.startswith(_OF_THE_CACHE) and name.endswith(f".{traced}"):
            return f"{name.removesuffix(f'.{traced}')}.{layer}"
        return name


def find_layers(model: torch.nn.Module, num_layers: int, asks: Sequence[Any] = ()) -> Layers | None:
    """Return the layers of `model`, None where they are not one list of that many modules.

    `asks`: for each layer something more that must be equal in layers of one kind.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    if len(lists) != 1:
        return None
    [(path, layers)] = lists
    kinds: dict[Any, int] = {}
    first_alike = []
    for layer, module in enumerate(layers):
        kind = (_kind(module), asks[layer] if asks else None)
        first_alike.append(kinds.setdefault(kind, layer))
    return Layers(path, first_alike)


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Return everything about a layer that its forward may depend on, but the values of its weights."""
    described: list[Any] = []
    for path, module in layer.named_modules():
        settings = {
            name: _described(value)
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and name not in _NUMBERS_OF_A_LAYER
        }
        described.append((path, type(module), tuple(sorted(settings.items(), key=lambda item: item[0]))))
    described += [(name, tuple(each.shape), each.dtype) for name, each in layer.named_parameters()]
    described += [(name, each.numpy(force=True).tobytes()) for name, each in layer.named_buffers()]
    return tuple(described)


def _described(value: Any) -> Any:
    """Return what is equal for equal settings; of what cannot be told, who it is."""
    match value:
        case bool() | int() | float() | str() | None:
            return value
        case tuple() | list():
            return tuple(_described(each) for each in value)
        case functools.partial():
            return (_described(value.func), _described(value.args), _described(sorted(value.keywords.items())))
        case MethodType():
            return value.__func__  # of the module itself, which is described
    return id(value)


@contextmanager
def one_of_each_kind(model: torch.nn.Module, layers: Layers) -> Iterator[None]:
    """While open, the model has only the layers that are traced, each between its marks."""
    held = model.get_submodule(layers.path)
    assert isinstance(held, torch.nn.ModuleList)
    everyone, config = list(held), getattr(getattr(model, "model", model), "config", None)
    changed = {
        name: value
        for name in ("num_hidden_layers", "layer_types")
        if (value := getattr(config, name, None)) is not None
    }
    for number in layers.traced:
        everyone[number].forward = _marked(everyone[number].forward, number)
    held._modules = {str(number): everyone[number] for number in layers.traced}
    try:
        for name, value in changed.items():
            few = len(layers.traced) if isinstance(value, int) else [value[number] for number in layers.traced]
            setattr(config, name, few)  # where models look a layer up by its position
        yield
    finally:
        held._modules = {str(position): module for position, module in enumerate(everyone)}
        for name, value in changed.items():
            setattr(config, name, value)
        for number in layers.traced:
            del everyone[number].forward


def _marked(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def between_marks(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_mark(args[0], _BEGIN, number), *args[1:])
        else:
            kwargs["hidden_states"] = _mark(kwargs["hidden_states"], _BEGIN, number)
        found = forward(*args, **kwargs)
        if isinstance(found, tuple):
            return (_mark(found[0], _END, number), *found[1:])
        return _mark(found, _END, number)

    return between_marks


def _mark(hidden: torch.Tensor, which: str, number: int) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{which}", (hidden,), attrs={"layer": number}, dtype=hidden.dtype, shape=hidden.shape, version=1
    )


def repeat(model: ir.Model, layers: Layers) -> ir.Model:
    """Put every layer of `layers` where the traced ones are, in the order of the model, and return it.

    Inputs and outputs of other layers are added after the traced ones', weights as inputs too. Raises CannotRepeat,
    with the graph as it was.
    """
    graph = model.graph
    bodies = {number: _Body.find(graph, layers, number) for number in layers.traced}
    _check_closed(graph, bodies)
    inside = {node for body in bodies.values() for node in (*body.nodes, body.begin, body.end)}
    after = _reached([body.end.outputs[0] for body in bodies.values()], stop=lambda node: node in inside)
    rest = [node for node in graph if node not in inside]
    first, last = bodies[layers.traced[0]], bodies[layers.traced[-1]]
    hidden = first.begin.inputs[0]
    copies: list[ir.Node] = []
    outputs: dict[str, ir.Value] = {}
    copy_of = _Copies(graph, layers)
    for layer, traced in enumerate(layers.first_alike):
        hidden, nodes, found = copy_of.body(bodies[traced], layer, hidden)
        copies += nodes
        outputs |= found
    last.end.outputs[0].replace_all_uses_with(hidden, replace_graph_outputs=True)
    of_no_layer = [value for value in graph.outputs if value.producer() not in inside]
    graph.outputs[:] = [*of_no_layer, *outputs.values()]
    graph.remove(inside, safe=True)
    graph.remove(rest, safe=False)  # to come back around the copies
    before = [node for node in rest if node not in after]
    graph.extend([*before, *copies, *(node for node in rest if node in after)])
    return model


@dataclass(frozen=True)
class _Body:
    """What lies between the marks of a traced layer, in the graph's order."""

    number: int
    begin: ir.Node
    end: ir.Node
    nodes: list[ir.Node]

    @classmethod
    def find(cls, graph: ir.Graph, layers: Layers, number: int) -> "_Body":
        marks = [node for node in graph if node.domain == _DOMAIN and node.attributes["layer"].as_int() == number]
        if [node.op_type for node in marks] != [_BEGIN, _END]:
            raise CannotRepeat(f"layer {number} is not run once")
        begin, end = marks
        weights = [value for value in graph.inputs if (value.name or "").startswith(layers.weights(number))]
        reached = _reached([begin.outputs[0], *weights], stop=lambda node: node is end)
        cache = [value for value in graph.outputs if layers.renamed(value.name or "", number, -1) != value.name]
        needed = _needed([*end.inputs, *cache])
        return cls(number, begin, end, [node for node in graph if node in reached and node in needed])


def _needed(values: Sequence[ir.Value | None]) -> set[ir.Node]:
    """Return the nodes that these values depend on."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in found:
            found.add(node)
            waiting += node.inputs
    return found


def _reached(values: Sequence[ir.Value], stop: Callable[[ir.Node], bool]) -> set[ir.Node]:
    """Return the nodes that depend on these values, without those that `stop` and what only depends on them."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        for node in waiting.pop().consumers():
            if node not in found and not stop(node):
                found.add(node)
                waiting += node.outputs
    return found


def _check_closed(graph: ir.Graph, bodies: dict[int, _Body]) -> None:
    """Raise CannotRepeat unless the bodies follow each other and give nothing else to anybody but graph outputs."""
    chain = list(bodies.values())
    for earlier, later in itertools.pairwise(chain):
        if later.begin.inputs[0] is not earlier.end.outputs[0]:
            raise CannotRepeat(f"layer {later.number} does not follow layer {earlier.number}")
    for body in chain:
        own = {*body.nodes, body.end}
        for node in body.nodes:
            if any(user not in own for value in node.outputs for user in value.consumers()):
                raise CannotRepeat(f"{node.op_type} of layer {body.number} is used outside of it")
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in _attributes(node)
            ):
                raise CannotRepeat(f"{node.op_type} of layer {body.number} has a graph of its own")


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


class _Copies:
    """Copies of a traced layer's nodes for other layers."""

    def __init__(self, graph: ir.Graph, layers: Layers) -> None:
        self._graph, self._layers = graph, layers
        self._inputs = {value.name: value for value in graph.inputs}
        self._outputs = {value: value.name or "" for value in graph.outputs}

    def body(self, body: _Body, layer: int, hidden: ir.Value) -> tuple[ir.Value, list[ir.Node], dict[str, ir.Value]]:
        """Return what comes out of the layer for `hidden`, its nodes, and the graph's outputs among theirs by name."""
        copied: dict[ir.Value, ir.Value] = {body.begin.outputs[0]: hidden}
        nodes, outputs = [], {}
        for node in body.nodes:
            inputs = [value and copied.get(value, value) for value in node.inputs]
            inputs = [value and self._of_layer(value, body.number, layer) for value in inputs]
            new = ir.Node(
                node.domain, node.op_type, inputs, _attributes(node), num_outputs=len(node.outputs),
                version=node.version, name=f"layer.{layer}.{node.name}",
            )  # fmt: skip
            for old, value in zip(node.outputs, new.outputs, strict=True):
                value.shape, value.type, copied[old] = old.shape, old.type, value
                value.name = f"layer.{layer}.{old.name}"
                if old in self._outputs:
                    value.name = self._layers.renamed(self._outputs[old], body.number, layer)
                    outputs[value.name] = value
            nodes.append(new)
        end = body.end.inputs[0]
        assert end is not None
        return copied.get(end, end), nodes, outputs

    def _of_layer(self, value: ir.Value, traced: int, layer: int) -> ir.Value:
        """Return the input or initializer of `layer` that stands for `value` of the traced one."""
        if value.producer() is not None or not value.name:
            return value
        name = self._layers.renamed(value.name, traced, layer)
        if name == value.name:
            return value
        if name not in self._inputs:
            self._inputs[name] = ir.Value(name=name, shape=value.shape, type=value.type)
            self._graph.inputs.append(self._inputs[name])
        return self._inputs[name]
