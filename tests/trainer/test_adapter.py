"""Bottleneck adapters: where they stand, what they compute, and a directory that nobody takes for the base."""

import json
import shutil

import pytest
import torch
from peft import PeftConfig
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving import directory
from serving.directory import BadInput, DirectoryError
from serving.export.source import open_source
from serving.export_paths import ExportError
from trainer import build, model_dir
from trainer.config import Adapter
from trainer.strategies import STRATEGIES

IDS = torch.arange(2, 22).view(2, 10)


def adapt(model: torch.nn.Module, **settings) -> torch.nn.Module:
    return STRATEGIES["adapter"](model, Adapter(type="adapter", **settings))


def places(model: torch.nn.Module) -> list[str]:
    return [name.removesuffix(".adapter") for name, _ in model.named_modules() if name.endswith(".adapter")]


@pytest.mark.parametrize(
    ("family", "head", "attention", "mlp"),
    [
        ("Llama", "CausalLM", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
        ("Mistral", "TokenClassification", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
        ("Qwen2", "CausalLM", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
        ("GPT2", "SequenceClassification", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
        ("OPT", "CausalLM", "model.decoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.fc2"),
        ("GPTNeoX", "CausalLM", "gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        ("Bert", "MaskedLM", "bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
        ("Roberta", "SequenceClassification", "roberta.encoder.layer.{}.attention.output.dense",
         "roberta.encoder.layer.{}.output.dense"),
        ("DistilBert", "TokenClassification", "distilbert.transformer.layer.{}.attention.out_lin",
         "distilbert.transformer.layer.{}.ffn.lin2"),
    ],
)  # fmt: skip
def test_attention_and_mlp_are_found_in_every_block(tiny_model, family, head, attention, mlp):
    both = [place.format(block) for block in (0, 1) for place in (attention, mlp)]
    assert places(adapt(tiny_model(family, head))) == both
    assert places(adapt(tiny_model(family, head), after=["mlp"])) == both[1::2]
    assert places(adapt(tiny_model(family, head), after=["attention"])) == both[::2]
    assert places(adapt(tiny_model(family, head), after=[mlp.format(1), "attention"])) == [*both[:3:2], both[3]]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_what_an_adapter_adds_is_up_of_activation_of_down(tiny_model, activation):
    """The formula of arXiv:1902.00751 written out, on what the layer gives without it."""
    model = adapt(tiny_model("Llama", "CausalLM"), size=3, activation=activation, after=["mlp"])
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.normal_()
        inputs = torch.randn(2, 5, 32)
        plain = inputs @ layer.weight.T
        down = plain @ layer.adapter.down.weight.T + layer.adapter.down.bias
        bent = {"relu": torch.relu, "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(), "tanh": torch.tanh}[activation](
            down
        )
        expected = plain + bent @ layer.adapter.up.weight.T + layer.adapter.up.bias
        torch.testing.assert_close(layer(inputs), expected)
    assert layer.adapter.down.weight.shape == (3, 16)


def test_after_a_convolution_an_adapter_works_on_channels():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 2))
    adapter = adapt(model, size=2, after=["0"])[0].adapter
    assert (adapter.down.weight.shape, adapter.up.weight.shape) == ((2, 6, 1, 1), (6, 2, 1, 1))
    with torch.no_grad():
        adapter.up.weight.normal_()
        images = torch.randn(1, 1, 8, 8)
        moved = model[0](images)
        plain = torch.nn.functional.conv2d(images, model[0].weight, model[0].bias)
        pixel = plain[0, :, 4, 2]
        hidden = torch.nn.functional.gelu(adapter.down.weight.view(2, 6) @ pixel + adapter.down.bias)
        torch.testing.assert_close(moved[0, :, 4, 2], pixel + adapter.up.weight.view(6, 2) @ hidden)


@pytest.mark.parametrize(
    ("family", "after", "said"),
    [
        ("Mixtral", ["attention", "mlp"], r"'mlp' found; MixtralForCausalLM has no mlp that ends in a linear layer"),
        (
            "Llama",
            ["model.layers.0.mlp.dwn_proj"],
            r"'model\.layers\.0\.mlp\.dwn_proj' found; .*near to it: .*down_proj",
        ),
        ("Llama", ["lm_head"], r"'lm_head' found; fits no linear or convolution layer outside the head"),
        ("Llama", ["mlp", "atention"], r"'atention' found"),
    ],
)
def test_where_no_sub_layer_is_found_it_is_refused(tiny_model, family, after, said):
    with pytest.raises(BadInput, match=rf"^strategy\.after: {said}"):
        adapt(tiny_model(family, "CausalLM"), after=after)


def test_a_plain_module_without_attention_is_refused_naming_its_layers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(
        BadInput, match=r"'attention' found; Sequential has no attention that ends in a linear layer; .*: 0"
    ):
        adapt(model)


@pytest.mark.parametrize("settings", [{"after": []}, {"size": 0}, {"activation": "sin"}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        Adapter(type="adapter", **settings)


# --- its directory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make_config, train):
    """A finished run of sft with adapters."""
    config = make_config("sft", "adapter", strategy={"size": 4})
    assert train(config) == 0
    return config


def test_the_directory_holds_the_base_untouched_the_adapter_and_how_to_load_them(run, base_model):
    folder = run.run.folder / "model"
    manifest = directory.read_manifest(folder, "model")
    directory.check_files(folder, manifest)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found - {"trivet.json"} == manifest["files"].keys()
    assert {"base/config.json", "base/model.safetensors", "base/tokenizer.json", "tokenizer.json", "README.md",
            "config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= found  # fmt: skip
    assert "model.safetensors" not in found
    assert (manifest["strategy"], manifest["merge"]) == ("adapter", None)
    base, kept = load_file(f"{base_model}/model.safetensors"), load_file(folder / "base" / "model.safetensors")
    assert base.keys() == kept.keys()
    assert all(torch.equal(base[name], kept[name]) for name in base)
    assert "model_dir.load(" in (folder / "README.md").read_text()
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == base_model
    assert described["task_type"] == "CAUSAL_LM"
    names = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    assert names == {
        f"base_model.model.{place}.adapter.{part}.{kind}"
        for place in described["target_modules"]
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }


def test_nobody_takes_the_base_for_the_result(run):
    folder = run.run.folder / "model"
    with pytest.raises(ValueError, match="trivet_base_and_adapter"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"
    trained = model_dir.load(folder)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        assert float((trained(IDS).logits - base(IDS).logits).abs().max()) > 1e-3


def test_the_trained_metric_comes_back_from_the_directory(run, make_config):
    """The held-out loss that the run reports, from the saved files through another run's evaluation."""
    from trainer.evaluate import evaluate

    parts = build.build(make_config("sft", "full"))
    model = model_dir.load(run.run.folder / "model")
    parts.objective.try_out(model, 48)
    metrics = evaluate(parts.world, model, parts.objective, parts.feed)
    reported = json.loads((run.run.folder / "result.json").read_text())["metrics"]
    assert metrics["eval_loss"] == pytest.approx(reported["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("given", ["", "model"])
def test_export_without_its_loader_refuses_it_in_a_line(run, given):
    with pytest.raises(ExportError, match=r"a base and a bottleneck adapter, which only `trivet export` puts together"):
        open_source(run.run.folder / given)


def test_a_later_run_starts_from_its_base_and_not_from_both(run, make_config):
    path = run.run.folder / "model"
    with pytest.raises(BadInput, match=rf"^model\.path: {path} is a base and a bottleneck adapter, .*{path}/base"):
        build.build(make_config("sft", "full", run={"name": "later"}, model={"path": str(path)}))
    build.build(make_config("sft", "full", run={"name": "later"}, model={"path": str(path / "base")}))


def test_peft_says_that_the_adapter_is_none_of_its_own(run):
    with pytest.raises((KeyError, ValueError), match="BOTTLENECK"):
        PeftConfig.from_pretrained(run.run.folder / "model" / "adapter")


def test_loading_a_damaged_directory_is_refused_in_a_line(run, tmp_path):
    folder = run.run.folder / "model"
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(DirectoryError, match=r"adapter_model\.safetensors: altered since it was written"):
        model_dir.load(folder)
    lost = "base_model.model.model.layers.1.mlp.down_proj.adapter.up.bias"
    for on_disk, other in (
        (
            {name: value for name, value in tensors.items() if name != lost},
            "model.layers.1.mlp.down_proj.adapter.up.bias",
        ),
        ({**tensors, "x.y": torch.ones(1)}, "x.y"),
    ):
        save_file(on_disk, weights)
        resealed(folder)
        with pytest.raises(DirectoryError, match=f"cannot be read into this model .only one of the two has {other}"):
            model_dir.load(folder)
    shutil.rmtree(folder / "base")
    resealed(folder)
    with pytest.raises(DirectoryError, match="base"):
        model_dir.load(folder)


def resealed(folder) -> None:
    manifest = directory.read_manifest(folder, "model")
    about_itself = ("format_version", "trivet", "kind", "files")
    directory.seal(folder, "model", **{key: value for key, value in manifest.items() if key not in about_itself})
