"""Tables of the cosines and sines of rotary embeddings, a row for each position."""

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from serving.export.patterns import initializer
from serving.export.rotation import Rotation


class RotaryTables:
    """Tables [positions, half the rotated size] of the cosines and sines that the graph computes from positions."""

    def __init__(self, model: ir.Model, num_positions: int) -> None:
        self._model, self._num_positions = model, num_positions
        self._found: dict[tuple[ir.Value, ir.Value, bool], tuple[ir.Value, ir.Value] | None] = {}
        self._tables: list[ir.Value] = []

    def of(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | None:
        """Return both tables, None where they depend on more than the position, or differ within a pair."""
        asked = rotation[1:]
        if asked not in self._found:
            self._found[asked] = self._computed(rotation)
        return self._found[asked]

    def _computed(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | None:
        values = [rotation.cos, rotation.sin]
        part = ir.convenience.extract(self._model.graph, self._inputs(*values), values)
        if [value.name for value in part.inputs] != ["position_ids"]:
            return None
        proto = ir.to_proto(ir.Model(part, ir_version=self._model.ir_version))
        tables = []
        for table in ReferenceEvaluator(proto).run(None, {"position_ids": np.arange(self._num_positions)[None]}):
            if table.size != self._num_positions * table.shape[-1] or table.shape[-1] % 2:
                return None
            rows = table.reshape(self._num_positions, -1)
            one, other = (rows[:, ::2], rows[:, 1::2]) if rotation.of_neighbours else np.split(rows, 2, axis=1)
            if (one != other).any():
                return None
            tables.append(one)
        cos, sin = tables
        return self._initializer("rotary_cos", cos, rotation.rows), self._initializer("rotary_sin", sin, rotation.rows)

    def _inputs(self, *values: ir.Value) -> list[ir.Value]:
        """Return the inputs of the graph that these values are computed from."""
        found, waiting = set(), list(values)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                maker = value.producer()
                waiting += [each for each in maker.inputs if each is not None] if maker is not None else []
        return [value for value in self._model.graph.inputs if value in found]

    def _initializer(self, name: str, table: np.ndarray, like: ir.Value) -> ir.Value:
        """Return an initializer that holds the table: one for all that are equal."""
        assert like.dtype is not None
        table = np.ascontiguousarray(table, like.dtype.numpy())
        for known in self._tables:
            if known.dtype == like.dtype and np.array_equal(known.const_value.numpy(), table):
                return known
        name = f"{name}_{len(self._tables)}"
        tensor = ir.Tensor(table, dtype=like.dtype, name=name)
        self._tables.append(initializer(self._model.graph, tensor))
        return self._tables[-1]
