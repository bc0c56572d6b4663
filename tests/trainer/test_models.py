"""Models that are not what they should be are refused before anything learns."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from serving.directory import BadInput, DirectoryError
from trainer import build, model_dir, model_folder, models
from trainer.config import PretrainedModel
from trainer.tokenizers import load_tokenizer


@pytest.fixture
def refusal(base, make_config):
    """Return a function that builds a run on the base model and returns why it was refused, in one line."""

    def run(objective: str = "sft", **changes) -> str:
        with pytest.raises(BadInput) as caught:
            build.build(make_config(objective, "full", model={"path": str(base)}, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def load(base: Path) -> torch.nn.Module:
    """Return the language model at `base` as a run builds it."""
    section = PretrainedModel(type="pretrained", path=str(base))
    return models.build_model(section, load_tokenizer(str(base)), "AutoModelForCausalLM", None)


def rewrite(base: Path, change) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("objective", ["sft", "classification"])
def test_weights_that_are_missing_are_refused_by_name(base, refusal, objective):
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "kqvo"]
    rewrite(base, lambda weights: [weights.pop(name) for name in names])
    assert "weights missing: model.layers.0.self_attn.k_proj.weight" in (said := refusal(objective))
    assert "and 1 more" in said


def test_weights_of_another_shape_are_refused_by_name(base, refusal):
    rewrite(base, lambda weights: weights.update({"model.norm.weight": torch.ones(16)}))
    assert "of another shape than this run needs: model.norm.weight" in refusal()


def test_only_the_head_of_a_classifier_may_be_new(base, make_config):
    build.build(make_config("classification", "full", model={"path": str(base)}))
    tied = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tied, "shared weights are stored once: that is nothing missing"
    build.build(make_config("sft", "full", model={"path": str(base)}))


def test_a_truncated_file_of_weights_is_refused(base, refusal):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert f"model.path: no model can be loaded from {base}" in refusal()


def test_rows_longer_than_the_model_takes_are_refused(refusal):
    assert "batch.max_length: 129 found; the model takes at most 128" in refusal(batch={"max_length": 129})


def test_a_model_directory_that_was_altered_is_refused(base, make_config, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    made = tmp_path / "made"
    model_dir.save_model(made, model, tokenizer, make_config(), labels=None, step=1, metrics={})
    config = make_config("sft", "full", model={"path": str(made)})
    build.build(config)
    rewrite(made, lambda weights: weights["model.norm.weight"].add_(1))
    with pytest.raises(DirectoryError, match=r"model\.safetensors: altered since it was written"):
        build.build(config)
    (made / "trivet.json").write_text("{}")
    with pytest.raises(DirectoryError, match="no format_version"):
        build.build(config)


def test_the_fingerprint_of_a_plain_model_follows_its_weights_and_its_config(base):
    seen = {model_folder.fingerprint(str(base))}
    (base / "notes.md").write_text("not part of the model")
    assert {model_folder.fingerprint(str(base))} == seen
    rewrite(base, lambda weights: weights["model.norm.weight"].add_(1))
    seen.add(model_folder.fingerprint(str(base)))
    config = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(config))
    seen.add(model_folder.fingerprint(str(base)))
    assert len(seen) == 3
    assert model_folder.fingerprint("a/hub-name") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "wombat"}, "its model_type is none that this release of transformers knows"),
        ({"model_type": None}, "no model can be loaded from"),
        ({"hidden_size": "wide"}, "no model can be loaded from"),
        ({"num_attention_heads": 0}, "no model can be loaded from"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"its weights are quantized \(gptq\)"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(base, refusal, change, said):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    assert re.search(f"^model.path: .*{said}", refusal())


def test_weights_of_another_architecture_are_told_from_missing_ones(base, refusal):
    weights = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=300)).state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, base / "model.safetensors")
    assert "its weights are of another model than its config.json, a llama: they hold transformer." in refusal()


# --- how weights are stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_learn_in_fp32(base, dtype):
    stored = AutoModelForCausalLM.from_pretrained(base).to(dtype)
    stored.save_pretrained(base)
    model = load(base)
    expected = stored.state_dict()
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert all(torch.equal(value, expected[name].float()) for name, value in model.state_dict().items())


def test_sharded_weights_are_read_whole(base):
    whole = load(base)
    (base / "model.safetensors").unlink()
    whole.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    again = load(base)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_tied_embeddings_stay_one_tensor(base):
    model = load(base)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
