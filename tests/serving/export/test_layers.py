"""One layer of each kind is traced and repeated: the graph answers as the module with all its layers does."""

import functools
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from serving.export.layers import CannotRepeat, Layers, find_layers, one_of_each_kind, repeat
from serving.export.trace import Example, give_weights, graph_of, trace
from serving.export_paths import ExportError


class Layer(torch.nn.Module):
    def __init__(self, number: int, sign: float) -> None:
        super().__init__()
        self.layer_idx, self.sign = number, sign
        self.linear = torch.nn.Linear(4, 4)
        self.act = functools.partial(torch.nn.functional.gelu, approximate="tanh")

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.sign * self.act(self.linear(hidden_states + shift))


class Stack(torch.nn.Module):
    def __init__(self, signs: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer(number, sign) for number, sign in enumerate(signs))
        self.last = torch.nn.Linear(4, 2)
        self.config = SimpleNamespace(num_hidden_layers=len(signs), layer_types=[str(sign) for sign in signs])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        shift = rows.mean(-1, keepdim=True)  # what all layers read
        for position, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            assert self.config.layer_types[position] == str(layer.sign)
            rows = layer(rows, shift)
        return self.last(rows)


class Wrapped(torch.nn.Module):
    """As the exporters' wrappers: the model is below it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(rows)


EXAMPLE = Example({"rows": torch.ones(3, 4)}, {"rows": {0: torch.export.Dim("batch")}}, ["rows"], ["answer"])


def traced(module: torch.nn.Module, layers: Layers) -> ir.Model:
    with one_of_each_kind(module, layers):
        return repeat(trace(module, EXAMPLE), layers)


@pytest.mark.parametrize(
    ("signs", "first_alike"),
    [([1.0] * 5, [0] * 5), ([1.0, -1.0, -1.0, 1.0], [0, 1, 1, 0]), ([1.0, 2.0, 3.0], [0, 1, 2])],
    ids=["alike", "two kinds in turns", "all different"],
)
def test_the_graph_answers_as_all_layers_do(signs, first_alike):
    module = Wrapped(Stack(signs))
    layers = find_layers(module, len(signs))
    assert layers == Layers("model.layers", first_alike)
    model = traced(module, layers)
    give_weights(model, module)
    rows = torch.randn(7, 4)
    [found] = ReferenceEvaluator(ir.to_proto(model)).run(None, {"rows": rows.numpy()})
    np.testing.assert_allclose(found, module(rows).detach().numpy(), atol=1e-6)
    assert [value.name for value in model.graph.inputs] == ["rows"]
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert {f"model.layers.{number}.linear.weight" for number in range(len(signs))} <= used


def test_the_model_is_whole_again_also_after_an_error():
    module = Wrapped(Stack([1.0, -1.0, 1.0]))
    before, rows = dict(module.named_parameters()), torch.randn(2, 4)
    answer = module(rows)
    layers = find_layers(module, 3)
    module.model.last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ExportError, match="ZeroDivisionError: division by zero"):
        traced(module, layers)
    module.model.last._forward_hooks.clear()
    assert dict(module.named_parameters()).keys() == before.keys()
    assert torch.equal(module(rows), answer)
    assert (module.model.config.num_hidden_layers, len(module.model.config.layer_types)) == (3, 3)


def test_what_a_layer_is_asked_beside_its_own_settings_makes_a_kind():
    module = Wrapped(Stack([1.0] * 3))
    assert find_layers(module, 3, asks=["wide", "wide", "narrow"]).first_alike == [0, 0, 2]


def test_a_buffer_with_other_values_makes_a_kind():
    module = Wrapped(Stack([1.0] * 3))
    for number, layer in enumerate(module.model.layers):
        layer.register_buffer("slope", torch.tensor(float(number // 2)))
    assert find_layers(module, 3).first_alike == [0, 0, 2]


def test_layers_that_are_no_list_of_their_own_are_not_found():
    module = Wrapped(Stack([1.0] * 3))
    assert find_layers(module, 4) is None
    module.model.more = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    assert find_layers(module, 3) is None


def test_a_layer_that_gives_others_more_than_its_result_is_not_repeated():
    class Leaks(Stack):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            self.layers[0].linear.register_forward_hook(lambda module, given, found: seen.append(found))
            seen: list[torch.Tensor] = []
            answer = super().forward(rows)
            return answer + seen[0].sum(-1, keepdim=True)

    module = Wrapped(Leaks([1.0] * 2))
    layers = find_layers(module, 2)
    with pytest.raises(CannotRepeat, match="of layer 0 is used outside of it"):
        traced(module, layers)


def test_a_layer_that_is_run_twice_is_not_repeated():
    class Twice(Stack):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            shift = rows.mean(-1, keepdim=True)
            for layer in [*self.layers, *self.layers]:
                rows = layer(rows, shift)
            return self.last(rows)

    module = Wrapped(Twice([1.0, -1.0]))
    with pytest.raises(CannotRepeat):
        traced(module, find_layers(module, 2))
    ran = []
    model = graph_of(module, 2, lambda layers: ran.append(list(layers)) or EXAMPLE)
    rows = torch.randn(7, 4)
    [found] = ReferenceEvaluator(ir.to_proto(model)).run(None, {"rows": rows.numpy()})
    np.testing.assert_allclose(found, module(rows).detach().numpy(), atol=1e-6)
    assert ran == [[0, 1], [0, 1]], "once with marks, and then all of it as it is"


def test_repeat_leaves_a_graph_that_it_refuses_as_it_was():
    module = Wrapped(Stack([1.0, -1.0]))
    layers = find_layers(module, 2)
    with one_of_each_kind(module, layers):
        model = trace(module, EXAMPLE)
    nodes = list(model.graph)
    with pytest.raises(CannotRepeat):
        repeat(model, Layers(layers.path, [0, 5]))
    assert list(model.graph) == nodes
