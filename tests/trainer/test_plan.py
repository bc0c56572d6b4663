"""The memory plan against sizes worked by hand, against a measured peak, and its advice."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from launch import config_file
from trainer import build, loop
from trainer.plan.advice import advice
from trainer.plan.plan import Plan

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
plan = loop.check_memory(config, parts, mode="single", world_size=1)
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
        return loop.check_memory(config, build.build(config), mode="single", world_size=1), config

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
    # All logits fit into the part that is held at once.
    assert plan.logits_bytes == 4 * longest["input_ids"].numel() * 300


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


@pytest.mark.parametrize(
    ("objective", "strategy", "changes"),
    [
        ("causal_lm", "scratch", {}),
        ("causal_lm", "scratch", {"batch": {"max_length": 60, "activation_checkpointing": True}}),
        ("causal_lm", "scratch", {"batch": {"max_length": 60}, "precision": {"type": "bf16"}}),
        ("sft", "lora", {"batch": {"max_length": 100}}),
        ("classification", "linear_probe", {}),
    ],
    ids=["scratch", "computed again", "bf16", "lora", "linear probe"],
)
def test_a_pass_takes_what_torch_says_that_it_allocated(make_config, tmp_path, objective, strategy, changes):
    """Against the totals in the trace of torch's profiler, over a real pass forward and back."""
    config = make_config(objective, strategy, **changes)
    parts = build.build(config)
    plan = loop.check_memory(config, parts, mode="single", world_size=1)
    batch = parts.feed.longest()

    def one_pass():
        with parts.world.autocast():
            loss = parts.objective.sums(parts.model, batch)["loss"]
        loss.backward()

    one_pass()  # what torch keeps from then on is not the pass's
    parts.model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [event["args"] for event in events if event["name"] == "[memory]"]
    before = totals[0]["Total Allocated"] - totals[0]["Bytes"]
    found = max(args["Total Allocated"] for args in totals) - before
    # In bf16 oneDNN copies what it multiplies.
    rel = 0.08 if config.precision.type == "bf16" else 0.03
    assert plan.most_by_phase["rehearsal"] - plan.weights_bytes == pytest.approx(found, rel=rel)


def test_activations_that_are_computed_again_are_mostly_those_of_one_block(plan_of):
    """By hand, of 4 blocks in fp32: what enters a block is 32 numbers a token, and stays; the rest is of one block."""
    sizes = {"num_layers": 4, "tie_embeddings": False}
    whole, again = (
        plan_of(model=sizes, batch={"max_length": 32, "activation_checkpointing": flag})[0] for flag in (False, True)
    )
    assert again.certain_bytes == whole.certain_bytes
    tokens = 4 * 32
    one_block = (whole.activations_bytes - again.activations_bytes) / 3
    assert 4 * (4 * 32) * tokens <= again.activations_bytes - one_block < 0.3 * whole.activations_bytes


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


def plan_by_hand(*, rows: int, length: int, pass_bytes) -> Plan:
    """400 KiB of weights, gradients and moments, and what a pass of these rows needs."""
    terms = {"weights": 100 * KIB, "gradients": 100 * KIB, "optimizer": 200 * KIB, "activations": 0, "logits": 0}
    phases = {"build": 100 * KIB, "step": 400 * KIB + pass_bytes(rows, length)}
    return Plan("single", 1, rows, rows, length, 0, terms, phases, pass_bytes)


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
    plan = plan_by_hand(rows=8, length=64, pass_bytes=lambda rows, length: 20 * KIB * rows * length)
    assert plan.total_bytes == (400 + 8 * 64 * 20) * KIB
    assert advice(plan, make_config("sft", "full"), limit * KIB) == expected
    assert plan.total_of(micro_rows=4, length=64) == (400 + 4 * 64 * 20) * KIB


def test_a_model_that_alone_is_too_large_is_to_be_smaller(make_config):
    plan = plan_by_hand(rows=1, length=64, pass_bytes=lambda rows, length: 20 * KIB * rows * length)
    assert advice(plan, make_config(), 10) == (
        "a smaller model (model.hidden_size, model.num_layers, tokenizer.vocab_size)"
    )


def test_a_model_that_is_too_large_for_one_row_too_is_said_in_whole_words(make_config):
    plan = plan_by_hand(rows=8, length=64, pass_bytes=lambda rows, length: 20 * KIB * rows * length)
    assert advice(plan, make_config("sft", "lora"), 10) == "batch.micro_rows=1 and a smaller model"


def test_fewer_rows_are_no_help_where_a_checkpoint_needs_the_most(make_config):
    plan = plan_by_hand(rows=8, length=64, pass_bytes=lambda rows, length: KIB * rows)
    plan.most_by_phase["checkpoint"] = 900 * KIB
    assert plan.total_of(micro_rows=1, length=8) == plan.total_bytes == 900 * KIB
    assert advice(plan, make_config("sft", "lora"), 800 * KIB) == "batch.micro_rows=1 and a smaller model"


def test_rows_that_are_not_run_are_extrapolated_from_those_that_are(plan_of, monkeypatch):
    """By hand: a pass of 24 equal rows needs twice as much beyond one of 8 as one of 16 does."""
    monkeypatch.setattr("trainer.plan.recordings._MOST_TOKENS", 16 * 8)
    plan, _ = plan_of(batch={"rows": 24, "max_length": 8})
    eight, sixteen = plan.pass_bytes(8, 8), plan.pass_bytes(16, 8)
    assert 0 < eight < sixteen
    assert plan.pass_bytes(24, 8) - eight == 2 * (sixteen - eight)
    assert plan.beyond_bytes == sixteen - eight
    monkeypatch.setattr("trainer.plan.recordings._MOST_TOKENS", 24 * 8)
    whole, _ = plan_of(batch={"rows": 24, "max_length": 8})
    assert whole.beyond_bytes == 0
    assert plan.total_bytes == pytest.approx(whole.total_bytes, rel=0.03)


def test_the_plan_changes_nothing_that_is_trained(make_config, train, monkeypatch, read_lines):
    first = make_config(run={"name": "planned"})
    assert train(first) == 0
    monkeypatch.setattr(loop, "check_memory", lambda *args, **kwargs: None)
    second = make_config(run={"name": "unplanned"})
    assert train(second) == 0
    assert read_lines(first) == read_lines(second)
    assert config_file.differences(first, second).keys() == {"run.name"}
