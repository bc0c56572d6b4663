"""The memory plan against sizes worked by hand, against a measured peak, and its advice."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from launch import config_file
from trainer import build, loop
from trainer.plan import Plan, advice

KIB = 1024

# In a process of its own: the peak of resident memory over two steps, above what was there when all was built.
MEASURE = """
import gc, json, sys
from pathlib import Path
from launch import config_file
from trainer import build, distributed, loop
from trainer.config import RunConfig
import torch

def resident(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
config = config_file.load(Path(sys.argv[1]), sys.argv[2:], RunConfig)
parts = build.build(config)
plan = loop.check_memory(config, parts, world_size=1)
gc.collect()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
loop.rehearse(parts)
for step in range(2):
    for batch in parts.feed.micro_batches(step):
        with parts.world.accelerator.autocast():
            loss = parts.objective.sums(parts.model, batch)["loss"]
        parts.world.accelerator.backward(loss)
    distributed.finish_step(
        parts.world, parts.model, parts.optimizer, learning_rate=1e-4, max_norm=1.0, where="", step=step
    )
print(json.dumps([plan.total_bytes - plan.weights_bytes, plan.certain_bytes - plan.weights_bytes,
                  resident("VmHWM") - before]))
"""


@pytest.fixture
def plan_of(make_config):
    """Return a function that builds a config and returns its plan and config."""

    def of(*args, **changes) -> tuple[Plan, object]:
        config = make_config(*args, **changes)
        return loop.check_memory(config, build.build(config), world_size=1), config

    return of


def test_weights_gradients_and_moments_are_those_of_the_model(plan_of):
    plan, _ = plan_of()
    # Embedding 300 * 32 (tied); two layers of q and o 32 * 32, k and v 32 * 16, three of 32 * 64, two norms; a norm.
    weights = 300 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert plan.weights_bytes == 4 * weights + plan_buffers(head_size=8)
    assert plan.gradients_bytes == 4 * weights
    assert plan.optimizer_bytes == 8 * weights


def plan_buffers(head_size: int) -> int:
    """Two copies of the rotary frequencies, which transformers keeps as buffers."""
    return 2 * 4 * head_size // 2


def test_with_lora_only_the_adapter_has_gradients(plan_of):
    full, _ = plan_of("sft", "full")
    lora, _ = plan_of("sft", "lora")
    # Rank 8 on all linears of two layers: q and o 8 * (32 + 32), k and v 8 * (32 + 16), three of 8 * (32 + 64).
    learning = 2 * (2 * 8 * 64 + 2 * 8 * 48 + 3 * 8 * 96)
    assert lora.gradients_bytes == 4 * learning
    assert lora.weights_bytes == full.weights_bytes + 4 * learning


def test_batch_and_logits_are_the_tensors_that_a_pass_makes(make_config, plan_of):
    plan, config = plan_of(batch={"rows": 4, "micro_rows": 2, "max_length": 24})
    parts = build.build(config)
    longest = parts.feed.longest()
    assert plan.batch_bytes == sum(tensor.nbytes for tensor in longest.values())
    assert plan.logits_bytes == 3 * 4 * longest["input_ids"].numel() * 300


def test_what_autograd_keeps_is_foretold_for_a_longer_batch(make_config, plan_of):
    """The hooks that the plan counts with, on the whole batch instead of two short rows."""
    plan, config = plan_of(batch={"rows": 4, "max_length": 60})
    parts = build.build(config)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*parts.model.parameters(), *parts.model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = parts.feed.longest()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = parts.objective.sums(parts.model, batch)["loss"]
    found = sum(size for pointer, size in kept.items() if pointer not in own) - batch["input_ids"].numel() * 300 * 4
    assert loss.isfinite()
    assert plan.activations_bytes == pytest.approx(found, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (["batch.rows=16"], 1.1),
        (["batch.rows=8", "batch.micro_rows=4", "batch.max_length=512"], 1.1),
        (["batch.rows=16", "precision.type=bf16"], 1.25),
        (["batch.rows=16", "model.num_layers=1", "tokenizer.vocab_size=8192"], 1.1),
    ],
    ids=["fp32", "micro", "bf16", "vocabulary"],
)
def test_the_measured_peak_is_near_the_plan_where_malloc_gives_everything_back(tmp_path, settings, most):
    (tmp_path / "c.yaml").write_text("""
run: {name: m, steps: 2}
objective: {type: causal_lm}
model: {type: new, hidden_size: 256, intermediate_size: 688, num_layers: 2, num_heads: 4, num_kv_heads: 2,
        context_length: 1024}
tokenizer: {type: train, vocab_size: 2048}
data: {type: embedded, max_rows: 400}
strategy: {type: scratch}
log: {tensorboard: false}
""")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "c.yaml"), *settings],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, certain, measured = json.loads(done.stdout.splitlines()[-1])
    assert certain <= measured
    assert 0.9 * total <= measured <= most * total


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (8_000, "batch.micro_rows=4 (the result stays the same)"),
        (2_100, "batch.micro_rows=1 (the result stays the same)"),
        (1_600, "batch.micro_rows=1 batch.max_length=56"),
        (400, "batch.micro_rows=1 strategy.type=lora, or a smaller model"),
    ],
)
def test_the_advice_takes_the_least_harmful_setting_that_fits(make_config, limit, expected):
    """By hand: 400 KiB of weights, gradients and moments, and 20 KiB for each token of a pass of 64 to a row."""
    plan = Plan(100 * KIB, 100 * KIB, 200 * KIB, 0, 20.0 * KIB, 0.0, 0.0, 0.0, 0, rows=8, micro_rows=8, length=64)
    assert plan.total_bytes == (400 + 8 * 64 * 20) * KIB
    assert advice(plan, make_config("sft", "full"), limit * KIB) == expected
    chosen = replace(plan, micro_rows=4)
    assert chosen.total_bytes == (400 + 4 * 64 * 20) * KIB


def test_a_model_that_alone_is_too_large_is_to_be_smaller(make_config):
    plan = Plan(100 * KIB, 100 * KIB, 200 * KIB, 0, 20.0 * KIB, 0.0, 0.0, 0.0, 0, rows=1, micro_rows=1, length=64)
    assert advice(plan, make_config(), 10) == (
        "a smaller model (model.hidden_size, model.num_layers, tokenizer.vocab_size)"
    )


def test_a_model_that_is_too_large_for_one_row_too_is_said_in_whole_words(make_config):
    plan = Plan(100 * KIB, 100 * KIB, 200 * KIB, 0, 20.0 * KIB, 0.0, 0.0, 0.0, 0, rows=8, micro_rows=8, length=64)
    assert advice(plan, make_config("sft", "lora"), 10) == "batch.micro_rows=1 and a smaller model"


def test_tensors_of_a_batch_that_are_too_large_are_cut_into_micro_batches(make_config):
    """By hand: 400 KiB, and 50 KiB for each row of a pass; the rows of a step that wait for their pass need nothing."""
    plan = Plan(100 * KIB, 100 * KIB, 200 * KIB, 0, 0.0, 0.0, 0.5 * KIB, 0.0, 0, rows=64, micro_rows=64, length=100)
    assert plan.total_bytes == (400 + 64 * 50) * KIB
    assert advice(plan, make_config("sft", "full"), 800 * KIB) == "batch.micro_rows=8 (the result stays the same)"


def test_the_plan_changes_nothing_that_is_trained(make_config, train, monkeypatch, read_lines):
    first = make_config(run={"name": "planned"})
    assert train(first) == 0
    monkeypatch.setattr(loop, "check_memory", lambda *args, **kwargs: None)
    second = make_config(run={"name": "unplanned"})
    assert train(second) == 0
    assert read_lines(first) == read_lines(second)
    assert config_file.differences(first, second).keys() == {"run.name"}
