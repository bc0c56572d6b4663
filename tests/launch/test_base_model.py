"""A base model that another config makes is made when it is missing, once, outside the launcher's world."""

import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

from launch import base_model
from launch.base_model import ensure_base_model
from launch.config_file import ConfigError, load
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
