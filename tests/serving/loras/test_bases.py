"""Which base an adapter was trained on: it goes with that one alone."""

import shutil
from pathlib import Path

import pytest

from serving.export import ExportError, Options, export_model


def test_an_adapter_of_another_base_is_refused_naming_both(model_dir, save_model, adapters, tmp_path, refused):
    other = save_model(tmp_path / "other", "llama", seed=5)
    mine = str(model_dir("llama"))
    refused(other, (adapters["news"],), tmp_path, rf"news was trained on {mine}, not on {other}")


def test_a_base_that_is_not_here_is_not_known_by_its_name(
    model_dir, save_model, adapters, tmp_path, refused, changed_config
):
    gone = changed_config(adapters["news"], tmp_path / "a", base_model_name_or_path="/gone/llama")
    assert model_dir("llama").name == "llama"
    message = (
        f"a was trained on /gone/llama, which is not here to compare with {model_dir('llama')}; if they are the same"
    )
    refused(model_dir("llama"), (gone,), tmp_path, message)
    unknown = changed_config(adapters["news"], tmp_path / "c", base_model_name_or_path=None)
    refused(model_dir("llama"), (unknown,), tmp_path / "d", "c does not say which base it was trained on")


def test_a_base_is_found_from_the_adapters_own_folder_too(model_dir, adapters, tmp_path, changed_config):
    shutil.copytree(model_dir("llama"), tmp_path / "base")
    there = changed_config(adapters["news"], tmp_path / "a", base_model_name_or_path="../base")
    assert export_model(model_dir("llama"), tmp_path / "onnx", Options(loras=(there,)))["passed"]


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
def test_a_base_that_changed_since_is_told_by_the_merged_weights_beside_the_adapter(
    model_dir, tmp_path, kind, save_adapter
):
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
    model_dir, save_model, tmp_path, save_adapter
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
