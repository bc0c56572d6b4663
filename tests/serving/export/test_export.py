"""Export: what comes out, where it goes, and that a failed proof publishes nothing."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from serving.directory import check_files, read_manifest
from serving.engine import Engine
from serving.export import ExportError, VerificationFailed, export_model


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


def test_of_several_chat_templates_the_hash_is_that_of_the_default(model_dir, tmp_path):
    import hashlib

    from transformers import AutoTokenizer

    source = Path(shutil.copytree(model_dir("llama"), tmp_path / "source"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "rag": "{{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(source)
    export_model(source, tmp_path / "onnx")
    manifest = read_manifest(tmp_path / "onnx", "onnx")
    assert manifest["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()


def test_generation_defaults_that_are_not_served_are_said_after_the_export(model_dir, tmp_path, trivet):
    source = Path(shutil.copytree(model_dir("llama"), tmp_path / "source"))
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.1}')
    code, _, err = trivet("export", source, tmp_path / "onnx")
    assert code == 0
    assert "note: generation_config.json asks for repetition_penalty 1.1, which is not served\n" in err


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


@pytest.mark.parametrize("name", ["answers.jsonl", "another/model.onnx"])
def test_what_came_into_an_export_later_is_not_lost_with_it(model_dir, onnx_copy, name):
    other = onnx_copy / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("kept")
    with pytest.raises(ExportError, match=f"{name}: no part of the export that is there, and would be lost"):
        export_model(model_dir("llama"), onnx_copy)
    assert other.read_text() == "kept"


def test_a_folder_that_is_no_onnx_directory_is_never_replaced(tmp_path, tiny_config, monkeypatch, bare_model):
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
