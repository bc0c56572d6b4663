"""`trivet plan`: the table, the recommendation, and bad input, on models of which nothing is built."""

import json
import resource
from pathlib import Path

import pytest

from launch import config_file
from launch.plan import Asked, plan
from serving.directory import BadInput
from trainer.config import RunConfig

CONFIG = """
run: {name: planned, steps: 50}
objective: {type: causal_lm}
model: {type: new, hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 4, num_kv_heads: 2,
        context_length: 64}
tokenizer: {type: train, vocab_size: 300}
data: {type: embedded, max_rows: 60}
strategy: {type: scratch}
batch: {rows: 4, max_length: 64}
"""
LARGE = ["model.hidden_size=8192", "model.intermediate_size=22016", "model.num_heads=64", "model.num_kv_heads=8"]


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Return a function that plans the config with overrides, and returns the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)

    def run(*overrides: str, json_output: bool = False, **asked) -> tuple[int, str]:
        config = config_file.load(Path("c.yaml"), list(overrides), RunConfig)
        code = plan(Path("c.yaml"), list(overrides), config, Asked(**asked), json_output=json_output)
        return code, capsys.readouterr().out

    return run


def test_ddp_is_recommended_where_it_fits_and_else_the_next_that_does(planned):
    code, out = planned(ranks=2, memory_gb=80)
    assert code == 0
    assert "recommended: ddp, the cheapest that fits: trivet train c.yaml --nproc 2 --parallel ddp" in out
    assert not Path("runs").exists()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out = planned(*LARGE, json_output=True, ranks=2, memory_gb=22)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = json.loads(out)
    # Two layers of q and o 8192 * 8192, k and v 8192 * 1024, three of 8192 * 22016, two norms; embedding, norm.
    weights = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 22016 + 2 * 8192) + 300 * 8192 + 8192
    assert found["total"] == weights
    assert found["modes"]["ddp"]["by_term"]["optimizer"] == 8 * weights
    assert found["modes"]["ddp"]["needed_bytes"] > 16 * weights > 21e9
    assert not found["modes"]["ddp"]["fits"]
    assert found["recommended"] not in ("ddp", None)
    assert code == 0
    assert grown_kib * 1024 < 0.2 * 4 * weights, "nothing of the model is allocated"


def test_where_nothing_fits_it_says_what_needs_least_and_what_to_lower(planned, monkeypatch):
    monkeypatch.setattr("trainer.plan.recordings._MOST_TOKENS", 512)  # of 4096 rows that are not recorded anyway
    code, out = planned("batch.rows=4096", ranks=1, memory_gb=0.2, on_cpu=True)
    assert code == 1
    assert "nothing fits: single needs least, " in out
    assert "use more processes, or batch.micro_rows=" in out
    advised = out.rpartition("batch.micro_rows=")[2].split()[0]
    assert planned("batch.rows=4096", f"batch.micro_rows={advised}", ranks=1, memory_gb=0.2, on_cpu=True)[0] == 0


def test_the_time_is_the_arithmetic_by_what_the_gpus_reach(planned):
    found = json.loads(planned(json_output=True, ranks=2, memory_gb=80, tflops=1.0, mfu=0.5)[1])
    assert found["flops"] == pytest.approx(found["flops_per_token"] * found["tokens_per_step"] * 50)
    assert found["time_s"] == pytest.approx(found["flops"] / (2 * 1e12 * 0.5))
    # 6 for each weight of a matrix that multiplies, and some for attention.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 300 * 64
    assert 6 * matrices < found["flops_per_token"] < 7 * matrices + 2 * 3 * 4 * 64 * 64


def test_a_mode_that_the_config_does_not_go_with_says_why(planned):
    code, out = planned("optim.type=adafactor", ranks=2, memory_gb=80)
    assert code == 0
    assert "zero3: optim.type: adafactor found; accepted with zero3: adamw; use that, or --parallel ddp" in out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"memory_gb": 0}, r"--gpu-memory-gb: 0 found; accepted: more than 0"),
        ({"memory_gb": 1}, r"--gpu-memory-gb: 1 found; accepted: more than 1\.1, which CUDA and its libraries take"),
        ({"memory_gb": 8, "mfu": 40}, r"--mfu: 40 found; accepted: more than 0, at most 1"),
        ({"memory_gb": 8, "tflops": -1}, r"--gpu-tflops: -1 found"),
        ({"memory_gb": 8, "ranks": 3}, r"batch\.rows: 4 rows cannot be shared by 3 processes"),
    ],
)
def test_what_cannot_be_is_refused(planned, asked, message):
    with pytest.raises(BadInput, match=message):
        planned(**{"ranks": 1, **asked})
