"""The memory plan against sizes worked by hand, against a measured peak, and its advice."""

import json
import math
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
        with parts.world.autocast():
            loss = parts.objective.sums(parts.model, batch)["loss"]
        parts.world.accelerator.backward(loss)
    distributed.finish_step(parts.world, parts.model, parts.optimizer, learning_rate=1e-4, max_norm=1.0)
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
    # Where the last example ends is one number for each row here, and one more.
    assert plan.batch_bytes == pytest.approx(sum(tensor.nbytes for tensor in longest.values()), abs=8)
    # All logits fit into the part that is held at once; and the gradient of the tied head, 300 * 32.
    assert plan.logits_bytes == 4 * longest["input_ids"].numel() * 300 + 4 * 300 * 32


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        ({"type": "sgd"}, lambda weights: sum(math.prod(shape) for shape in weights)),
        ({"type": "sgd", "momentum": 0}, lambda weights: 0),
        (
            {"type": "adafactor"},
            lambda weights: sum(sum(shape) if len(shape) > 1 else shape[0] for shape in weights),
        ),
    ],
    ids=["sgd", "no momentum", "adafactor"],
)
def test_what_the_optimizer_keeps_is_its_own(make_config, plan_of, optimizer, numbers):
    """A number for each weight, none, or one for each row and column of a matrix."""
    plan, config = plan_of(optim=optimizer)
    shapes = [tuple(parameter.shape) for parameter in build.build(config).model.parameters()]
    assert plan.optimizer_bytes == 4 * numbers(shapes)


def test_activations_that_are_computed_again_are_those_of_one_block_and_what_enters_each(plan_of):
    """By hand, of 4 blocks in fp32: what enters a block is 32 numbers a token."""
    sizes = {"num_layers": 4, "tie_embeddings": False}
    whole, again = (
        plan_of(model=sizes, batch={"max_length": 32, "activation_checkpointing": flag})[0] for flag in (False, True)
    )
    assert again.certain_bytes == whole.certain_bytes
    blocks = whole.activation_token_bytes - again.activation_token_bytes  # of three blocks, but for what enters each
    kept = again.activation_token_bytes - blocks / 3
    assert again.activation_token_bytes < 0.45 * whole.activation_token_bytes
    assert 4 * (4 * 32) <= kept < 4 * (4 * 32) * 2.5, "the four inputs, and what lies outside the blocks"


def test_what_autograd_keeps_is_foretold_for_a_longer_batch(plan_of, write_rows, tmp_path):
    """The hooks that the plan counts with, on the whole batch instead of two short rows; each row is one example."""
    path = str(write_rows(tmp_path / "long.jsonl", [{"text": "the quick brown fox " * 40}] * 16))
    data = {"type": "files", "train": path, "validation": path}

    def foretold_and_found(again: bool) -> tuple[int, int]:
        plan, config = plan_of(data=data, batch={"rows": 4, "max_length": 60, "activation_checkpointing": again})
        parts = build.build(config)
        own = {tensor.untyped_storage().data_ptr() for tensor in [*parts.model.parameters(), *parts.model.buffers()]}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = parts.objective.sums(parts.model, parts.feed.longest())["loss"]
        assert loss.isfinite()
        return plan.activations_bytes, sum(size for pointer, size in kept.items() if pointer not in own)

    (whole, whole_found), (again, again_found) = foretold_and_found(False), foretold_and_found(True)
    assert whole == pytest.approx(whole_found, rel=0.03)
    # One of the two blocks is computed again at a time.
    assert again == pytest.approx(again_found + (whole_found - again_found) / 2, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (["batch.rows=16"], 1.2),
        (["batch.rows=8", "batch.micro_rows=4", "batch.max_length=512"], 1.2),
        (["batch.rows=16", "precision.type=bf16"], 1.8),
        (["batch.rows=16", "model.num_layers=1", "tokenizer.vocab_size=8192"], 1.25),
        (["batch.rows=16", "model.num_layers=6", "batch.activation_checkpointing=true"], 1.25),
        (["batch.rows=4", "model.hidden_size=512", "optim.type=adafactor"], 1.25),
    ],
    ids=["fp32", "micro", "bf16", "vocabulary", "computed again", "adafactor"],
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
    assert 0.8 * total <= measured <= most * total


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
