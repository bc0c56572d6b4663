"""The legs by hand, on a tiny model: train, export, verify, generate; and what bad input prints on the way."""

import json
import shutil
from pathlib import Path

import pytest

TINY = """
run: {name: tiny, steps: 8}
objective: {type: causal_lm}
model: {type: new, hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2,
        context_length: 128}
tokenizer: {type: train, vocab_size: 320}
data: {type: files, train: text.txt, validation_fraction: 0.3}
strategy: {type: scratch}
batch: {rows: 2, max_length: 64}
checkpoint: {every: 4}
log: {tensorboard: false}
"""
BASE = ["model.type=pretrained", "tokenizer.type=pretrained", "strategy.type=full"]
LINES = [f"The {noun} reads line {i} of the file and returns it." for i, noun in enumerate(["cat", "dog", "bird"] * 15)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder to stand in, with a config and its data."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "text.txt").write_text("\n".join(LINES))
    return folder


@pytest.fixture(autouse=True)
def _stand_there(work, monkeypatch):
    monkeypatch.chdir(work)


@pytest.fixture
def onnx_dir(work, trivet) -> Path:
    """The model of tiny.yaml, trained and exported by the commands of the README (once)."""
    if not (work / "onnx").exists():
        assert trivet("train", "tiny.yaml")[0] == 0
        code, out, err = trivet("export", "runs/tiny", "onnx")
        assert code == 0, err
        assert "tokens in a crowd" in out
    return work / "onnx"


def test_a_dry_run_builds_everything_and_writes_nothing(work, trivet):
    code, out, _ = trivet("train", "tiny.yaml", "--dry-run", "run.name=dry")
    assert code == 0
    assert "8 steps of 2 rows" in out
    assert not (work / "runs" / "dry").exists()


def test_a_dry_run_knows_the_number_of_processes(work, trivet):
    code, _, err = trivet("train", "tiny.yaml", "--dry-run", "--nproc", "3", "run.name=dry")
    assert code == 2
    assert "batch.rows: 2 rows cannot be shared by 3 processes" in err


def test_a_finished_run_whose_model_was_lost_is_finished_again(work, onnx_dir, trivet):
    shutil.copytree(work / "runs" / "tiny", work / "runs" / "lost")
    model = work / "runs" / "lost" / "model"
    shutil.rmtree(model)
    saved = work / "runs" / "lost" / "config.yaml"
    saved.write_text(saved.read_text().replace("name: tiny", "name: lost"))
    assert trivet("train", "tiny.yaml", "run.name=lost")[0] == 0
    assert (model / "model.safetensors").read_bytes() == (
        work / "runs" / "tiny" / "model" / "model.safetensors"
    ).read_bytes()


def test_fewer_steps_than_were_taken_are_refused(onnx_dir, trivet):
    code, _, err = trivet("train", "tiny.yaml", "run.steps=4")
    assert code == 2
    assert "run.steps: 4 found, but the run stands at step 8" in err


def test_a_longer_run_says_that_its_schedule_changes(work, onnx_dir, trivet):
    shutil.copytree(work / "runs" / "tiny", work / "runs" / "longer")
    saved = work / "runs" / "longer" / "config.yaml"
    saved.write_text(saved.read_text().replace("name: tiny", "name: longer"))
    code, _, err = trivet("train", "tiny.yaml", "run.name=longer", "run.steps=10")
    assert code == 0
    assert "run.steps was 8 and is 10: the cosine schedule" in err


def test_a_longer_run_without_a_checkpoint_says_that_it_starts_again(work, trivet):
    name = ["run.name=again", "checkpoint.every=null"]
    assert trivet("train", "tiny.yaml", *name, "run.steps=2")[0] == 0
    code, _, err = trivet("train", "tiny.yaml", *name, "run.steps=3")
    assert code == 0
    assert "run.steps was 2 and is 3: the finished run kept no checkpoint to go on from" in err
    assert "schedule of the steps to come" not in err
    assert "step 1/3" in err


def test_the_run_folder_holds_what_the_design_says(work, onnx_dir):
    run = work / "runs" / "tiny"
    assert {"config.yaml", "status.json", "metrics.jsonl", "checkpoints", "model", "result.json"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["eval_loss"] < result["initial_metrics"]["eval_loss"]
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000004", "step-00000008"]


def test_training_a_finished_run_again_changes_nothing(work, onnx_dir, trivet):
    before = (work / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    code, _, err = trivet("train", "tiny.yaml")
    assert code == 0
    assert "already finished" in err
    assert (work / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before


def test_generated_tokens_are_those_of_transformers(work, onnx_dir, trivet):
    """Written by `trainer`, exported, read by `serving`: the contract between the two."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = trivet("generate", "onnx", "--prompt", "The cat reads", "--max-new-tokens", 12)
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(work / "runs/tiny/model")
    model = AutoModelForCausalLM.from_pretrained(work / "runs/tiny/model", dtype=torch.float32)
    inputs = tokenizer("The cat reads", return_tensors="pt")
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=12)
    assert out == tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_file_of_rows_is_answered_in_order_with_its_ids(work, onnx_dir, trivet):
    rows = [{"id": f"row-{i}", "prompt": line[: 10 + i]} for i, line in enumerate(LINES[:12])]
    rows.append({"id": "chat", "messages": [{"role": "user", "content": "The dog?"}]})
    (work / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = trivet("generate", "onnx", "--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", 5)
    assert code == 0, err
    answers = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    alone = [trivet("generate", "onnx", "--prompt", row["prompt"], "--max-new-tokens", 5)[1] for row in rows[:3]]
    assert alone == [answer["text"] + "\n" for answer in answers[:3]]


def test_verify_proves_the_directory_again(onnx_dir, trivet):
    code, out, _ = trivet("verify", "onnx")
    assert code == 0
    assert "logits one by one" in out


def _altered(onnx_dir: Path, target: Path) -> Path:
    shutil.copytree(onnx_dir, target)
    weights = next(path for path in target.iterdir() if path.name.startswith("model.onnx"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return target


def _unverified(onnx_dir: Path, target: Path) -> Path:
    shutil.copytree(onnx_dir, target)
    (target / "verification.json").unlink()
    return target


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(
    ("spoil", "message"), [(_altered, "altered since it was written"), (_unverified, "never verified; run: trivet")]
)
def test_a_directory_that_is_not_proven_is_refused(onnx_dir, tmp_path, trivet, command, spoil, message):
    arguments = {"generate": ["--prompt", "x"], "serve": ["--port", "0"]}[command]
    code, out, err = trivet(command, spoil(onnx_dir, tmp_path / "onnx"), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["train", "tiny.yaml", "run.name=b", "optim.lrr=1"], "did you mean optim.lr?"),
        (["train", "tiny.yaml", "run.name=b", "data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["train", "tiny.yaml", "run.name=b", "data.train=empty.txt"], "no rows in empty.txt"),
        (["train", "tiny.yaml", "run.name=b", "data.text=body"], "line 1 has no 'body'; it has: text"),
        (["train", "tiny.yaml", "optim.lr=0.5"], "holds a different run (optim.lr 0.0003 there, 0.5 here)"),
        (["train", "tiny.yaml", "run.name=b", "--nproc", "2", "--parallel", "magic"], "--parallel: 'magic' found"),
        (["train", "tiny.yaml", "run.name=b", *BASE, "model.path=runs/no/model"], "runs/no/model: no such folder"),
        (["export", "nowhere", "onnx2"], "nowhere: no such folder"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["export", "tiny.yaml", "onnx2"], "tiny.yaml: is a file; give the folder that it is in"),
        (["verify", "onnx/model.onnx"], "onnx/model.onnx: is a file; give the folder that it is in"),
        (["generate", "onnx/model.onnx", "--prompt", "x"], "onnx/model.onnx: is a file; give the"),
        (["generate", "onnx"], "--prompt, --input: give exactly one"),
        (["generate", "onnx", "--input", "nowhere.jsonl"], "--input: nowhere.jsonl cannot be read"),
        (["generate", "onnx", "--input", "text.txt"], "--input: text.txt, line 1: not JSON"),
        (["generate", "onnx", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "onnx", "--prompt", "x", "--provider", "cuda"], "cuda"),
        (["generate", "onnx", "--prompt", "x " * 500], "at most 127"),
        (["serve", "onnx", "--api-key-file", "nowhere"], "--api-key-file: nowhere cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(work, onnx_dir, trivet, arguments, message):
    (work / "empty.txt").write_text("")
    before = sorted(work.rglob("*"))
    code, out, err = trivet(*arguments)
    assert (code, out) == (2, ""), err
    assert message in err.splitlines()[-1]
    assert sorted(work.rglob("*")) == before, "something was written"
