"""Made-up programs and run folders for the tests of processes, sweeps and reports."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BASE = """
run: {name: base, steps: 4}
objective: {type: causal_lm}
model: {type: pretrained, path: no/such/model}
data: {type: embedded}
strategy: {type: lora, rank: 4}
"""


@pytest.fixture
def on_path(monkeypatch):
    """Let child processes import the packages of this clone."""
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *inherited]))


@pytest.fixture
def script(tmp_path):
    """Return a function that saves a Python program and returns the command that runs it."""

    def save(text: str, name: str = "program.py") -> list[str]:
        path = tmp_path / name
        path.write_text(text)
        return [sys.executable, str(path)]

    return save


@pytest.fixture
def base_config(tmp_path):
    """A run config that is valid, though its model is nowhere."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a finished run folder, as the trainer does, and returns its path."""

    def make(name: str, *, losses=(3.0, 2.0, 1.5), state: str = "done", strategy: str = "lora", weights: int = 1000):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(BASE.replace("type: lora, rank: 4", f"type: {strategy}"))
        code = {"done": 0, "failed": 1, "stopped": 75}.get(state)
        status = {"format_version": 1, "state": state, "code": code, "step": len(losses), "reason": ""}
        rows = [{"kind": "eval", "step": 0, "eval_loss": 3.5, "perplexity": 33.1}]
        rows += [
            {"kind": "train", "step": i, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 900.0 + i}
            for i, loss in enumerate(losses, start=1)
        ]
        rows += [{"kind": "eval", "step": len(losses), "eval_loss": losses[-1], "perplexity": 4.5}]
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if state == "done":
            (folder / "result.json").write_text(json.dumps(result(strategy, losses, weights)))
        return folder

    return make


def result(strategy, losses, weights):
    return {
        "format_version": 1,
        "objective": "causal_lm",
        "strategy": strategy,
        "steps": len(losses),
        "score": losses[-1],
        "score_name": "eval_loss",
        "score_mode": "min",
        "metrics": {"eval_loss": losses[-1], "perplexity": 4.5},
        "initial_metrics": {"eval_loss": 3.5, "perplexity": 33.1},
        "trainable_parameters": weights,
        "total_parameters": 123_456,
        "tokens": 4096,
        "seconds": 75.4,
        "tokens_per_s": 901.5,
        "peak_memory_bytes": 700 * 1024**2,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "data_fingerprint": "0f1e2d",
        "world_size": 1,
    }
