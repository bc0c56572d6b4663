"""Adapters that cannot be kept beside a base: each is refused before any work."""

import shutil
from pathlib import Path

import pytest


def test_an_adapter_whose_layers_the_base_lacks_is_refused(model_dir, adapters, tmp_path, refused, changed_config):
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
def test_what_is_more_than_a_lora_is_refused(model_dir, adapters, tmp_path, changes, message, refused, changed_config):
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
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\]; accepted: LoRAs that can be merged"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication \[\[0, 2\]\]; accepted: LoRAs that can be merged"),
        ({"lora_bias": True}, "lora_bias True; accepted: LoRAs that can be merged"),
    ],
)
def test_a_config_that_says_nothing_usable_is_refused_beside_its_base_and_alone(
    model_dir, adapters, tmp_path, changes, message, refused, changed_config
):
    adapter = changed_config(adapters["news"], tmp_path / "a", **changes)
    message = f"{adapter / 'adapter_config.json'}: {message}"
    refused(model_dir("llama"), (adapter,), tmp_path, message)
    refused(adapter, (), tmp_path, message)


def test_two_adapters_of_one_name_and_a_folder_without_one_are_refused(model_dir, adapters, tmp_path, refused):
    again = Path(shutil.copytree(adapters["news"], tmp_path / "again" / "news"))
    refused(model_dir("llama"), (adapters["news"], again), tmp_path, "are both called 'news'; rename one")
    refused(model_dir("llama"), (tmp_path,), tmp_path, "has no adapter_config.json; accepted: folders of PEFT's LoRA")
    refused(
        model_dir("llama"), (tmp_path / "nowhere",), tmp_path, "nowhere: no such folder; accepted: folders of PEFT's"
    )


@pytest.mark.parametrize("asked", ["", ",", "{news},"])
def test_an_adapter_without_a_name_is_refused_and_not_left_out_in_silence(model_dir, adapters, tmp_path, trivet, asked):
    asked = asked.format(**adapters)
    code, out, err = trivet("export", model_dir("llama"), tmp_path / "onnx", "--loras", asked)
    message = f"error: --loras: {asked!r} names no folder at one place; accepted: DIR,DIR, or leave it out\n"
    assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "onnx").exists()


def test_adapters_over_a_classifier_or_over_another_adapter_are_refused(adapters, save_classifier, tmp_path, refused):
    classifier = save_classifier(tmp_path / "classifier", "bert")
    refused(classifier, (adapters["news"],), tmp_path, "classifier is a model for classification; accepted: language")
    refused(adapters["poems"], (adapters["news"],), tmp_path, "poems is an adapter over .*; accepted: language models")
