"""Decoders that cannot be exported: each is refused for what it is, before any work."""

import pytest


def test_an_architecture_with_attention_of_its_own_is_refused(tmp_path, tiny_config, bare_model, refused):
    source = bare_model(tmp_path / "model", tiny_config("bloom"))
    refused(source, tmp_path, "BloomForCausalLM cannot be exported.*attention interface; accepted: decoders that do")


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Mixtral", {"hidden_act": "gelu"}, "its experts have an activation that is not silu"),
        ("AriaText", {"moe_num_experts": 4}, "its experts have transposed weights"),
        ("JetMoe", {"kv_channels": 8}, "does not put its experts through transformers' experts interface"),
        ("DiffLlama", {}, "DiffLlamaAttention: attends more than once in layer 0"),
        ("DeepseekV2", LATENT | {"n_routed_experts": 4}, "computes with complex numbers"),
        ("Olmo3", {"sliding_window": None}, "layer 0 is sliding_attention, but sliding_window is None"),
        ("Xmod", {}, "a trial run without weights ended with Input language unknown"),
    ],
)
def test_what_the_graph_cannot_do_is_refused_for_what_it_is(tmp_path, kind, settings, message, bare_model, refused):
    import transformers

    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 256}
    config = getattr(transformers, f"{kind}Config")(**sizes | settings)
    class_name = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
    refused(bare_model(tmp_path / "source", config, architectures=[class_name]), tmp_path, message)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_are_refused_in_one_type_of_layer_too(
    tmp_path, rope_type, bare_model, refused
):
    import transformers

    scaled = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 400}
    if rope_type == "longrope":
        scaled |= {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=16, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": scaled},
    )  # fmt: skip
    source = bare_model(tmp_path / "source", config, architectures=["Gemma3ForCausalLM"])
    refused(source, tmp_path, f"rope_type '{rope_type}' changes with the text's length")


def test_attention_sinks_are_refused_not_ignored(tmp_path, tiny_config, bare_model, refused):
    source = bare_model(tmp_path / "model", tiny_config("gpt_oss"))
    refused(source, tmp_path, "GptOssAttention: asks attention for .*s_aux")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForQuestionAnswering"]},
            "accepted here: LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic' changes",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantized"),
        ({"max_position_embeddings": 32}, "max_position_embeddings 32; accepted: 64 to 16777216"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings 1000000000000; accepted: 64 to 16777216"),
        ({"model_type": "no_such_model"}, "config.json: transformers cannot make a model of it"),
    ],
)
def test_a_config_that_cannot_be_exported_is_refused(tmp_path, tiny_config, changes, message, bare_model, refused):
    refused(bare_model(tmp_path / "model", tiny_config("llama"), **changes), tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": 2', "cannot be read"),
        ("[1]", r"cannot be read \(no object\)"),
        ('{"eos_token_id": "x"}', "eos_token_id 'x'; accepted: whole numbers from 0 to 319"),
        ('{"eos_token_id": [2, 320]}', "eos_token_id 320; accepted"),
        ('{"eos_token_id": true}', "eos_token_id True; accepted"),
        ('{"do_sample": true, "temperature": -1}', "temperature: -1 "),
        ('{"do_sample": true, "top_p": "a"}', "top_p: 'a' "),
    ],
)
def test_generation_defaults_out_of_range_are_refused(tmp_path, tiny_config, text, message, bare_model, refused):
    source = bare_model(tmp_path / "source", tiny_config("llama"))
    (source / "generation_config.json").write_text(text)
    refused(source, tmp_path, rf"source/generation_config\.json: {message}")


def test_an_end_token_of_the_config_is_checked_where_nothing_else_names_one(tmp_path, tiny_config, bare_model, refused):
    source = bare_model(tmp_path / "source", tiny_config("llama"), eos_token_id=99999)
    refused(source, tmp_path, r"source/config\.json: eos_token_id 99999; accepted")
