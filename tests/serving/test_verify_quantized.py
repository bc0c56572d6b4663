"""The proof of a quantised decoder: perplexity of held-out text as torch computes it, faults that it finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from serving.directory import DirectoryError, read_manifest
from serving.engine import Engine
from serving.export import ExportError, HeldOutRows, Options, VerificationFailed, export_model
from serving.export.quantize import MIN_WEIGHTS
from serving.quality import HeldOut, figure
from serving.verify import verify

WORDS = ("the quick brown fox returns list of lines in file def value import self class 12 7").split()  # noqa: SIM905
FORMATS = ["int8", "int8-weights", "int4"]


def some_rows(count: int = 40) -> HeldOutRows:
    random = Random(3)
    return HeldOutRows([{"text": " ".join(random.choices(WORDS, k=30))} for _ in range(count)], "words at random")


@pytest.fixture(scope="module")
def quantized(save_model, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a format to the ONNX directory of a Llama, to be read only; its model is beside it."""
    folder = tmp_path_factory.mktemp("quantized")
    source = save_model(folder / "model", "llama", hidden_size=64, intermediate_size=160, tie_word_embeddings=True)

    def of(quantization: str) -> Path:
        if not (folder / quantization).exists():
            export_model(source, folder / quantization, Options(quantization=quantization), held_out=some_rows())
        return folder / quantization

    return of


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_perplexity_is_what_torch_computes_and_close_to_the_sources(quantization, quantized):
    import torch
    from transformers import AutoModelForCausalLM

    folder = quantized(quantization)
    [record] = json.loads((folder / "verification.json").read_text())["records"]
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "model").eval()
    rows = [torch.tensor([ids]) for ids in HeldOut.load(folder).ids]
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows]
    num_tokens = sum(row.shape[1] - 1 for row in rows)
    quality = record["checks"]["quality"]
    assert quality["tokens"] == num_tokens >= 256
    assert quality["source_perplexity"] == pytest.approx(np.exp(sum(losses) / num_tokens), rel=1e-4)
    assert quality["ratio"] == pytest.approx(quality["perplexity"] / quality["source_perplexity"])
    assert quality["ratio"] != 1
    assert 0.5 < quality["same"] < 1
    assert read_manifest(folder, "onnx")["quantization"] == quantization
    assert f"x{quality['limit']:.2f}" in quality["found"]


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_quantised_directory_is_verified_again_and_opened_like_any_other(quantization, quantized, tmp_path, prompts):
    from serving.request import Request, Sampling

    folder = shutil.copytree(quantized(quantization), tmp_path / "onnx")
    record = verify(folder)
    assert record["checks"].keys() == {"manifest", "text", "quality", "alone_and_in_a_crowd"}
    said = []
    for slots in (1, 4):
        engine = Engine.open(folder, slots=slots, step_tokens=1000)
        requests = [Request(str(index), prompt, Sampling(max_new_tokens=8)) for index, prompt in enumerate(prompts)]
        for request in requests:
            engine.add(request)
        engine.run()
        said.append([request.output_ids for request in requests])
    assert said[0] == said[1]
    assert all(said[0])


@pytest.mark.parametrize("quantization", FORMATS)
def test_what_is_published_is_one_graph_whose_weights_were_proven_in_fp32(quantization, quantized, onnx_dir):
    import onnx

    folder = quantized(quantization)
    assert {path.name for path in folder.iterdir()} == {path.name for path in onnx_dir.iterdir()}
    weights = onnx.load(folder / "model.onnx").graph.initializer
    large = [each for each in weights if "weight" in each.name and np.prod(each.dims) >= MIN_WEIGHTS]
    assert len(large) >= 4
    assert onnx.TensorProto.FLOAT not in {each.data_type for each in large}
    external = sum(len(each.raw_data) for each in weights)
    assert (folder / "model.onnx.data").stat().st_size < external + 4096 * len(weights), "nothing else lies in it"
    [record] = json.loads((folder / "verification.json").read_text())["records"]
    before = record["checks"]["before_quantisation"]
    assert before["passed"]
    assert 0 < before["max_abs_diff"] <= before["tolerance"]
    assert before["checks"].keys() >= {"text", "logits_one_by_one", "logits_padded_batch", "tokens_in_a_crowd"}


def test_each_stage_is_told_and_a_large_model_is_proven_apart_both_times(quantized, tmp_path, monkeypatch):
    from serving.export import proof

    monkeypatch.setattr(proof, "LARGE_BYTES", 0)
    monkeypatch.setattr(proof, "prove", None)
    model, stages = quantized("int8").parent / "model", []
    export_model(model, tmp_path / "onnx", Options(quantization="int8"), held_out=some_rows(), progress=stages.append)
    proofs = "".join("|" if "quantising the graph to int8" in stage else stage[:7] + "," for stage in stages[3:])
    assert proofs == "before ,before ,before ,|verifyi,verifyi,verifyi,"


def test_a_graph_that_does_better_than_its_source_is_another(quantized, tmp_path, reseal, failed_checks):
    folder = shutil.copytree(quantized("int8"), tmp_path / "onnx")
    change_reference(folder, "held_out.log_likelihoods", lambda said: said - np.float32(np.log(1.05)))
    reseal(folder)
    assert failed_checks(folder) == ["quality"]


def test_other_tokens_are_refused_although_the_perplexity_is_the_sources(quantized, tmp_path, reseal, failed_checks):
    folder = shutil.copytree(quantized("int8"), tmp_path / "onnx")
    change_reference(folder, "held_out.top", lambda top: np.where(np.arange(len(top)) % 4 == 0, top + 1, top))
    reseal(folder)
    assert failed_checks(folder) == ["quality"]
    [*_, newest] = json.loads((folder / "verification.json").read_text())["records"]
    assert newest["checks"]["quality"]["ratio"] == pytest.approx(1, abs=0.03)
    assert figure(newest["checks"]["quality"]).endswith("% as the source")


def change_reference(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace a tensor of what the source said."""
    with safe_open(folder / "reference.safetensors", framework="numpy") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors | {name: change(tensors[name])}, folder / "reference.safetensors", about)


def test_a_scale_that_is_wrong_shows_in_the_perplexity(quantized, tmp_path, change_graph, failed_checks):
    folder = shutil.copytree(quantized("int8"), tmp_path / "onnx")

    def louder(graph):
        import onnx

        [scales] = [each for each in graph.initializer if each.name.endswith("lm_head.weight.int8.scales")]
        scales.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scales) * 4, scales.name))

    change_graph(folder, louder)
    assert failed_checks(folder) == ["quality"]


def test_one_scale_for_all_rows_is_found_by_the_crowd(onnx_dir, quantized, tmp_path, reseal, failed_checks):
    """onnxruntime's own dynamic quantisation, in the place of the graph that was exported."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = shutil.copytree(quantized("int8"), tmp_path / "onnx")
    source = folder.parent / "fp32"
    export_model(quantized("int8").parent / "model", source)
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).unlink()
    quantize_dynamic(source / "model.onnx", folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
    reseal(folder)
    assert "alone_and_in_a_crowd" in failed_checks(folder)


def test_past_the_limit_nothing_is_published_and_the_figure_is_told(quantized, tmp_path, monkeypatch):
    from serving.checks import PERPLEXITY_LIMITS

    model = quantized("int8").parent / "model"
    monkeypatch.setitem(PERPLEXITY_LIMITS, "int4", 0.9)
    with pytest.raises(VerificationFailed, match=r"nothing was published: quality: perplexity .*: x1?\d?\.\d+, accep"):
        export_model(model, tmp_path / "onnx", Options(quantization="int4"), held_out=some_rows())
    assert not list(tmp_path.iterdir())


def test_without_enough_text_nothing_is_quantised(model_dir, tmp_path):
    options = Options(quantization="int8")
    with pytest.raises(ExportError, match="quantization int8: nothing to measure its cost on"):
        export_model(model_dir("llama"), tmp_path / "onnx", options)
    with pytest.raises(ExportError, match=r"--data: words at random has \d+ tokens, too few .* accepted: 256 or more"):
        export_model(model_dir("llama"), tmp_path / "onnx", options, held_out=some_rows(1))
    assert not list(tmp_path.iterdir())


def test_quantised_formats_are_for_the_cpu_in_fp32():
    for changes in ({"dtype": "fp16"}, {"optimize_for": "cuda"}, {"loras": (Path("a"),)}):
        with pytest.raises(ExportError, match="--quantize int8: is for the CPU"):
            Options(quantization="int8", **changes)
    with pytest.raises(ExportError, match="--quantize: 'int3' is unknown; accepted: int8, int8-weights, int4"):
        Options(quantization="int3")


def test_a_reference_without_held_out_text_is_told(quantized, onnx_dir, tmp_path):
    folder = shutil.copytree(quantized("int8"), tmp_path / "onnx")
    shutil.copy(onnx_dir / "reference.safetensors", folder)
    with pytest.raises(DirectoryError, match="holds no held-out text; export the model again"):
        HeldOut.load(folder)


def test_held_out_text_is_taken_from_all_of_it_and_chats_by_their_template(save_model, make_tokenizer, tmp_path):
    from serving.export import held_out
    from serving.export.source import open_source

    source, tokenizer = open_source(save_model(tmp_path / "model", "llama")), make_tokenizer()
    texts = [{"text": f"{number} " * 100} for number in range(100)]
    pieces = held_out._pieces(tokenizer, source, HeldOutRows(texts, "numbers"))
    assert 3000 < sum(map(len, pieces)) <= held_out.MAX_TOKENS + held_out.MAX_TEXT_TOKENS
    said = [tokenizer.decode(piece) for piece in pieces]
    assert said[0].startswith("0 0")
    assert said[-1].rstrip().endswith("99")
    turns = [{"role": "user", "content": "the list of lines " * 20}]
    chats = held_out._pieces(tokenizer, source, HeldOutRows([{"messages": turns}] * 9, "chats"))
    assert len(chats) == 9
    assert tokenizer.decode(chats[0]).startswith("<|im_start|>user\nthe list")
    assert held_out._pieces(tokenizer, source, HeldOutRows([{}, *texts, {"label": 1}], "numbers")) == pieces
