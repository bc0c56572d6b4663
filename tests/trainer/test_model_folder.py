"""Folders of models that are broken, pickled or full of code are refused before anything of them is loaded or run."""

import json
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from serving import directory
from serving.directory import BadInput, DirectoryError
from serving.export.source import open_source
from serving.export_paths import ExportError
from trainer import build, hub, model_dir, model_folder, models
from trainer.config import PretrainedModel
from trainer.tokenizers import load_tokenizer


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def refusal(base):
    """Return a function that checks the folder of the base model and returns why it was refused, in one line."""

    def run() -> str:
        with pytest.raises(BadInput) as caught:
            model_folder.check_base(str(base), trust_remote_code=False)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"model.path: {base}")
        return str(caught.value)

    return run


def test_a_file_is_no_folder(base):
    with pytest.raises(BadInput, match=r"^model\.path: .*/config\.json: is a file; give the folder that holds it$"):
        hub.check_reachable(str(base / "config.json"), "model.path")


def test_an_empty_folder_is_named(base, refusal):
    shutil.rmtree(base)
    base.mkdir()
    assert "is empty" in refusal()


def test_a_folder_without_a_config_is_no_model(base, refusal):
    (base / "config.json").unlink()
    assert "holds no config.json, so it is no model folder" in refusal()


@pytest.mark.parametrize(
    ("text", "said"), [("{broken", "is not JSON (Expecting property name"), ("[1]", "holds a list, not an object")]
)
def test_a_broken_config_is_named(base, refusal, text, said):
    (base / "config.json").write_text(text)
    assert f"{base}/config.json: {said}" in refusal()


def test_a_folder_without_weights_is_named(base, refusal):
    (base / "model.safetensors").unlink()
    assert "holds no weights (*.safetensors)" in refusal()


def test_a_missing_shard_is_named(base, refusal):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    model_folder.check_base(str(base), trust_remote_code=False)
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"{shards[1].name} is missing (of {len(shards)} files)" in refusal()


def test_an_adapter_is_no_model_and_sends_nobody_to_another(base, refusal, tokenizer):
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))
    assert "holds a PEFT adapter" in refusal()
    with pytest.raises(BadInput, match="is a PEFT adapter"):  # as of a hub name, whose folder is not seen before
        models.build_model(PretrainedModel(type="pretrained", path=str(base)), tokenizer, "AutoModelForCausalLM", None)


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_pickle_is_never_read(base, refusal, make_config, tokenizer, tmp_path, name):
    canary = tmp_path / "ran"
    weights = base / "model.safetensors"
    (base / name).write_bytes(pickle.dumps(Trap(canary)))
    build.build(make_config("sft", "full", model={"path": str(base)}))  # beside good weights it is passed over
    weights.unlink()
    assert f"holds no safetensors, only {name}: a pickle, which is never read" in refusal()
    with pytest.raises(BadInput, match="a pickle, which is never read because it can run code"):
        build.build(make_config("sft", "full", model={"path": str(base)}))
    with pytest.raises(BadInput, match=r"no model can be loaded"):  # as of a hub name, whose folder is not seen before
        models.build_model(PretrainedModel(type="pretrained", path=str(base)), tokenizer, "AutoModelForCausalLM", None)
    assert not canary.exists()
    pickle.loads((base / name).read_bytes())
    assert canary.exists(), "the trap works"


@pytest.mark.parametrize("how", ["index", "config", "index that the config names"])
def test_a_pickle_that_stands_in_the_list_of_weights_is_never_read(base, make_config, tokenizer, tmp_path, how):
    """transformers goes by the names in that list, whatever `use_safetensors` says."""
    weights, canary = load_file(base / "model.safetensors"), tmp_path / "ran"
    name = "model.safetensors" if how == "index" else "adapter_model.bin"
    torch.save({"weight": Trap(canary)}, base / "adapter_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "adapter_model.bin")}
    if how == "index":
        (base / "model.safetensors").rename(base / "other.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        if how != "config":
            name = "named.safetensors.index.json"
            (base / name).write_text(json.dumps(index))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    said = rf"^model\.path: {base}: names 'adapter_model\.bin' as a file of its weights; accepted: safetensors files"
    with pytest.raises(BadInput, match=said):
        build.build(make_config("sft", "full", model={"path": str(base)}))
    with pytest.raises(BadInput, match=said):  # as of a hub name, whose folder is not seen before
        models.build_model(PretrainedModel(type="pretrained", path=str(base)), tokenizer, "AutoModelForCausalLM", None)
    with pytest.raises(ExportError, match=r"names 'adapter_model\.bin' as a file of its weights"):
        open_source(base)
    directory.seal(base, "model")
    with pytest.raises(DirectoryError, match=r"names 'adapter_model\.bin' as a file of its weights"):
        model_dir.load(base)
    assert not canary.exists()


def test_a_weight_file_elsewhere_is_not_read(base, tmp_path, tokenizer):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"names '\.\./elsewhere\.safetensors' as a file of its weights"):
        models.build_model(PretrainedModel(type="pretrained", path=str(base)), tokenizer, "AutoModelForCausalLM", None)


def test_the_command_that_is_given_converts_weights_and_runs_no_trap(base, refusal, make_config, tmp_path):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    half = len(weights) // 2
    for number, part in enumerate((list(weights)[:half], list(weights)[half:])):
        torch.save({name: weights[name] for name in part}, base / f"pytorch_model-{number}.bin")
    python, option, code = shlex.split(refusal().rpartition("convert it: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    converted = load_file(base / "model.safetensors")
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    build.build(make_config("sft", "full", model={"path": str(base)}))

    canary = tmp_path / "ran"
    torch.save(Trap(canary), base / "pytorch_model-0.bin")
    with pytest.raises(pickle.UnpicklingError):
        exec(code, {})
    assert not canary.exists()


# --- code ------------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({canary!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = {kind!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """What the code of a model creates when it runs; transformers copies that code into this test's own folder."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "ran"


def add_code(base: Path, canary: Path, kind: str) -> None:
    """Give the model at `base` code of its own, under a model type."""
    (base / "own.py").write_text(CODE.format(canary=str(canary), kind=kind))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for file, change in {
        "config.json": {"model_type": kind, "auto_map": auto},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}},
    }.items():
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))


def test_code_of_a_known_type_of_model_is_passed_over(base, canary, make_config):
    add_code(base, canary, "llama")
    build.build(make_config("sft", "full", model={"path": str(base)}))
    assert not canary.exists()


def test_a_model_made_of_its_own_code_is_refused(base, canary, make_config, refusal, tokenizer):
    add_code(base, canary, "own")
    assert "is made of Python code that lies with it (auto_map); if you trust it, set model.trust" in refusal()
    with pytest.raises(BadInput, match="trust_remote_code=true"):
        build.build(make_config("sft", "full", model={"path": str(base)}))
    with pytest.raises(BadInput, match="trust_remote_code=true"):  # as of a hub name
        models.build_model(PretrainedModel(type="pretrained", path=str(base)), tokenizer, "AutoModelForCausalLM", None)
    assert not canary.exists()


def test_a_tokenizer_made_of_its_own_code_does_not_run_it(base, canary):
    add_code(base, canary, "own")
    for name in ("config.json", "tokenizer.json"):
        (base / name).unlink()  # nothing is left to load it by but its code
    with pytest.raises(BadInput, match=r"^tokenizer\.path: no tokenizer can be loaded from "):
        load_tokenizer(str(base))
    assert not canary.exists()


def test_trusted_code_runs_and_the_run_says_so_first(base, canary, make_config, capsys):
    add_code(base, canary, "own")
    model = {"path": str(base), "trust_remote_code": True}
    parts = build.build(make_config("sft", "full", model=model))
    assert canary.exists()
    assert type(parts.model).__name__ == "OwnModel"
    assert type(parts.tokenizer).__name__ == "OwnTokenizer"
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"WARNING: model.trust_remote_code is on: Python code from {base} runs with all that you may do"


def test_trust_in_a_tokenizer_is_its_own_switch(base, canary, make_config, capsys):
    add_code(base, canary, "llama")
    tokenizer = {"type": "pretrained", "path": str(base), "trust_remote_code": True}
    build.build(make_config("sft", "full", model={"path": str(base)}, tokenizer=tokenizer))
    assert canary.exists()
    assert capsys.readouterr().err.startswith(f"WARNING: tokenizer.trust_remote_code is on: Python code from {base}")
    with pytest.raises(ValueError, match=r"trust_remote_code is for tokenizer\.path, which is not set"):
        make_config("sft", "full", tokenizer={"type": "pretrained", "trust_remote_code": True})


def test_code_that_lies_with_a_model_is_part_of_its_fingerprint(base, canary):
    before = model_folder.fingerprint(str(base))
    add_code(base, canary, "own")
    with_code = model_folder.fingerprint(str(base))
    (base / "own.py").write_text((base / "own.py").read_text() + "# changed\n")
    assert len({before, with_code, model_folder.fingerprint(str(base))}) == 3


def test_attention_code_from_the_hub_is_not_asked_for(base, make_config):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    assert build.build(make_config("sft", "full", model={"path": str(base)})).model.config._attn_implementation != (
        "somebody/kernel"
    )


def test_the_fingerprint_of_a_hub_name_is_the_commit_that_is_in_the_cache(base, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_folder.fingerprint("some/model") is None
    cached = tmp_path / "models--some--model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(base, cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        assert model_folder.fingerprint("some/model") == commit


def test_ranks_agree_on_the_base_model_and_on_how_their_batches_are_cut(base, make_config, monkeypatch):
    agreed = {}
    monkeypatch.setattr(build.handshake, "agree", lambda _, subject, facts, mend: agreed.update({subject: facts}))
    config = make_config("sft", "full", model={"path": str(base)})
    parts = build.build(config)
    assert agreed["data"]["base model"] == model_folder.fingerprint(str(base))[:12]
    assert agreed["batches"] == {"packed rows": True, "rows of batches": len(parts.feed.train)}
