"""Activations computed again, and compiled code: the same numbers in another way."""

import json
import signal

import pytest
import torch
from transformers import LlamaForCausalLM

from serving.directory import BadInput
from trainer import build, compute, loop
from trainer.config import Batch
from trainer.flops import flops_per_token

AGAIN = {"activation_checkpointing": True}


def gradients_and_kept(config) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of the first micro-batch, its loss among them, and the bytes that autograd kept for them."""
    parts = build.build(config)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = parts.objective.sums(parts.model, next(parts.feed.micro_batches(0)))["loss"]
        torch.rand(7)  # what is drawn between, and in the backward pass of others, moves no dropout
    loss.backward()
    found = {name: weight.grad for name, weight in parts.model.named_parameters() if weight.grad is not None}
    return {**found, "loss": loss.detach()}, sum(kept.values())


@pytest.mark.parametrize(
    ("objective", "strategy", "changes"),
    [
        ("causal_lm", "scratch", {}),
        ("classification", "full", {}),
        ("sft", "lora", {"strategy": {"dropout": 0.4}}),  # drawn again alike
        ("sft", "lora", {"strategy": {"dropout": 0.4}, "precision": {"type": "bf16"}}),
    ],
    ids=["scratch", "classification", "dropout", "bf16"],
)
def test_activations_that_are_computed_again_give_the_same_loss_and_gradients(
    make_config, objective, strategy, changes
):
    batch = {"rows": 4, "max_length": 48}
    plain, plain_bytes = gradients_and_kept(make_config(objective, strategy, batch=batch, **changes))
    again, again_bytes = gradients_and_kept(make_config(objective, strategy, batch=batch | AGAIN, **changes))
    assert plain.keys() == again.keys()
    assert len(plain) > 4
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert again_bytes < 0.7 * plain_bytes


def test_a_run_that_computes_activations_again_is_the_same_run(make_config, train, read_lines):
    configs = [make_config(run={"name": name}, batch=batch) for name, batch in (("kept", {}), ("again", AGAIN))]
    for config in configs:
        assert train(config) == 0
    assert read_lines(configs[0]) == read_lines(configs[1])


def test_dropout_in_a_block_that_is_computed_again_draws_the_same(make_config, base_model, tmp_path):
    """The dropout of attention, in the model itself."""
    model = LlamaForCausalLM.from_pretrained(base_model)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "dropping")
    changes = {
        "model": {"path": str(tmp_path / "dropping")}, "tokenizer": {"type": "pretrained", "path": base_model},
    }  # fmt: skip
    plain, _ = gradients_and_kept(make_config("causal_lm", "full", **changes))
    again, _ = gradients_and_kept(make_config("causal_lm", "full", batch=AGAIN, **changes))
    without, _ = gradients_and_kept(make_config("causal_lm", "full"))
    assert plain["loss"] != without["loss"], "nothing was dropped"
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_model_that_cannot_compute_activations_again_is_refused():
    with pytest.raises(BadInput, match=r"batch\.activation_checkpointing: true found, but Linear cannot; leave it out"):
        compute.set_up(torch.nn.Linear(2, 2), Batch(activation_checkpointing=True))


def test_compiling_without_a_compiler_is_refused_before_anything_runs(make_config, train, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config(batch={"compile": True})
    with pytest.raises(BadInput, match=r"batch\.compile: true found, but no C\+\+ compiler \(no-such-compiler\)"):
        train(config)
    assert not config.run.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, AGAIN], ids=["kept", "computed again"])
def test_a_compiled_run_takes_the_same_steps(make_config, train_child, train, read_lines, changes):
    settings = {"evaluation": {"every": 3, "max_rows": 4, "samples": 1}, "checkpoint": {"every": 4}}
    plain = make_config(run={"name": "plain"}, batch=changes, **settings)
    compiled = make_config(run={"name": "compiled"}, batch={"compile": True, **changes}, **settings)
    assert train(plain) == 0
    code, output = train_child(compiled, timeout_s=600)  # making code takes a minute on a quiet machine
    assert code == 0, output
    losses = [[line["loss"] for line in read_lines(each) if line["kind"] == "train"] for each in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # Names stay, so a checkpoint and a model of either is one of the other's.
    names = [
        json.loads((each.run.folder / "checkpoints/step-00000004/trivet.json").read_text())["tensors"].keys()
        for each in (plain, compiled)
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_goes_on_bit_for_bit(make_config, train_child, read_lines):
    settings = {"evaluation": {"every": 3, "max_rows": 4}, "checkpoint": {"every": 3}, "batch": {"compile": True}}
    whole, killed = (make_config(run={"name": name}, **settings) for name in ("whole", "killed"))
    code, output = train_child(whole, timeout_s=600)
    assert code == 0, output
    code, output = train_child(killed, step=5, act="os.kill(os.getpid(), signal.SIGKILL)", timeout_s=600)
    assert code == -signal.SIGKILL, output
    code, output = train_child(killed, timeout_s=600)
    assert code == 0, output
    assert "step-00000003" in output
    assert read_lines(killed) == read_lines(whole)


def test_a_compiled_model_runs_compiled_code_in_steps_and_none_in_the_plan(make_config, monkeypatch):
    calls = []
    compile_for_real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: compile_for_real(self, backend=lambda graph, inputs: calls.append(1) or graph.forward),
    )
    config = make_config(batch={"compile": True}, run={"steps": 1})
    parts = build.build(config)
    assert loop.check_memory(config, parts, mode="single", world_size=1).total_bytes
    loop.count_flops(parts)
    assert not calls
    loop.rehearse(parts)
    assert calls


def test_the_arithmetic_of_a_token_is_six_times_its_weights_and_attention(make_config):
    """By hand: 6 for each weight of a matrix that multiplies, and of attention over T tokens, in blocks that see
    themselves whole, 2 products of 2 * T * width forward and twice that back, in each layer."""
    config = make_config(model={"tie_embeddings": False}, batch={"max_length": 24})
    parts = build.build(config)
    row = parts.feed.longest(1)
    length = row["input_ids"].shape[1]
    found = flops_per_token(parts.model, parts.objective, row, parts.world.autocast)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 300
    attention = 2 * 3 * (2 * 2 * length * 32)
    assert found == pytest.approx(6 * weights + attention, rel=0.02)
    assert all(weight.grad is None for weight in parts.model.parameters())


def test_frozen_weights_cost_no_gradients_of_theirs(make_config):
    full, head = (loop.count_flops(build.build(make_config("sft", strategy))) for strategy in ("full", "linear_probe"))
    assert head < full / 2, "nothing goes back through the body"


def test_what_is_computed_again_counts_once(make_config):
    once, again = (loop.count_flops(build.build(make_config(batch=batch))) for batch in ({}, AGAIN))
    assert once == again
