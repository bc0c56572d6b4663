"""Several LoRA adapters over one base: each row takes its own, and each answers as its merged model does."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from serving.directory import BadInput, read_manifest
from serving.engine import Engine
from serving.export import Options, VerificationFailed, export_model
from serving.request import Request, Sampling
from serving.verify import verify


@pytest.fixture(scope="module")
def exported_loras(model_dir, adapters, tmp_path_factory) -> tuple[Path, dict]:
    """The tiny Llama with all adapters, to be read only, and the record of its proof."""
    folder = tmp_path_factory.mktemp("loras") / "onnx"
    return folder, export_model(model_dir("llama"), folder, Options(loras=tuple(adapters.values())))


@pytest.fixture(scope="module")
def merged_tokens(model_dir, adapters):
    """Return a function from (adapter or None, prompt, count) to the greedy tokens of its merged model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    def of(name: str | None, prompt: list[int], count: int) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
        if name is not None:
            model = PeftModel.from_pretrained(model, adapters[name]).merge_and_unload()
        model.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        row = torch.tensor([prompt])
        return model.eval().generate(row, attention_mask=torch.ones_like(row))[0, len(prompt) :].tolist()

    return of


def test_the_proof_is_of_every_adapter_and_of_all_in_one_batch(exported_loras):
    from safetensors import safe_open

    folder, record = exported_loras
    assert record["passed"]
    with safe_open(folder / "reference.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["loras"]) == [None] * 7 + ["news"] * 3 + ["poems"] * 3 + ["laws"] * 3
    assert record["checks"]["logits_padded_batch"]["rows"] == 16
    assert (
        record["checks"]["tokens_in_a_crowd"] | {"mismatches": 0, "rows": 16} == record["checks"]["tokens_in_a_crowd"]
    )


def test_the_base_is_as_before_bit_for_bit_when_adapters_have_been_merged_into_it(model_dir, adapters):
    import torch
    from transformers import AutoModelForCausalLM

    from serving.export.adapters import read_adapters
    from serving.export.loras import merged
    from serving.export.source import open_source

    source = open_source(model_dir("llama"))
    model, untouched = (AutoModelForCausalLM.from_pretrained(source.folder) for _ in range(2))
    row = torch.tensor([[1, 2, 3]])
    for adapter in read_adapters(tuple(adapters.values()), source.folder, source.provenance["sha256"]):
        with merged(model, adapter, source.folder):
            assert not torch.equal(model(row).logits, untouched(row).logits)
        assert vars(model).keys() == vars(untouched).keys()
    assert [*map(str, model.modules())] == [*map(str, untouched.modules())]
    weights = untouched.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())


def test_rows_of_different_adapters_in_one_crowd_get_the_tokens_of_their_merged_models(
    exported_loras, merged_tokens, prompts, adapters
):
    folder, _ = exported_loras
    engine = Engine.open(folder, slots=4, step_tokens=7)
    names = [None, *adapters] * 3
    requests = [
        Request(str(number), ids, Sampling(max_new_tokens=6, ignore_end=True), name)
        for number, (ids, name) in enumerate(zip(prompts, names, strict=True))
    ]
    for request in requests:
        engine.add(request)
    engine.run()
    expected = [merged_tokens(name, ids, 6) for ids, name in zip(prompts, names, strict=True)]
    assert [request.output_ids for request in requests] == expected
    alone = [merged_tokens(None, ids, 6) for ids in prompts]
    changed = [mine != base for mine, base, name in zip(expected, alone, names, strict=True) if name]
    assert sum(changed) > len(changed) / 2, "the adapters change what is said"


def test_the_stacks_are_inputs_of_the_graph_with_the_true_scale(exported_loras, adapters):
    from safetensors.numpy import load_file

    folder, _ = exported_loras
    manifest, stacks = read_manifest(folder, "onnx"), load_file(folder / "loras.safetensors")
    assert manifest["loras"] == list(adapters)
    assert set(stacks) <= set(manifest["inputs"])
    assert "lora_index" in manifest["inputs"]
    for index, (name, scale) in enumerate({"news": 32 / 4, "poems": 6 / math.sqrt(2)}.items(), 1):
        theirs = load_file(adapters[name] / "adapter_model.safetensors")
        query = "model.layers.0.self_attn.q_proj"
        a, b = (theirs[f"base_model.model.{query}.lora_{side}.weight"] for side in "AB")
        update = stacks[f"model.{query}.lora_A"][index] @ stacks[f"model.{query}.lora_B"][index]
        np.testing.assert_allclose(update, (scale * b @ a).T, atol=1e-5)
    assert not any(stack[0].any() for stack in stacks.values()), "index 0 is the base alone"


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_decoders_keep_adapters_too(model_dir, tmp_path, kind, save_adapter):
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "opt": ["q_proj", "fc1"]}[kind]
    adapter = save_adapter(model_dir(kind), tmp_path / "one", r=2, lora_alpha=8, target_modules=targets)
    assert export_model(model_dir(kind), tmp_path / "onnx", Options(loras=(adapter,)))["passed"]


def test_an_adapter_of_a_head_that_is_also_the_embedding_leaves_the_embedding_as_it_was(
    model_dir, tmp_path, save_adapter
):
    base = model_dir("gpt2")
    head = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "lm_head"]}
    adapter = save_adapter(base, tmp_path / "head", **head)
    assert export_model(base, tmp_path / "beside", Options(loras=(adapter,)))["passed"]
    assert export_model(adapter, tmp_path / "merged")["passed"]


def test_adapters_in_fp16_and_in_standard_operators_pass_too(model_dir, adapters, tmp_path):
    for number, options in enumerate([{"dtype": "fp16"}, {"optimize_for": "cuda"}]):
        record = export_model(model_dir("llama"), tmp_path / str(number), Options(loras=(adapters["news"],), **options))
        assert record["passed"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_adapters_in_half_precision_are_the_proven_ones_rounded(
    model_dir, adapters, exported_loras, tmp_path, monkeypatch, dtype
):
    import ml_dtypes

    from serving.export import loras
    from serving.loras import read_stacks

    real = loras.put_into

    def wrong_in_half(model, asked, selection):
        real(model, asked, selection)
        if model.dtype != loras.torch.float32:
            for module in model.modules():
                if isinstance(module, loras.WithLoras):
                    module.lora_B.data *= 1.02

    monkeypatch.setattr("serving.export.graph.put_into", wrong_in_half)
    options = Options(dtype=dtype, optimize_for="cuda", loras=tuple(adapters.values()))
    export_model(model_dir("llama"), tmp_path / "onnx", options)
    half, whole = read_stacks(tmp_path / "onnx"), read_stacks(exported_loras[0])
    assert half.keys() == whole.keys()
    for name in half:
        expected = whole[name].astype(np.float16 if dtype == "fp16" else ml_dtypes.bfloat16)
        assert np.array_equal(half[name], expected.view(half[name].dtype)), name


@pytest.mark.parametrize("fault", ["scale", "rows swapped"])
def test_a_wrong_adapter_fails_the_proof(exported_loras, tmp_path, failed_checks, reseal, fault):
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(exported_loras[0], tmp_path / "onnx"))
    stacks = load_file(folder / "loras.safetensors")
    for name in stacks:
        if fault == "scale" and name.endswith("lora_B"):
            stacks[name][1] /= 8  # as if alpha were forgotten
        elif fault == "rows swapped":
            stacks[name][[1, 2]] = stacks[name][[2, 1]]
    save_file(stacks, folder / "loras.safetensors")
    reseal(folder)
    assert failed_checks(folder) == [
        "logits_one_by_one",
        "logits_padded_batch",
        "tokens_one_by_one",
        "tokens_in_a_crowd",
    ]


def test_a_scale_that_the_export_gets_wrong_publishes_nothing(model_dir, adapters, tmp_path, monkeypatch):
    from serving.export import adapters as module

    monkeypatch.setattr(module, "_of_layer", lambda patterns, name, usual: 1.0)  # as if alpha were not there
    with pytest.raises(VerificationFailed, match="nothing was published: logits_one_by_one"):
        export_model(model_dir("llama"), tmp_path / "onnx", Options(loras=(adapters["poems"],)))
    assert not (tmp_path / "onnx").exists()


def test_the_command_answers_by_the_adapter_that_is_named(exported_loras, trivet, merged_tokens):
    from serving.text import Text

    folder, _ = exported_loras
    text = Text.open(folder)
    ask = ["generate", folder, "--prompt", "the list", "--raw", "--max-new-tokens", "5"]
    for name in (None, "news"):
        code, out, _ = trivet(*ask, *(["--lora", name] if name else []))
        expected = merged_tokens(name, text.encode("the list"), 5)
        assert (code, out) == (0, text.decode(expected[: expected.index(2)] if 2 in expected else expected) + "\n")
    code, _, err = trivet(*ask, "--lora", "law")
    assert (code, err) == (
        2,
        "error: lora: 'law' is unknown; accepted: news, poems, laws, or leave it out for the base alone\n",
    )


def test_the_next_step_names_an_adapter(model_dir, adapters, tmp_path, trivet):
    folder = tmp_path / "onnx"
    code, _, err = trivet("export", model_dir("llama"), folder, "--loras", adapters["news"])
    assert (code, err.splitlines()[-1]) == (0, f"next: trivet generate {folder} --lora news --prompt ...")


def test_an_adapter_asked_of_a_model_without_any_is_refused(onnx_dir):
    with pytest.raises(BadInput, match="lora: 'news' found, but this model has none; export it with --loras"):
        Engine.open(onnx_dir).add(Request("1", [5], Sampling(), "news"))


def test_a_directory_with_adapters_can_be_verified_elsewhere(exported_loras, tmp_path):
    assert verify(shutil.copytree(exported_loras[0], tmp_path / "copy"))["passed"]
