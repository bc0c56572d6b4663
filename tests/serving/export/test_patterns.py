"""Weights that are computed when they are written: the right values, and never more than some rows at a time."""

import numpy as np
import onnx_ir as ir
import pytest

from serving.export import patterns
from serving.export.patterns import new_weight, weight_of


def weight(graph: ir.Graph, values: np.ndarray) -> ir.Value:
    value = ir.Value(name="w", const_value=ir.Tensor(values, name="w"))
    graph.initializers["w"] = value
    return value


@pytest.fixture
def graph() -> ir.Graph:
    return ir.Graph([], [], nodes=[])


def test_a_weight_is_written_some_rows_at_a_time(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "_WRITTEN_BYTES", 100)
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    source, asked = weight(graph, values), []

    def transposed(some: slice) -> np.ndarray:
        asked.append(len(range(*some.indices(10))))
        return weight_of(source)[:, some].T

    lazy = new_weight(graph, "w.T", source, (10, 6), transposed)
    with (tmp_path / "w").open("wb") as file:
        lazy.const_value.tofile(file)
    assert np.fromfile(tmp_path / "w", np.float32).reshape(10, 6).tolist() == values.T.tolist()
    assert asked == [4, 4, 2], "4 rows of 24 bytes fit into 100"


def test_a_weight_made_of_another_that_is_not_yet_computed_takes_only_its_rows(graph):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    first = new_weight(graph, "first", weight(graph, values), (4, 3), lambda some: values[some] + 1)
    second = new_weight(graph, "second", first, (4, 3), lambda some: 2 * weight_of(first, some))
    assert second.const_value.numpy().tolist() == (2 * (values + 1)).tolist()
    assert weight_of(second, slice(1, 2)).tolist() == [[8, 10, 12]]
