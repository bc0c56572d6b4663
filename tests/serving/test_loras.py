"""Several LoRA adapters over one base: each row takes its own, and each answers as its merged model does."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from serving.directory import BadInput, read_manifest
from serving.engine import Engine
from serving.export import ExportError, Options, VerificationFailed, export_model
from serving.request import Request, Sampling
from serving.verify import verify

# Different ranks, scales and targets.
SETTINGS = {
    "news": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "poems": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["down_proj", "q_proj", "lm_head"]},
    "laws": {
        "r": 3,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"layers.1.mlp.up_proj": 9},
    },
}


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **settings) -> Path:
    """Save an adapter of random values, as PEFT does after training, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory) -> dict[str, Path]:
    """The folder of each adapter of the tiny Llama."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(model_dir("llama"), folder / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }


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
    exported_loras, merged_tokens, prompts
):
    folder, _ = exported_loras
    engine = Engine.open(folder, slots=4, step_tokens=7)
    names = [None, *SETTINGS] * 3
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
    assert manifest["loras"] == list(SETTINGS)
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
def test_other_decoders_keep_adapters_too(model_dir, tmp_path, kind):
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "opt": ["q_proj", "fc1"]}[kind]
    adapter = save_adapter(model_dir(kind), tmp_path / "one", r=2, lora_alpha=8, target_modules=targets)
    assert export_model(model_dir(kind), tmp_path / "onnx", Options(loras=(adapter,)))["passed"]


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


def test_an_adapter_asked_of_a_model_without_any_is_refused(onnx_dir):
    with pytest.raises(BadInput, match="lora: 'news' found, but this model has none; export it with --loras"):
        Engine.open(onnx_dir).add(Request("1", [5], Sampling(), "news"))


# --- refused before any work -----------------------------------------------------------------------------------------


def refused(source: Path, folders: tuple[Path, ...], tmp_path: Path, message: str) -> None:
    stages: list[str] = []
    with pytest.raises(ExportError, match=message):
        export_model(source, tmp_path / "onnx", Options(loras=folders), progress=stages.append)
    assert stages == ["reading the model"]
    assert not (tmp_path / "onnx").exists()


def test_an_adapter_of_another_base_is_refused_naming_both(model_dir, save_model, adapters, tmp_path):
    other = save_model(tmp_path / "other", "llama", seed=5)
    mine = str(model_dir("llama"))
    refused(other, (adapters["news"],), tmp_path, rf"news was trained on {mine}, not on {other}")


def changed_config(adapter: Path, folder: Path, **changes) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_base_that_is_not_here_is_not_known_by_its_name(model_dir, save_model, adapters, tmp_path):
    gone = changed_config(adapters["news"], tmp_path / "a", base_model_name_or_path="/gone/llama")
    assert model_dir("llama").name == "llama"
    message = (
        f"a was trained on /gone/llama, which is not here to compare with {model_dir('llama')}; if they are the same"
    )
    refused(model_dir("llama"), (gone,), tmp_path, message)
    unknown = changed_config(adapters["news"], tmp_path / "c", base_model_name_or_path=None)
    refused(model_dir("llama"), (unknown,), tmp_path / "d", "c does not say which base it was trained on")


def test_a_base_is_found_from_the_adapters_own_folder_too(model_dir, adapters, tmp_path):
    shutil.copytree(model_dir("llama"), tmp_path / "base")
    there = changed_config(adapters["news"], tmp_path / "a", base_model_name_or_path="../base")
    assert export_model(model_dir("llama"), tmp_path / "onnx", Options(loras=(there,)))["passed"]


def test_an_adapter_whose_layers_the_base_lacks_is_refused(model_dir, adapters, tmp_path):
    named_so = changed_config(adapters["news"], tmp_path / "a", base_model_name_or_path=str(model_dir("gpt2")))
    message = "updates model.layers.0.self_attn.q_proj, 32 x 32, but this model has no such linear layer"
    refused(model_dir("gpt2"), (named_so,), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has DoRA; accepted: plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "has modules that were trained whole"),
        ({"bias": "all"}, "has trained biases"),
        ({"init_lora_weights": "pissa"}, "has a base changed by pissa"),
        ({"peft_type": "IA3"}, "its peft_type is IA3; accepted: LORA"),
    ],
)
def test_what_is_more_than_a_lora_is_refused(model_dir, adapters, tmp_path, changes, message):
    refused(model_dir("llama"), (changed_config(adapters["news"], tmp_path / "a", **changes),), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha None; accepted: the number it was trained with"),
        ({"lora_alpha": "x"}, "lora_alpha 'x'; accepted: the number"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan; accepted: the number"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path 5; accepted: the folder of the base"),
        ({"alpha_pattern": [1]}, r"alpha_pattern \[1\]; accepted: numbers by the names of layers"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern has '\(', which is no pattern \(missing \)"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern has 'x' for 'q_proj'; accepted: a number"),
    ],
)
def test_a_config_that_says_nothing_usable_is_refused_beside_its_base_and_alone(
    model_dir, adapters, tmp_path, changes, message
):
    adapter = changed_config(adapters["news"], tmp_path / "a", **changes)
    message = f"{adapter / 'adapter_config.json'}: {message}"
    refused(model_dir("llama"), (adapter,), tmp_path, message)
    refused(adapter, (), tmp_path, message)


def test_two_adapters_of_one_name_and_a_folder_without_one_are_refused(model_dir, adapters, tmp_path):
    again = Path(shutil.copytree(adapters["news"], tmp_path / "again" / "news"))
    refused(model_dir("llama"), (adapters["news"], again), tmp_path, "are both called 'news'; rename one")
    refused(model_dir("llama"), (tmp_path,), tmp_path, "has no adapter_config.json; accepted: folders of PEFT's LoRA")


@pytest.mark.parametrize("asked", ["", ",", "{news},"])
def test_an_adapter_without_a_name_is_refused_and_not_left_out_in_silence(model_dir, adapters, tmp_path, trivet, asked):
    asked = asked.format(**adapters)
    code, out, err = trivet("export", model_dir("llama"), tmp_path / "onnx", "--loras", asked)
    message = f"error: --loras: {asked!r} names no folder at one place; accepted: DIR,DIR, or leave it out\n"
    assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "onnx").exists()


def test_adapters_over_a_classifier_or_over_another_adapter_are_refused(adapters, save_classifier, tmp_path):
    classifier = save_classifier(tmp_path / "classifier", "bert")
    refused(classifier, (adapters["news"],), tmp_path, "classifier is a model for classification; accepted: language")
    refused(adapters["poems"], (adapters["news"],), tmp_path, "poems is an adapter over .*; accepted: language models")


def test_a_directory_with_adapters_can_be_verified_elsewhere(exported_loras, tmp_path):
    assert verify(shutil.copytree(exported_loras[0], tmp_path / "copy"))["passed"]


def merged_beside(adapter: Path, base: Path) -> Path:
    """Put what the adapter and its base make into the folder around it, sealed, as a run leaves it; return that."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from serving.directory import seal

    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    whole.save_pretrained(adapter.parent)
    seal(adapter.parent, "model", objective="causal_lm", strategy="lora", labels=None, base_model=str(base), step=1)
    return adapter.parent


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_that_changed_since_is_told_by_the_merged_weights_beside_the_adapter(model_dir, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(model_dir(kind), tmp_path / "base"))
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[kind]
    adapter = tmp_path / "news" / "model" / "adapter"
    run = merged_beside(save_adapter(base, adapter, r=2, lora_alpha=8, target_modules=targets), base)
    assert export_model(base, tmp_path / "before", Options(loras=(tmp_path / "news",)))["passed"]
    tensors = load_file(base / "model.safetensors")
    name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}[kind]
    tensors[name] += 0.1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ExportError, match=f"its base {base} has changed since: {name} is not what {run} was merged into"
    ):
        export_model(base, tmp_path / "onnx", Options(loras=(tmp_path / "news",)))
    assert not (tmp_path / "onnx").exists()


def test_a_run_whose_base_moved_is_proven_by_what_lies_beside_it_and_goes_with_no_other(
    model_dir, save_model, tmp_path
):
    base = Path(shutil.copytree(model_dir("llama"), tmp_path / "a" / "model"))
    adapter = save_adapter(base, tmp_path / "news" / "model" / "adapter", r=2, lora_alpha=8, target_modules=["q_proj"])
    merged_beside(adapter, base)
    base.rename(tmp_path / "moved")
    options = Options(loras=(tmp_path / "news",))
    assert export_model(tmp_path / "moved", tmp_path / "onnx", options)["passed"]
    other = save_model(tmp_path / "b" / "model", "llama", seed=7)
    with pytest.raises(ExportError, match=f"its base {other} has changed since: .* is not what"):
        export_model(other, tmp_path / "other", options)
    assert not (tmp_path / "other").exists()
