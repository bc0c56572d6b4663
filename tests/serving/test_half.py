"""Half precision: what is exported in it answers as the fp32 source does, and what it cannot hold is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from serving.directory import BadInput, DirectoryError, read_manifest
from serving.engine import Engine
from serving.export import ExportError, Options, VerificationFailed, export_model
from serving.export.same_graph import compare, rounded
from serving.request import Sampling
from serving.verify import verify


@pytest.fixture(scope="module")
def fp16_dir(model_dir, tmp_path_factory) -> Path:
    """The tiny Llama in fp16, to be read only."""
    folder = tmp_path_factory.mktemp("fp16") / "llama"
    export_model(model_dir("llama"), folder, Options(dtype="fp16"))
    return folder


def types_of(folder: Path) -> dict[str, int]:
    """Return the ONNX number of the type of each weight, input and output."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}
    return found | {each.name: each.data_type for each in graph.initializer if len(each.dims) == 2}


def nodes_of(folder: Path) -> list:
    """Return the nodes of a directory's graph."""
    import onnx

    return list(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Return the weights of a directory's graph, of more than a number."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx").graph
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer if np.prod(each.dims) > 1}


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_a_decoder_in_fp16_passes_its_proof_on_the_cpu(model_dir, tmp_path, kind):
    record = export_model(model_dir(kind), tmp_path / "onnx", Options(dtype="fp16"))
    assert (record["passed"], record["provider"]) == (True, "cpu")
    found = record["checks"]["logits_one_by_one"]
    assert 1e-4 < found["max_abs_diff"] < found["tolerance"], "as far off as fp32, or equal, would be no half precision"


def test_weights_and_cache_are_half_precision_and_logits_are_not(fp16_dir):
    from onnx import TensorProto

    types = types_of(fp16_dir)
    assert types.pop("logits") == TensorProto.FLOAT
    cache = {name for name in types if "keys" in name or "values" in name}
    assert len(cache) == 8
    weights = {name for name in types if "weight" in name}
    assert len(weights) > 8
    assert {types[name] for name in cache | weights} == {TensorProto.FLOAT16}
    assert read_manifest(fp16_dir, "onnx")["dtype"] == "fp16"


def test_the_files_of_half_precision_are_half_as_large(fp16_dir, onnx_dir):
    half, whole = ((folder / "model.onnx.data").stat().st_size for folder in (fp16_dir, onnx_dir))
    assert half < 0.55 * whole


def test_fp16_gives_the_same_tokens_alone_and_in_a_crowd(fp16_dir, prompts):
    sampling = Sampling(max_new_tokens=12, ignore_end=True)
    crowd = Engine.open(fp16_dir, slots=4, step_tokens=16).generate(prompts, sampling)
    alone = Engine.open(fp16_dir, slots=1)
    assert [each.output_ids for each in crowd] == [alone.generate([ids], sampling)[0].output_ids for ids in prompts]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("bert", "label"),
        *(
            pytest.param(kind, asked, marks=pytest.mark.slow)
            for kind, asked in [("electra", "tags"), ("distilbert", "masks"), ("bert", "vector"), ("gpt2", "number")]
        ),
    ],
)
def test_every_task_over_texts_passes_its_proof_in_fp16(save_text_model, tmp_path, kind, asked):
    source = save_text_model(tmp_path / "model", kind, asked)
    record = export_model(source, tmp_path / "onnx", Options(dtype="fp16"))
    assert record["passed"]
    found = record["checks"]["logits_padded_batch"]
    assert 1e-6 < found["rms_diff"] < found["rms_tolerance"]
    types = types_of(tmp_path / "onnx")
    assert types["embeddings" if asked == "vector" else "logits"] == 1, "fp32"
    assert 10 in types.values(), "fp16"


def test_the_reference_of_a_half_precision_export_is_the_fp32_sources(fp16_dir, onnx_dir):
    from safetensors.numpy import load_file

    half, whole = (load_file(folder / "reference.safetensors") for folder in (fp16_dir, onnx_dir))
    assert half.keys() == whole.keys()
    assert all(np.array_equal(half[name], whole[name]) for name in half)


# --- what fp16 cannot hold -------------------------------------------------------------------------------------------


def spoiled(model_dir: Path, target: Path, changes: dict) -> Path:
    """Copy a model directory with some of its weights multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dir, target)
    tensors = load_file(target / "model.safetensors")
    for name, factor in changes.items():
        tensors[name] *= factor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


LAYER = "model.layers.1.self_attn"


def test_a_weight_beyond_fp16_is_refused_by_name(model_dir, tmp_path):
    source = spoiled(model_dir("llama"), tmp_path / "model", {f"{LAYER}.v_proj.weight": 1e6})
    with pytest.raises(
        ExportError, match=rf"--dtype fp16: the weight {LAYER}.v_proj.weight holds .*e\+05, beyond 65504"
    ):
        export_model(source, tmp_path / "onnx", Options(dtype="fp16"))
    assert not (tmp_path / "onnx").exists()


def too_large_inside(model_dir, tmp_path) -> Path:
    """A model whose values of attention are beyond 65504 and whose weights are not; its answers are as before."""
    changes = {f"{LAYER}.v_proj.weight": 6e4, f"{LAYER}.o_proj.weight": 1 / 6e4}
    return spoiled(model_dir("llama"), tmp_path / "model", changes)


def test_activations_beyond_fp16_are_refused_naming_the_part_that_makes_them(model_dir, tmp_path):
    source = too_large_inside(model_dir, tmp_path)
    assert export_model(source, tmp_path / "fp32")["passed"], "fp32 holds them"
    with pytest.raises(ExportError, match=rf"--dtype fp16: {LAYER.replace('.', '[.]')}.v_proj answers .* beyond 65504"):
        export_model(source, tmp_path / "onnx", Options(dtype="fp16"))
    assert not (tmp_path / "onnx").exists()


def test_activations_that_overflow_in_the_graph_fail_the_proof(model_dir, tmp_path, monkeypatch):
    import contextlib

    import serving.export

    monkeypatch.setattr(serving.export, "watched", lambda model, dtype: contextlib.nullcontext())
    with pytest.raises(VerificationFailed, match="nothing was published: logits_one_by_one: logits differ by inf"):
        export_model(too_large_inside(model_dir, tmp_path), tmp_path / "onnx", Options(dtype="fp16"))
    assert not (tmp_path / "onnx").exists()


# --- what half precision would hide ----------------------------------------------------------------------------------


def a_matrix(model) -> None:
    model.model.layers[1].mlp.down_proj.weight.data *= 1.02


def the_scale_of_attention(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.02


def a_matrix_of_an_encoder(model) -> None:
    model.bert.encoder.layer[1].output.dense.weight.data *= 1.02


HALVES = {"fp16": Options(dtype="fp16"), "bf16": Options(dtype="bf16", optimize_for="cuda")}


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that lets every later export change its model by `change` before the graph is written.

    `only`: where the graph is written in that number format alone.
    """

    def by(change, only: str | None = None) -> None:
        from serving import export

        real = export._write_graph

        def wrong(model, opened, options, dtype, path):
            if only in (None, dtype):
                change(model)
            return real(model, opened, options, dtype, path)

        monkeypatch.setattr(export, "_write_graph", wrong)

    return by


def refused(source: Path, folder: Path, options: Options, evidence: str) -> dict:
    """Export, expect a refusal that says `evidence` and leaves nothing, and return its record."""
    with pytest.raises(VerificationFailed, match=f"nothing was published: {evidence}") as caught:
        export_model(source, folder, options)
    assert not folder.exists()
    return caught.value.record


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fault", [a_matrix, the_scale_of_attention])
def test_two_percent_too_much_is_refused_by_the_proof_in_fp32(model_dir, tmp_path, spoil, fault, dtype):
    spoil(fault)
    evidence = f"before {dtype}, in fp32: logits_one_by_one: logits differ by .*, accepted"
    record = refused(model_dir("llama"), tmp_path / "onnx", HALVES[dtype], evidence)
    found = record["checks"]["logits_one_by_one"]
    assert found["tolerance"] < found["max_abs_diff"]


def test_two_percent_too_much_of_an_encoder_is_refused_by_the_proof_in_fp32(save_text_model, tmp_path, spoil):
    spoil(a_matrix_of_an_encoder)
    model = save_text_model(tmp_path / "model", "bert", "label")
    refused(model, tmp_path / "onnx", HALVES["fp16"], "before fp16, in fp32: logits_one_by_one: logits differ by")


def another_activation(model) -> None:
    from torch.nn import Tanh

    for layer in model.model.layers:
        layer.mlp.act_fn = Tanh()


@pytest.mark.parametrize(
    ("fault", "evidence"),
    [
        (another_activation, r"node \d+ is Tanh, in fp32 QuickGelu"),
        (the_scale_of_attention, "GroupQueryAttention .* has another scale than in fp32"),
    ],
)
def test_a_half_precision_graph_that_is_not_the_proven_one_is_refused(model_dir, tmp_path, spoil, fault, evidence):
    spoil(fault, only="bf16")
    record = refused(model_dir("llama"), tmp_path / "onnx", HALVES["bf16"], evidence)
    assert record["checks"]["before_bf16"]["passed"]


def test_a_half_precision_graph_whose_cache_comes_out_under_other_names_is_another(fp16_dir, onnx_dir):
    half, whole = (ir.load(folder / "model.onnx").graph for folder in (fp16_dir, onnx_dir))
    assert compare(half, whole)[0]["passed"]
    one, other = half.outputs[1:3]
    one.name, other.name = other.name, one.name
    check, _ = compare(half, whole)
    assert not check["passed"]
    assert "is another than in fp32" in check["found"]


def test_the_weights_are_the_proven_ones_rounded(fp16_dir, onnx_dir):
    half, whole = weights_of(fp16_dir), weights_of(onnx_dir)
    assert half.keys() == whole.keys()
    for name in half:
        assert np.array_equal(half[name], whole[name].astype(half[name].dtype)), name
        assert half[name].any(), name
    assert {each.dtype for each in half.values()} == {np.dtype("float16")}


def test_rounding_keeps_what_is_finite_finite_and_infinity_infinite():
    values = np.array([-3.4e38, -np.inf, 7e4, 65519.0, 1 / 3, 2.0**-24], np.float32)
    expected = np.array([-65504, -np.inf, 65504, 65504, np.float16(1 / 3), 2.0**-24], np.float16)
    assert np.array_equal(rounded(values, ir.DataType.FLOAT16), expected)
    largest = rounded(np.finfo(np.float32).max.reshape(1), ir.DataType.BFLOAT16).astype(np.float32)
    assert largest == float.fromhex("0x1.fep127"), "rounded it would be infinite"


def test_the_record_keeps_the_proof_in_fp32_beside_that_in_fp16(fp16_dir):
    [record] = json.loads((fp16_dir / "verification.json").read_text())["records"]
    before, after = record["checks"]["before_fp16"], record["checks"]["logits_far_on"]
    assert before["checks"].keys() == record["checks"].keys() - {"before_fp16", "same_graph"}
    assert before["tolerance"] * 99 < after["tolerance"], "each has the limits of its format"
    whole = Counter(node.op_type for node in nodes_of(fp16_dir) if node.op_type != "Cast")
    assert record["checks"]["same_graph"]["nodes"] == whole.total()


# --- what no provider here runs --------------------------------------------------------------------------------------


def test_bf16_for_the_cpu_is_refused_before_any_work_with_what_runs_there(model_dir, tmp_path):
    stages: list[str] = []
    with pytest.raises(
        ExportError, match=r"--dtype bf16: onnxruntime .* on cpu .*accepted there: fp32, fp16; for a GPU"
    ):
        export_model(model_dir("llama"), tmp_path / "onnx", Options(dtype="bf16"), progress=stages.append)
    assert stages == []


def test_bf16_for_a_gpu_is_written_unverified_and_refused_until_it_is_verified_there(model_dir, tmp_path):
    from onnx import TensorProto

    folder = tmp_path / "onnx"
    record = export_model(model_dir("llama"), folder, Options(dtype="bf16", optimize_for="cuda"))
    assert (record["provider"], record["passed"]) == (None, False)
    assert record["reason"] == "its graph in fp32 is the source's, but nothing here runs bf16"
    assert record["checks"]["before_bf16"]["checks"]["tokens_in_a_crowd"]["passed"]
    assert json.loads((folder / "verification.json").read_text())["records"] == [record]
    types = types_of(folder)
    assert types["past_keys.0"] == types["model.model.embed_tokens.weight"] == TensorProto.BFLOAT16
    assert types["logits"] == TensorProto.FLOAT
    fix = f"no CPU runs bf16; on a machine with a GPU run: trivet verify {folder} --provider cuda"
    with pytest.raises(DirectoryError, match=f"not verified on provider cpu; {fix}"):
        Engine.open(folder)
    with pytest.raises(BadInput, match=r"cpu lacks an operator of this graph .*NOT_IMPLEMENTED.*take another provider"):
        verify(folder)


def test_a_cache_of_another_format_than_the_graphs_is_refused(fp16_dir, tmp_path, reseal):
    folder = Path(shutil.copytree(fp16_dir, tmp_path / "onnx"))
    reseal(folder, dtype="fp32")
    with pytest.raises(BadInput, match=r"a cache of float32, the graph asks for tensor\(float16\)"):
        verify(folder)


def test_the_command_says_what_was_proven_where_and_what_is_still_to_do(model_dir, tmp_path, trivet):
    folder = tmp_path / "onnx"
    code, out, err = trivet("export", model_dir("llama"), folder, "--dtype", "fp16", "--optimize-for", "cuda")
    assert code == 0
    assert "verified on cpu" in " ".join(out.split())
    assert "verified on the CPU alone; it is refused on cuda until it is verified there" in err
    assert f"trivet verify {folder} --provider cuda" in err
    code, out, err = trivet(
        "export", model_dir("llama"), folder, "--dtype", "bf16", "--optimize-for", "cuda", "--explain"
    )
    assert (code, out) == (0, "")
    assert "explain: nothing here runs this graph" in err
    assert f"{folder}: not verified: its graph in fp32 is the source's, but nothing here runs bf16" in err
    code, _, err = trivet("export", model_dir("llama"), folder, "--dtype", "fp8")
    assert (code, err) == (2, "error: --dtype: 'fp8' is unknown; accepted: fp32, fp16, bf16\n")
