"""What is exported: a model directory, a run or a sweep; every other folder is refused before any work."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from serving.directory import DirectoryError, identity, seal
from serving.export import ExportError, export_model


def test_a_run_and_a_sweep_lead_to_their_model(tmp_path, tiny_config, bare_model):
    from serving.export_paths import find_model

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


def test_other_kinds_of_folder_are_refused(tmp_path, tiny_config, bare_model, refused):
    refused(tmp_path / "none", tmp_path, "none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"has no config\.json, model/ or result\.json")
    source = bare_model(tmp_path / "model", tiny_config("llama"))
    (source / "adapter_config.json").write_text("{}")
    refused(source, tmp_path, "an unmerged adapter lies beside the weights")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, r"has no \*\.safetensors weights")


def test_a_model_in_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path, model_dir):
    import torch
    from safetensors.torch import load_file

    from serving.export.source import open_source

    source = tmp_path / "the model's folder"
    shutil.copytree(model_dir("llama"), source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(ExportError) as refusal:
        export_model(source, tmp_path / "onnx")
    found, _, command = str(refusal.value).partition("; convert it: python ")
    said = "has no *.safetensors weights, only pytorch_model.bin: a pickle, which is not read because it can run code"
    assert found == f"{source}: {said}"
    subprocess.run([sys.executable, *shlex.split(command)], check=True, timeout=600)
    assert {name: weight.tolist() for name, weight in load_file(source / "model.safetensors").items()} == {
        name: weight.tolist() for name, weight in weights.items()
    }
    assert open_source(source).task == "causal_lm"


def test_a_trivet_model_directory_is_checked_and_remembered(tmp_path, tiny_config, bare_model):
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


def test_an_objective_that_is_not_the_models_is_refused(tmp_path, tiny_config, bare_model, refused):
    source = bare_model(tmp_path / "model", tiny_config("llama"))
    seal(source, "model", objective="classification", labels=["a"], strategy="full", base_model=None, step=1)
    refused(source, tmp_path, r"trivet\.json says classification, but config\.json LlamaForCausalLM")
    seal(source, "model", objective="seq2seq", labels=None, strategy="full", base_model=None, step=1)
    accepted = "causal_lm, sft, classification, token_classification, masked_lm"
    refused(source, tmp_path, f"objective seq2seq cannot be exported; accepted: {accepted}")


def test_a_run_that_has_not_finished_is_told_from_a_folder_that_is_none(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "stopped", "step": 5}')
    with pytest.raises(ExportError, match=r"the run has not finished; finish it: trivet train .*config\.yaml"):
        export_model(tmp_path, tmp_path.parent / "onnx")
