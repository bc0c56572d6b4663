"""The weights of a source: all there, all used, all numbers, or refused."""

import json

import pytest

from serving.export import export_model


def test_weights_that_are_not_all_there_are_refused_not_made_up(save_model, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    name, other = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, source / "model.safetensors")
    refused(source, tmp_path, f"its weights lack {name}")
    save_file(tensors | {other: tensors[other][:5].clone()}, source / "model.safetensors")
    refused(source, tmp_path, f"its weights lack {other}")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(source, tmp_path, "its weights cannot be read")


@pytest.mark.parametrize(
    ("kind", "saved", "says", "left_over"),
    [
        ("gpt2", {}, {"n_layer": 1}, r"transformer\.h\.1\.attn\.c_attn\.weight and 10 more, which GPT2LMHeadModel"),
        (
            "llama",
            {"attention_bias": True},
            {"attention_bias": False},
            r"layers\.0\.self_attn\.k_proj\.bias and 7 more",
        ),
        ("llama", {}, {"lora_A.default": (2, 32)}, r"layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight, which"),
    ],
)
def test_weights_that_the_config_does_not_ask_for_are_refused_not_dropped(
    save_model, tmp_path, kind, saved, says, left_over, refused
):
    import torch
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "source", kind, **saved)
    for name, value in says.items():
        if name == "lora_A.default":
            tensors = load_file(source / "model.safetensors")
            tensors[f"model.layers.0.self_attn.q_proj.{name}.weight"] = torch.zeros(value)
            save_file(tensors, source / "model.safetensors", {"format": "pt"})
        else:
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps(config | {name: value}))
    refused(source, tmp_path, f"its weights hold .*{left_over}")


def test_heads_of_other_tasks_and_old_buffers_beside_the_weights_are_no_obstacle(save_text_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = save_text_model(tmp_path / "source", "bert", "masks")
    tensors = load_file(source / "model.safetensors")
    for name in ("cls.seq_relationship.weight", "bert.pooler.dense.weight", "classifier.weight"):
        tensors[name] = torch.zeros(32, 32)
    tensors["bert.embeddings.position_ids"] = torch.arange(130)[None]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert export_model(source, tmp_path / "onnx")["passed"]


def test_tied_weights_are_not_missing(save_model, tmp_path):
    from serving.export.source import open_source

    source = save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    model = open_source(source).load()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("save", ["save_classifier", "save_model"])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(save, request, tmp_path, refused):
    source = request.getfixturevalue(save)(tmp_path / "model", "gpt2", vocab_size=270)
    refused(source, tmp_path, r"its tokenizer has \d+ entries, but the model embeds 270")


@pytest.mark.parametrize(("kind", "asked"), [("llama", None), ("distilbert", "masks")])
def test_a_weight_that_is_no_number_is_refused_by_name(kind, asked, save_model, save_text_model, tmp_path, refused):
    """The weight is that of a token which no text of the proof has: comparing answers alone would not find it."""
    from safetensors.torch import load_file, save_file

    source = save_text_model(tmp_path / "model", kind, asked) if asked else save_model(tmp_path / "model", kind)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    tensors[name][-1, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, f"its weight {name} holds NaN or infinity; its training diverged")


def test_a_model_that_answers_the_same_to_everything_is_refused(save_model, tmp_path, refused):
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "model", "gpt2")
    weights = {name: each * 0 for name, each in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "answers 0 to everything; was it trained")
