"""Models that are not what they should be are refused before anything learns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serving.directory import BadInput, DirectoryError
from trainer import build, model_dir, models


@pytest.fixture
def base(base_model, tmp_path) -> Path:
    """A copy of the base model that a test may break."""
    return Path(shutil.copytree(base_model, tmp_path / "base"))


@pytest.fixture
def refusal(base, make_config):
    """Return a function that builds a run on the base model and returns why it was refused, in one line."""

    def run(objective: str = "sft", **changes) -> str:
        with pytest.raises(BadInput) as caught:
            build.build(make_config(objective, "full", model={"path": str(base)}, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


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
    seen = {models.fingerprint(str(base))}
    (base / "notes.md").write_text("not part of the model")
    assert {models.fingerprint(str(base))} == seen
    rewrite(base, lambda weights: weights["model.norm.weight"].add_(1))
    seen.add(models.fingerprint(str(base)))
    config = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(config))
    seen.add(models.fingerprint(str(base)))
    assert len(seen) == 3
    assert models.fingerprint("a/hub-name") is None
