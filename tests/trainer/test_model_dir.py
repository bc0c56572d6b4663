"""The model directory: plain Hugging Face format, the same numbers, without Trivet."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from serving import directory
from trainer import model_dir

IDS = torch.arange(20)[None]

LOAD_WITHOUT_TRIVET = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, base, output = sys.argv[1:]
ids = torch.arange(20)[None]
tokenizer = AutoTokenizer.from_pretrained(folder)
question = [{"role": "user", "content": "a file?"}]
chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
with torch.no_grad():
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(untouched, folder + "/adapter").eval()(ids).logits
save_file({"merged": merged, "unmerged": unmerged}, output)
assert not {"trainer", "serving", "launch"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps([chat, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length]))
"""


@pytest.fixture
def trained_logits(monkeypatch, parts_of):
    """Return a function that trains a config and returns the logits of the model just before it is saved."""

    def run(config) -> torch.Tensor:
        logits = []
        save = model_dir.save_model

        def look(final, model, *args, **kwargs):
            with torch.no_grad():
                logits.append(model.eval()(IDS).logits)
            return save(final, model, *args, **kwargs)

        monkeypatch.setattr(model_dir, "save_model", look)
        # Lean layers differ from transformers' own by rounding, and what is compared here is what was saved.
        monkeypatch.setattr("trainer.token_model.make_lean", lambda model: lambda: None)
        parts_of(config)
        return logits[0]

    return run


def test_the_model_and_its_adapter_load_in_a_process_without_trivet(make_config, trained_logits, base_model, tmp_path):
    config = make_config("sft", "lora")
    logits = trained_logits(config)
    folder, output = config.run.folder / "model", tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", LOAD_WITHOUT_TRIVET, str(folder), base_model, str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = load_file(output)
    assert torch.equal(loaded["unmerged"], logits)
    torch.testing.assert_close(loaded["merged"], logits, rtol=1e-5, atol=1e-5)
    chat, end, pad, side, longest = json.loads(done.stdout.splitlines()[-1])
    assert chat == "<|user|>\na file?<|end|><|assistant|>\n"
    assert (end, pad, side, longest) == ("<|end|>", "<|pad|>", "right", 128)


def test_a_model_from_scratch_comes_back_bit_for_bit(make_config, trained_logits):
    config = make_config()
    logits = trained_logits(config)
    loaded = AutoModelForCausalLM.from_pretrained(config.run.folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 1
    assert loaded.config.pad_token_id == 0
    assert loaded.config.bos_token_id is None


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_classifier_comes_back_with_its_labels(make_config, trained_logits, strategy):
    config = make_config("classification", strategy)
    logits = trained_logits(config)
    loaded = AutoModelForSequenceClassification.from_pretrained(config.run.folder / "model", dtype=torch.float32).eval()
    assert loaded.config.id2label == {0: "noun", 1: "other", 2: "verb"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "strategy"), [("causal_lm", "scratch"), ("sft", "lora")])
def test_tied_embeddings_stay_tied(make_config, trained_logits, objective, strategy):
    config = make_config(objective, strategy)
    trained_logits(config)
    folder = config.run.folder / "model"
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert "lm_head.weight" not in names
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_manifest_vouches_for_every_file_and_says_where_the_model_is_from(make_config, train, base_model):
    config = make_config("sft", "lora")
    assert train(config) == 0
    folder = config.run.folder / "model"
    manifest = directory.read_manifest(folder, "model")
    directory.check_files(folder, manifest)
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert on_disk - {"trivet.json"} == manifest["files"].keys()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= on_disk
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= on_disk
    found = {name: manifest[name] for name in ("objective", "strategy", "labels", "base_model", "step")}
    assert found == {"objective": "sft", "strategy": "lora", "labels": None, "base_model": base_model, "step": 6}
    assert manifest["max_length"] == config.batch.max_length
    assert not [path for path in config.run.folder.iterdir() if "partial" in path.name]


def test_weights_that_need_unpickling_are_refused(make_config, base_model, tmp_path):
    import shutil

    from serving.directory import BadInput
    from trainer import build

    copy = tmp_path / "pickled"
    shutil.copytree(base_model, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    config = make_config("sft", "full", model={"path": str(copy)})
    with pytest.raises(BadInput, match=r"model\.path: .* holds no safetensors, only pytorch_model"):
        build.build(config)


def test_a_tokenizer_with_more_entries_than_the_embedding_is_refused(make_config, base_model, tmp_path):
    import shutil

    from serving.directory import BadInput
    from trainer import build

    small = tmp_path / "small"
    shutil.copytree(base_model, small)
    weights = load_file(small / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:290].clone()
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 290}))
    with pytest.raises(BadInput, match=r"tokenizer\.path: 300 entries, but .* embeds 290"):
        build.build(make_config("sft", "full", model={"path": str(small)}))
