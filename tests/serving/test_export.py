"""Export: what comes out, what is refused before any work, and that a failed proof publishes nothing."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from serving.directory import DirectoryError, check_files, identity, read_manifest, seal
from serving.engine import Engine
from serving.export import ExportError, VerificationFailed, export_model


def bare_model(folder: Path, config, **changes) -> Path:
    """Write a config beside weights that no one could load: a refusal shows that nothing tried to."""
    folder.mkdir()
    config.architectures = changes.pop("architectures", [type(config).__name__.replace("Config", "ForCausalLM")])
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


def test_the_directory_is_whole_and_says_what_it_holds(onnx_dir, model_dir):
    manifest = read_manifest(onnx_dir, "onnx")
    check_files(onnx_dir, manifest)
    expected = {
        "task": "causal_lm",
        "architecture": "LlamaForCausalLM",
        "dtype": "fp32",
        "quantization": None,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "context_length": 256,
        "end_token_ids": [2],
        "labels": None,
    }
    assert {key: manifest[key] for key in expected} == expected
    names = [f"{kind}.{layer}" for layer in range(2) for kind in ("keys", "values")]
    steps = ["input_ids", "position_ids", "seqlens_k", "total_length", "keep"]
    assert manifest["inputs"] == [*steps, *(f"past_{name}" for name in names)]
    assert manifest["outputs"] == ["logits", *(f"present_{name}" for name in names)]
    assert manifest["source"]["path"] == str(model_dir("llama"))
    assert manifest["source"]["identity"] is None
    files = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(manifest["files"]) == files | {"generation_config.json", "reference.safetensors"}
    assert len({path.stat().st_mode for path in onnx_dir.iterdir()}) == 1, "who may read one file may read all"


def test_attention_is_group_query_attention_over_unexpanded_heads(onnx_dir):
    import onnx

    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 2
    assert {each.i for node in attention for each in node.attribute if each.name == "kv_num_heads"} == {2}


def test_a_sliding_window_shorter_than_the_prompts_is_kept(save_model, tmp_path):
    source = save_model(tmp_path / "model", "mistral", sliding_window=16)
    record = export_model(source, tmp_path / "onnx")
    assert record["passed"]


def test_a_failed_proof_publishes_nothing_and_keeps_the_older_directory(
    model_dir, onnx_dir, tmp_path, monkeypatch, capfd
):
    from serving.export import decoder

    def write_other_weights(model, source, options, path):
        model.model.layers[1].self_attn.o_proj.weight.data *= 1.02  # after the source has answered
        return write_graph(model, source, options, path)

    write_graph = decoder.write_graph
    monkeypatch.setattr(decoder, "write_graph", write_other_weights)
    target = Path(shutil.copytree(onnx_dir, tmp_path / "onnx"))
    before = {path: path.read_bytes() for path in target.iterdir()}
    stages = []
    with pytest.raises(
        VerificationFailed, match=r"nothing was published: logits_one_by_one: logits differ by .*accepted"
    ):
        export_model(model_dir("llama"), target, progress=stages.append)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path != target} == before
    assert stages[:3] == ["reading the model", "running the source model", "writing the graph"]
    assert capfd.readouterr() == ("", "")


def test_a_run_and_a_sweep_lead_to_their_model(tmp_path, tiny_config):
    from serving.export.source import find_model

    run = tmp_path / "run"
    run.mkdir()
    bare_model(run / "model", tiny_config("llama"))
    (tmp_path / "result.json").write_text(json.dumps({"format_version": 2, "ranking": [{"run": str(run)}]}))
    assert find_model(run) == find_model(tmp_path) == run / "model"
    (tmp_path / "result.json").write_text(json.dumps({"format_version": 2, "ranking": [{"run": "gone"}]}))
    with pytest.raises(ExportError, match="its best run gone has no model"):
        find_model(tmp_path)


@pytest.mark.parametrize("result", ["[1", "[]", '{"ranking": []}', '{"ranking": [{"run": 5}]}', '{"ranking": [[]]}'])
def test_a_sweep_with_a_broken_result_is_refused(tmp_path, result):
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(ExportError, match=r"result\.json: has no ranking of runs"):
        export_model(tmp_path, tmp_path.parent / "onnx")


# --- refused before any work -----------------------------------------------------------------------------------------


def refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(source, tmp_path / "onnx")
    assert not list(tmp_path.glob("*onnx*")), "nothing half-written"


def test_a_folder_that_is_no_onnx_directory_is_never_replaced(tmp_path, tiny_config, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    source = bare_model(run / "model", tiny_config("llama"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ExportError,
        match=r"home: has no trivet\.json, so it .* directory; only an older ONNX directory",
    ):
        export_model(run, tmp_path / "home")
    monkeypatch.chdir(source)
    for target in (source, run, tmp_path, ".", "onnx", "../../run/model/deep/onnx", "/"):
        with pytest.raises(ExportError, match="in the source"):
            export_model(run, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_all_there_are_refused_not_made_up(save_model, tmp_path):
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
    save_model, tmp_path, kind, saved, says, left_over
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


def test_an_architecture_with_attention_of_its_own_is_refused(tmp_path, tiny_config):
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
def test_what_the_graph_cannot_do_is_refused_for_what_it_is(tmp_path, kind, settings, message):
    import transformers

    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 256}
    config = getattr(transformers, f"{kind}Config")(**sizes | settings)
    class_name = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
    refused(bare_model(tmp_path / "source", config, architectures=[class_name]), tmp_path, message)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_change_with_the_length_are_refused_in_one_type_of_layer_too(tmp_path, rope_type):
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


def test_attention_sinks_are_refused_not_ignored(tmp_path, tiny_config):
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
        ({"max_position_embeddings": 32}, "max_position_embeddings 32; accepted: 64 or more"),
        ({"model_type": "no_such_model"}, "config.json: transformers cannot make a model of it"),
    ],
)
def test_a_config_that_cannot_be_exported_is_refused(tmp_path, tiny_config, changes, message):
    refused(bare_model(tmp_path / "model", tiny_config("llama"), **changes), tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": 2', "cannot be read"),
        ("[1]", r"cannot be read \(no object\)"),
        ('{"eos_token_id": "x"}', "eos_token_id 'x'; accepted: whole numbers from 0 to 319"),
        ('{"eos_token_id": [2, 320]}', "eos_token_id 320; accepted"),
        ('{"eos_token_id": true}', "eos_token_id True; accepted"),
    ],
)
def test_an_end_token_that_the_model_cannot_say_is_refused(tmp_path, tiny_config, text, message):
    source = bare_model(tmp_path / "source", tiny_config("llama"))
    (source / "generation_config.json").write_text(text)
    refused(source, tmp_path, rf"source/generation_config\.json: {message}")


def test_an_end_token_of_the_config_is_checked_where_nothing_else_names_one(tmp_path, tiny_config):
    source = bare_model(tmp_path / "source", tiny_config("llama"), eos_token_id=99999)
    refused(source, tmp_path, r"source/config\.json: eos_token_id 99999; accepted")


def test_other_kinds_of_folder_are_refused(tmp_path, tiny_config):
    refused(tmp_path / "none", tmp_path, "none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"has no config\.json, model/ or result\.json")
    source = bare_model(tmp_path / "model", tiny_config("llama"))
    (source / "adapter_config.json").write_text("{}")
    refused(source, tmp_path, "an unmerged adapter lies beside the weights")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, r"has no \*\.safetensors weights")


def test_a_trivet_model_directory_is_checked_and_remembered(tmp_path, tiny_config):
    from serving.export.source import open_source

    source = bare_model(tmp_path / "model", tiny_config("llama"))
    seal(source, "model", objective="sft", labels=None, strategy="lora", base_model=None, step=7)
    provenance = open_source(source).provenance
    assert len(provenance.pop("sha256")) == 64
    expected = {"identity": identity(source), "objective": "sft", "strategy": "lora", "step": 7}
    assert provenance == {"path": str(source), **expected}
    (source / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(DirectoryError, match=r"model\.safetensors: altered"):
        export_model(source, tmp_path / "onnx")


def test_an_objective_that_is_not_the_models_is_refused(tmp_path, tiny_config):
    source = bare_model(tmp_path / "model", tiny_config("llama"))
    seal(source, "model", objective="classification", labels=["a"], strategy="full", base_model=None, step=1)
    refused(source, tmp_path, r"trivet\.json says classification, but config\.json LlamaForCausalLM")
    seal(source, "model", objective="seq2seq", labels=None, strategy="full", base_model=None, step=1)
    accepted = "causal_lm, sft, classification, token_classification, masked_lm"
    refused(source, tmp_path, f"objective seq2seq cannot be exported; accepted: {accepted}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem_type": "ranking"},
            "problem_type 'ranking' is unknown; accepted: single_label_classification, multi",
        ),
        ({"problem_type": "regression"}, "id2label has 3 names for 3 outputs, numbered 0, 1, 2; accepted: one, "),
        (
            {"id2label": {"0": "only"}},
            "id2label has 1 names for 1 outputs, numbered 0; accepted: two or more, numbered from 0, each name once; "
            "of one: problem_type regression or multi_label_classification",
        ),
        ({"id2label": {"0": "a", "5": "b"}}, "id2label has 2 names for 2 outputs, numbered 0, 5; accepted"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label has 1 names for 2 outputs"),
        ({"pad_token_id": None}, "has no pad_token_id; set it"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "cannot be exported; accepted here"),
        ({"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "O"}}, "id2label has 1 names"),
    ],
)
def test_a_classifier_that_cannot_be_exported_is_refused(tmp_path, classifier_config, changes, message):
    changes = {"architectures": ["LlamaForSequenceClassification"], **changes}
    refused(bare_model(tmp_path / "model", classifier_config("llama"), **changes), tmp_path, message)


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import BartConfig

    config = BartConfig(d_model=16, max_position_embeddings=64)
    source = bare_model(tmp_path / "model", config, architectures=["BartForSequenceClassification"])
    refused(source, tmp_path, "bart is an encoder-decoder; accepted: encoders and decoders")


def test_rows_that_the_source_itself_cannot_read_are_refused(save_classifier, tmp_path, monkeypatch):
    source = save_classifier(tmp_path / "model", "roberta")  # whose table of 130 positions is for 128 tokens
    monkeypatch.setattr("serving.export.rows._context_length", lambda model, source: 130)
    refused(source, tmp_path, "cannot read rows of up to 130 tokens")


def test_a_model_that_cannot_be_traced_is_refused(save_classifier, tmp_path, monkeypatch):
    from serving.export.rows import Rows

    def by_content(self, input_ids, attention_mask):
        return self.model(input_ids[: int(input_ids.sum())]).logits

    source = save_classifier(tmp_path / "model", "gpt2")
    monkeypatch.setattr(Rows, "forward", by_content)
    refused(source, tmp_path, "GPT2ForSequenceClassification cannot be traced into a graph")


@pytest.mark.parametrize("save", ["save_classifier", "save_model"])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(save, request, tmp_path):
    source = request.getfixturevalue(save)(tmp_path / "model", "gpt2", vocab_size=270)
    refused(source, tmp_path, r"its tokenizer has \d+ entries, but the model embeds 270")


@pytest.mark.parametrize(("kind", "asked"), [("llama", None), ("distilbert", "masks")])
def test_a_weight_that_is_no_number_is_refused_by_name(kind, asked, save_model, save_text_model, tmp_path):
    """The weight is that of a token which no text of the proof has: comparing answers alone would not find it."""
    from safetensors.torch import load_file, save_file

    source = save_text_model(tmp_path / "model", kind, asked) if asked else save_model(tmp_path / "model", kind)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    tensors[name][-1, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, f"its weight {name} holds NaN or infinity; its training diverged")


def test_a_model_without_a_token_to_pad_with_is_refused(save_text_model, tmp_path):
    source = save_text_model(tmp_path / "model", "llama", "tags", pad_token_id=None)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    refused(source, tmp_path, r"neither its config.json nor its tokenizer names a pad token; name one")


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(save_text_model, tmp_path):
    source = save_text_model(tmp_path / "model", "bert", "masks")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": None}))
    refused(source, tmp_path, "its tokenizer has no mask token; save the one that it was trained with")


POOLED = [{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "m.Pooling", "path": "1_Pooling"}]


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (
            None,
            {},
            "no modules.json says how to pool it; accepted: sentence-transformers' modules.json of a Transformer",
        ),
        ([*POOLED, {"type": "m.Dense", "path": "2"}], {}, "Transformer, Pooling, Dense found; accepted"),
        ({"a": 1}, {}, "modules.json: is no list of modules"),
        ([POOLED[0] | {"path": "0_T"}, POOLED[1]], {}, "its Transformer is in .*0_T; accepted"),
        (POOLED, {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens; accepted: cls or mean"),
        (
            POOLED,
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pools by cls and mean; accepted: cls or mean",
        ),
        (POOLED, {"pooling_mode": "lasttoken"}, "pools by lasttoken; accepted: cls or mean"),
    ],
)
def test_an_encoder_without_a_head_that_is_pooled_otherwise_is_refused(
    tmp_path, classifier_config, modules, pooling, message
):
    source = bare_model(tmp_path / "model", classifier_config("bert"), architectures=["BertModel"])
    if modules is not None:
        (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    refused(source, tmp_path, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case; put it into the tokenizer instead"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', "default_prompt_name 'query'"),
        ("sentence_bert_config.json", "{", "sentence_bert_config.json: cannot be read"),
    ],
)
def test_what_sentence_transformers_does_to_texts_before_them_is_refused(
    tmp_path, classifier_config, name, content, message
):
    source = bare_model(tmp_path / "model", classifier_config("bert"), architectures=["BertModel"])
    (source / "modules.json").write_text(json.dumps(POOLED))
    (source / name).write_text(content)
    refused(source, tmp_path, message)


def test_the_engine_reads_what_the_export_wrote(onnx_dir):
    assert Engine.open(onnx_dir).manifest == read_manifest(onnx_dir, "onnx")


def test_a_terminated_export_leaves_nothing_behind(model_dir, tmp_path, trivet, monkeypatch):
    def terminated(*arguments):
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("serving.export.decoder.write_reference", terminated)
    code, _, err = trivet("export", model_dir("llama"), tmp_path / "onnx")
    assert (code, "Traceback" in err) == (130, False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_finished_is_told_from_a_folder_that_is_none(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "stopped", "step": 5}')
    with pytest.raises(ExportError, match=r"the run has not finished; finish it: trivet train .*config\.yaml"):
        export_model(tmp_path, tmp_path.parent / "onnx")


def test_a_model_that_answers_the_same_to_everything_is_refused(save_model, tmp_path):
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "model", "gpt2")
    weights = {name: each * 0 for name, each in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "answers 0 to everything; was it trained")
