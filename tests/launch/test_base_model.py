"""A base model that another config makes is made when it is missing, once, outside the launcher's world."""

import fcntl
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from launch import base_model
from launch.base_model import ensure_base_model
from launch.config_file import ConfigError, load
from serving.directory import BadInput
from trainer import dataset
from trainer.config import RunConfig

BASE = """
run: {name: base, dir: DIR, steps: 2}
objective: {type: causal_lm}
model: {type: new, hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, context_length: 64}
tokenizer: {type: train, vocab_size: 320}
data: {type: files, train: DIR/text.txt, validation_fraction: 0.3}
strategy: {type: scratch}
batch: {rows: 1, max_length: 32}
log: {tensorboard: false}
"""
TUNED = """
run: {name: tuned, dir: DIR, steps: 1}
objective: {type: causal_lm}
model: {type: pretrained, path: DIR/base/model, made_by: base.yaml}
data: {type: files, train: DIR/text.txt}
strategy: {type: full}
"""


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A config whose base model is made by the config beside it."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(40)))
    for name, text in (("base", BASE), ("tuned", TUNED)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DIR", str(tmp_path)))
    return tmp_path / "tuned.yaml"


def test_it_is_trained_first_by_one_process_that_knows_no_rank(tuned, on_path, monkeypatch):
    # Left in the environment, these would make the training wait for a second process.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    config = load(tuned, [], RunConfig)
    assert ensure_base_model(config) == 0
    assert (tuned.parent / "base" / "model" / "config.json").is_file()
    monkeypatch.setattr(base_model.processes, "run_group", lambda *_: pytest.fail("it was trained again"))
    assert ensure_base_model(config) == 0


def test_its_exit_code_is_passed_on(tuned, monkeypatch):
    monkeypatch.setattr(base_model.processes, "run_group", lambda *_: 75)
    assert ensure_base_model(load(tuned, [], RunConfig)) == 75


def test_a_stop_while_another_process_makes_it_ends_the_wait(tuned, monkeypatch):
    monkeypatch.setattr(base_model.processes, "run_group", lambda *_: pytest.fail("it did not wait"))
    with (tuned.parent / ".base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert ensure_base_model(load(tuned, [], RunConfig)) == 75


def test_a_config_that_makes_another_folder_is_refused(tuned):
    config = load(tuned, ["model.path=elsewhere"], RunConfig)
    with pytest.raises(
        ConfigError, match=r"model\.made_by: .*base\.yaml makes .*base/model, but model\.path is elsewhere"
    ):
        ensure_base_model(config)


CLASSIFIER = """
run: {name: tuned, dir: DIR, steps: 1}
objective: {type: classification}
model: {type: pretrained, path: DIR/base/model, made_by: base.yaml}
data: {type: files, train: DIR/rows.jsonl, validation: DIR/held_out.jsonl}
strategy: {type: full}
batch: {rows: 2}
"""
TAGGER = CLASSIFIER.replace("{type: classification}", "{type: token_classification}")
CHATS = CLASSIFIER.replace("{type: classification}", "{type: sft}")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


LABELLED = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(20)]
TAGGED = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}]
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@pytest.mark.parametrize(
    ("config", "train", "held_out", "override", "said"),
    [
        (CLASSIFIER, LABELLED, LABELLED, "data.label=sentiment", "data.label: .*rows.jsonl, line 1 has no 'sentiment'"),
        (CLASSIFIER, LABELLED, LABELLED, "data.text=body", "data.text: .*jsonl, line 1 has no 'body'"),
        (CLASSIFIER, LABELLED, LABELLED, "data.train=no.csv", "no.csv: no such file"),
        (CLASSIFIER, LABELLED, [{"text": "c", "label": "so"}], "run.seed=1", "line 1: 'so' is in no training row"),
        (TAGGER, TAGGED, [{"tokens": ["a"], "tags": ["Z"]}], "run.seed=1", "line 1: 'Z' is in no training row"),
        (CHATS, CHAT, [{"messages": "a"}], "run.seed=1", "held_out.jsonl, line 1"),
        (CHATS, CHAT, CHAT, "batch.rows=3", "batch.rows: 3 rows cannot be shared by 2 processes"),
    ],
    ids=["label", "text", "file", "held-out label", "held-out tag", "held-out chat", "share of a batch"],
)
@pytest.mark.parametrize("is_dry", [True, False], ids=["dry run", "train"])
def test_what_needs_no_model_is_refused_before_the_base_is_made(
    tuned, trivet, monkeypatch, config, train, held_out, override, said, is_dry
):
    if "processes" in said and not is_dry:
        pytest.skip("a run in one process takes any number of rows")
    folder = tuned.parent
    tuned.write_text(config.replace("DIR", str(folder)))
    write_rows(folder / "rows.jsonl", train)
    write_rows(folder / "held_out.jsonl", held_out)
    monkeypatch.setattr(base_model.processes, "run_group", lambda *_: pytest.fail("the base was made"))
    extra = ["--dry-run", "--nproc", "2"] if is_dry else []
    code, out, err = trivet("train", tuned, override, *extra)
    assert (code, out) == (2, ""), err
    assert re.search(said, err), err
    assert not list(folder.glob("*/")), "something was written"


def test_a_dry_run_without_the_base_says_what_it_could_not_check(tuned, trivet):
    code, out, err = trivet("train", tuned, "--dry-run")
    assert code == 0, err
    own, base, checked = out.splitlines()
    assert "/tuned: its rows, columns and labels are checked; the rest of it once " in own
    assert base.endswith("base.yaml, which is checked here")
    assert re.search(r"/base: 2 steps of 1 rows, .*nothing was written", checked)


def test_of_a_stream_only_the_first_rows_are_looked_at_before_the_base_is_made(tuned, monkeypatch):
    folder = tuned.parent
    tuned.write_text(CHATS.replace("DIR", str(folder)))
    write_rows(folder / "rows.jsonl", CHAT * 5 + [{"messages": "a"}])
    write_rows(folder / "held_out.jsonl", CHAT)
    monkeypatch.setattr(dataset, "_CHECKED_ROWS", 5)
    base_model.check_without_base(load(tuned, ["data.streaming=true", "data.leaks='off'"], RunConfig))
    monkeypatch.setattr(dataset, "_CHECKED_ROWS", 6)
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 6"):
        base_model.check_without_base(load(tuned, ["data.streaming=true", "data.leaks='off'"], RunConfig))
