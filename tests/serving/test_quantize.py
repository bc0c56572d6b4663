"""Quantised linear layers and embeddings, each run alone in onnxruntime beside the arithmetic by hand."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from serving.export.quantize import quantize
from serving.export.quantize_blocks import BLOCK, fit_span, in_blocks, numbers

FORMATS = ["int8", "int8-weights", "int4"]


def one_layer(weight_KN: np.ndarray, *, head: bool = False, copies: int = 1) -> ir.Model:
    """Return rows [N, K] -> MatMul with a constant, `copies` times, added up. A `head` is the output itself."""
    rows = ir.Value(name="rows", shape=ir.Shape(["batch", len(weight_KN)]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights = [], []
    for number in range(copies):
        weight = ir.Value(name=f"weight{number}", const_value=ir.tensor(weight_KN, name=f"weight{number}"))
        weight.shape, weight.type = ir.Shape(weight_KN.shape), ir.TensorType(ir.DataType.FLOAT)
        weights.append(weight)
        nodes.append(ir.node("MatMul", [rows, weight]))
    if not head:
        nodes.append(ir.node("Sum", [node.outputs[0] for node in nodes]))
    output = nodes[-1].outputs[0]
    output.name, output.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([rows], [output], nodes=nodes, initializers=weights, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, folder: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("shape", [(64, 96), (72, 80), (200, 64)])
def test_a_quantised_layer_gives_the_products_of_its_rounded_weights(quantization, shape, tmp_path):
    weight_KN = random(*shape)
    model = one_layer(weight_KN)
    quantize(model, quantization)
    # Rows of the identity are whole levels of any scale, so what comes out are the weights as they were rounded.
    found = run(model, tmp_path, rows=np.eye(shape[0], dtype=np.float32))
    in_fours = quantization == "int4" and shape[1] >= shape[0]
    largest = np.abs(weight_KN).max()
    assert np.abs(found - weight_KN).max() <= largest * (0.2 if in_fours else 0.51 / 127)
    assert np.abs(found - weight_KN).max() > 0, "something was rounded"


def test_the_rounded_weights_of_a_block_are_those_by_hand(tmp_path):
    """4 bits: numbers 0..15 around a zero point; a block that spans -4..11 has scale 1 and zero point 4."""
    column = np.array([-4, 11, 0, 1, 2, 3, -1, -2, 5, 6, 7, 8, 9, 10, -3, 4], np.float32)
    scales, zeros = fit_span(column[None, None], 4)
    assert (scales.item(), zeros.item()) == pytest.approx((1, 4))
    assert numbers(column[None, None], scales, zeros, 4).tolist() == [[(column + 4).tolist()]]
    weight_KN = np.tile(column[:, None] * 0.25, (3, 256))
    model = one_layer(weight_KN)
    quantize(model, "int4")
    assert op_types(model) == ["MatMulNBits", "Sum"]
    rows = np.eye(48, dtype=np.float32)
    np.testing.assert_allclose(run(model, tmp_path, rows=rows), weight_KN, atol=1e-5)


def test_the_scale_search_leaves_less_error_than_spanning_the_block():
    w_NGB = in_blocks(random(64, 128), BLOCK[4])
    low, high = w_NGB.min(-1), w_NGB.max(-1)
    plain_scales = (high - low) / 15
    plain_zeros = np.round(-low / plain_scales)

    def squared_error(scales, zeros):
        levels = numbers(w_NGB, scales, zeros, 4).astype(np.float32) - zeros[..., None]
        return np.square(levels * scales[..., None] - w_NGB).sum()

    assert squared_error(*fit_span(w_NGB, 4)) < 0.9 * squared_error(plain_scales, plain_zeros)


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_row_gets_the_same_alone_and_beside_a_row_of_outliers(quantization, tmp_path):
    model = one_layer(random(64, 96))
    quantize(model, quantization)
    rows = random(7, 64, seed=1)
    rows[3] *= 1000
    crowd = run(model, tmp_path, rows=rows)
    alone = np.concatenate([run(model, tmp_path, rows=row[None]) for row in rows])
    assert (np.abs(crowd - alone) <= 1e-6 * np.abs(alone).max(axis=1, keepdims=True)).all()


def test_onnxruntimes_own_dynamic_quantisation_would_fail_that_test(tmp_path):
    """It has one scale for all rows, which is why it is not used."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = one_layer(random(64, 96), head=True)
    rows = random(7, 64, seed=1)
    rows[3] *= 1000
    run(model, tmp_path, rows=rows)
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
    dynamic = ir.load(tmp_path / "dynamic.onnx")
    assert "MatMulInteger" in op_types(dynamic)
    crowd = run(dynamic, tmp_path, rows=rows)
    alone = run(dynamic, tmp_path, rows=rows[:1])
    assert np.abs(crowd[0] - alone[0]).max() > 0.1 * np.abs(alone[0]).max()


def test_layers_that_read_the_same_share_its_quantised_form(tmp_path):
    weight_KN, rows = random(64, 96), random(3, 64, seed=1)
    model = one_layer(weight_KN, copies=3)
    quantize(model, "int8")
    assert (op_types(model).count("QuantizeLinear"), op_types(model).count("MatMulInteger")) == (1, 3)
    expected = 3 * rows @ weight_KN
    assert np.abs(run(model, tmp_path, rows=rows) - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("quantization", FORMATS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(quantization, tmp_path):
    weight_KN = random(64, 96)
    weight_KN[:, 5] = 0
    model = one_layer(weight_KN)
    quantize(model, quantization)
    rows = np.stack([np.zeros(64), np.full(64, np.nan), random(64)]).astype(np.float32)
    found = run(model, tmp_path, rows=rows)
    assert not found[0].any()
    assert not np.isfinite(found[1]).all()
    assert np.isfinite(found[2]).all()
    assert abs(found[2, 5]) < 1e-20


@pytest.mark.parametrize(("quantization", "expected"), [("int8", "MatMulInteger"), ("int4", "MatMulNBits")])
def test_the_head_and_what_narrows_are_int8_in_blocks(quantization, expected):
    wide, narrow, head = one_layer(random(64, 96)), one_layer(random(96, 64)), one_layer(random(64, 96), head=True)
    with_bias = one_layer(random(64, 96))
    [_, end] = with_bias.graph
    end.op_type = "Add"
    end.resize_inputs(2)
    end.replace_input_with(1, with_bias.graph.inputs[0])
    for model in (wide, narrow, head, with_bias):
        quantize(model, quantization)
    assert expected in op_types(wide)
    for model in (narrow, head, with_bias):
        [node] = [node for node in model.graph if node.op_type == "MatMulNBits"]
        assert node.attributes["bits"].as_int() == 8


def test_a_weight_that_the_graph_transposes_is_quantised_as_it_lies(tmp_path):
    weight_KN, rows = random(64, 96), random(3, 64, seed=1)
    models = [one_layer(weight_KN), one_layer(weight_KN)]
    [product, _] = models[0].graph
    stored = ir.Value(name="stored", const_value=ir.tensor(np.ascontiguousarray(weight_KN.T), name="stored"))
    stored.shape, stored.type = ir.Shape([96, 64]), ir.TensorType(ir.DataType.FLOAT)
    models[0].graph.initializers["stored"] = stored
    turned = ir.node("Transpose", [stored], {"perm": [1, 0]})
    models[0].graph.insert_before(product, turned)
    product.replace_input_with(1, turned.outputs[0])
    found = []
    for model in models:
        quantize(model, "int8")
        assert "Transpose" not in op_types(model)
        found.append(run(model, tmp_path, rows=rows))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("quantization", FORMATS)
def test_an_embedding_is_looked_up_in_int8(quantization, tmp_path):
    table_VK, ids = random(300, 64), np.array([[0, 299, 7]])
    table_VK[7] *= 100  # a scale of its own
    table = ir.Value(name="table", const_value=ir.tensor(table_VK, name="table"))
    table.shape, table.type = ir.Shape(table_VK.shape), ir.TensorType(ir.DataType.FLOAT)
    tokens = ir.Value(name="ids", shape=ir.Shape(["batch", "tokens"]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Gather", [table, tokens])
    node.outputs[0].name, node.outputs[0].type = "embedding", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([tokens], node.outputs, nodes=[node], initializers=[table], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    quantize(model, quantization)
    found = run(model, tmp_path, ids=ids)
    half_a_level = np.abs(table_VK[ids]).max(axis=-1, keepdims=True) / 127 / 2
    assert (np.abs(found - table_VK[ids]) <= half_a_level * 1.001).all()
    assert "table" not in model.graph.initializers


@pytest.mark.parametrize("quantization", FORMATS)
def test_weights_are_read_when_the_graph_is_written_and_not_before(quantization, tmp_path):
    weight_KN, reads = random(64, 96), []

    def read() -> ir.Tensor:
        reads.append(1)
        return ir.tensor(weight_KN, name="weight0")

    model = one_layer(weight_KN)
    value = model.graph.initializers["weight0"]
    value.const_value = ir.LazyTensor(read, ir.DataType.FLOAT, value.shape, name="weight0")
    quantize(model, quantization)
    assert not reads
    run(model, tmp_path, rows=random(1, 64))
    assert reads
    assert (tmp_path / "model.onnx.data").stat().st_size < 0.36 * weight_KN.nbytes


def test_the_bias_of_a_head_that_is_the_graphs_output_is_kept(tmp_path):
    """As a Gemm, which is how a classifier's last layer is traced."""
    from serving.export.fuse_linear import plain_matmuls
    from serving.export.patterns import sweep

    weight_KN, bias_N, rows = random(64, 3), random(3, seed=1), random(5, 64, seed=2)
    model = one_layer(weight_KN, head=True)
    [product] = model.graph
    bias = ir.Value(name="bias", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT))
    bias.const_value = ir.tensor(bias_N, name="bias")
    model.graph.initializers["bias"] = bias
    product.op_type = "Gemm"
    product.resize_inputs(3)
    product.replace_input_with(2, bias)
    plain_matmuls(model)
    sweep(model)
    assert op_types(model) == ["MatMul", "Add"]
    np.testing.assert_allclose(run(model, tmp_path, rows=rows), rows @ weight_KN + bias_N, atol=1e-5)
