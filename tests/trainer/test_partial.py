"""Named weights learn, some of them later; and a run that was killed goes on across a stage bit for bit."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from serving.directory import BadInput
from trainer.config import AdamW, Partial
from trainer.optim import build_optimizer
from trainer.strategies import STRATEGIES, tell_learning, tell_tied, unfreeze

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def partial(model: torch.nn.Module, *train: str, stages=()) -> torch.nn.Module:
    stages = [{"step": step, "train": names} for step, names in stages]
    return STRATEGIES["partial"](model, Partial(type="partial", train=list(train), stages=stages))


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.norm"], {"model.norm.weight"}),
        (["model.norm.weight"], {"model.norm.weight"}),
        (["*.input_layernorm"], {f"model.layers.{block}.input_layernorm.weight" for block in (0, 1)}),
        (["model.layers.1.self_attn"], {f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkvo"}),
        (["model.layers.?.mlp.up_proj", "model.norm"], {"model.norm.weight", "model.layers.0.mlp.up_proj.weight",
                                                        "model.layers.1.mlp.up_proj.weight"}),
        (["lm_head"], {"lm_head.weight", "model.embed_tokens.weight"}),  # one weight, two names
    ],
)  # fmt: skip
def test_a_pattern_is_of_a_weight_or_of_a_module_around_weights(tiny_model, patterns, expected):
    assert learning(partial(tiny_model("Llama", "CausalLM"), *patterns)) == expected


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["lm_head"], ["model.embed_tokens.weight learns too: this model's lm_head.weight is the same weight"]),
        (["model.embed_tokens"], ["lm_head.weight learns too: this model's model.embed_tokens.weight is the same"]),
        (["lm_head", "model.embed_tokens"], []),
        (["model.norm"], []),
    ],
)
def test_a_weight_that_learns_because_it_is_tied_to_a_named_one_is_told(tiny_model, patterns, told):
    model = partial(tiny_model("Llama", "CausalLM"), *patterns)
    said = tell_tied(model, Partial(type="partial", train=patterns))
    assert len(said) == len(told)
    assert all(expected in line for expected, line in zip(told, said, strict=True))


def test_a_classifiers_head_always_learns(tiny_model):
    model = partial(tiny_model("DistilBert", "SequenceClassification"), "distilbert.transformer.layer.1.ffn.lin2.bias")
    heads = {f"{head}.{kind}" for head in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    assert learning(model) == heads | {"distilbert.transformer.layer.1.ffn.lin2.bias"}


def test_weights_join_at_the_start_of_their_step_and_stay(tiny_model):
    model = partial(tiny_model("Llama", "CausalLM"), "model.norm", stages=[(2, ["*.1.mlp"]), (5, ["*.1.*"])])
    mlp = {f"model.layers.1.mlp.{which}_proj.weight" for which in ("gate", "up", "down")}
    block = {name for name, _ in model.named_parameters() if ".layers.1." in name}
    assert learning(model) == {"model.norm.weight"} | block  # so that the optimizer is built over all of them
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    expected = {0: set(), 1: set(), 2: mlp, 3: mlp, 4: mlp, 5: block, 6: block}
    told = []
    for step, joined in expected.items():
        told.append(unfreeze(model, step))
        assert learning(model) == {"model.norm.weight"} | joined
    in_mlp, in_block = (sum(sizes[name] for name in names) for names in (mlp, block))
    assert told == [0, 0, in_mlp, 0, 0, in_block - in_mlp, 0]
    assert unfreeze(model, 3) == 0  # a run that goes on from there
    assert learning(model) == {"model.norm.weight"} | mlp


def test_a_run_is_told_when_how_many_weights_join(tiny_model):
    model = partial(tiny_model("Llama", "CausalLM"), "model.norm", stages=[(2, ["model.layers.0.input_layernorm"])])
    total = sum(p.numel() for p in model.parameters())
    assert tell_learning(model) == f"32 of {total:,} weights learn, 16 of them from step 2"


def test_the_optimizer_takes_a_weight_that_joins_as_new():
    """By hand: AdamW's first step moves a weight by lr, whatever its gradient; its moments start at that step."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    partial(model, stages=[(3, ["0"])])
    optimizer = build_optimizer(model, AdamW(weight_decay=0.0), fused=False)
    early, late = model[1].weight, model[0].weight
    before = late.item()
    for step in range(5):
        unfreeze(model, step)
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.25
        optimizer.step()
        assert (late in optimizer.state) == (step >= 3)
        if step == 3:
            assert late.item() == pytest.approx(before - 0.25 * (1 if early.item() + 0.25 > 0 else -1), abs=1e-6) or (
                abs(late.item() - before) == pytest.approx(0.25, abs=1e-6)
            )
    assert (int(optimizer.state[early]["step"]), int(optimizer.state[late]["step"])) == (5, 2)


# --- in a run --------------------------------------------------------------------------------------------------------


STAGED = {
    "train": ["model.norm", "model.layers.1.mlp"],
    "stages": [{"step": 3, "train": ["model.layers.1"]}, {"step": 6, "train": ["model.embed_tokens"]}],
}


def weights(config) -> bytes:
    return (config.run.folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("objective", "every", "killed_at"),
    [("sft", 3, 4), ("sft", 2, 3), ("classification", 2, 5)],
    ids=["from the step of a stage", "from before it", "from within it"],
)
def test_killed_and_resumed_across_a_stage_the_run_is_the_same_bit_for_bit(
    make_config, train, train_child, read_lines, capfd, objective, every, killed_at
):
    settings = {"checkpoint": {"every": every}, "strategy": STAGED}
    whole = make_config(objective, "partial", run={"name": "whole", "steps": 8}, **settings)
    assert train(whole) == 0
    said = capfd.readouterr().err
    assert "of them from step 3" in said
    assert "step 6: 9,600 more weights learn from here on" in said  # 300 * 32 of the embedding
    killed = make_config(objective, "partial", run={"name": "killed", "steps": 8}, **settings)
    code, output = train_child(killed, step=killed_at, act=KILL)
    assert code == -signal.SIGKILL, output
    assert train(killed) == 0
    assert "going on from" in capfd.readouterr().err
    assert read_lines(killed) == read_lines(whole)
    assert weights(killed) == weights(whole)


def test_a_checkpoint_counts_the_steps_of_each_weight(make_config, parts_of):
    config = make_config(
        "sft", "partial", run={"steps": 5}, checkpoint={"every": 5}, strategy=STAGED | {"stages": STAGED["stages"][:1]}
    )
    parts_of(config)
    manifest = json.loads((config.run.folder / "checkpoints" / "step-00000005" / "trivet.json").read_text())
    steps = manifest["optimizer_steps"]
    assert steps["model.norm.weight"] == steps["model.layers.1.mlp.up_proj.weight"] == 5
    assert steps["model.layers.1.self_attn.q_proj.weight"] == 2
    assert not [name for name in steps if "layers.0" in name]


def test_before_its_stage_no_weight_of_a_run_moves(make_config, parts_of, base_model):
    seen = {}

    def watch(parts: SimpleNamespace) -> None:
        start = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        step = parts.optimizer.optimizer.step

        def look(*args, **kwargs):
            done = step(*args, **kwargs)
            moved = {name for name, p in parts.model.named_parameters() if not torch.equal(p, start[name])}
            seen[len(seen)] = moved
            return done

        parts.optimizer.optimizer.step = look

    parts_of(make_config("sft", "partial", run={"steps": 8}, strategy=STAGED), before=watch)
    assert all(name.startswith(("model.norm", "model.layers.1.mlp")) for name in seen[2])
    assert any("layers.1.self_attn" in name for name in seen[3])
    assert all(name.startswith(("model.norm", "model.layers.1")) for name in seen[5])
    assert "model.embed_tokens.weight" in seen[6]
    assert not [name for name in seen[7] if "layers.0" in name]


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "stages", "said"),
    [
        (["model.layer.1"], (), r"strategy\.train: 'model\.layer\.1' fits no weight; near to it: model\.layers\.1, "),
        (["*.norm", "nothing*"], (), r"strategy\.train: 'nothing\*' fits no weight; near to it: "),
        (["*norm*"], [(2, ["model.nrm"])], r"strategy\.stages\.0\.train: 'model\.nrm' fits no weight; near"),
        (["*norm*"], [(2, ["*.1.*"]), (3, ["model.norm", "model.layers.1"])],
         r"strategy\.stages\.1\.train: .* all of that learns already by then: leave the stage out"),
        ([], [(2, ["*norm*"])], r"strategy\.train: is empty, and this model has no new head: nothing learns"),
    ],
)  # fmt: skip
def test_a_pattern_that_unfreezes_nothing_is_refused(tiny_model, train, stages, said):
    with pytest.raises(BadInput, match=f"^{said}"):
        partial(tiny_model("Llama", "CausalLM"), *train, stages=stages)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "train and stages are both empty: name weights, or use strategy.type linear_probe"),
        ({"stages": [{"step": 3, "train": ["a"]}, {"step": 3, "train": ["b"]}]}, "their steps [3, 3] do not increase"),
        ({"stages": [{"step": 3, "train": ["a"]}, {"step": 2, "train": ["b"]}]}, "their steps [3, 2] do not increase"),
        ({"stages": [{"step": 0, "train": ["a"]}]}, "greater than or equal to 1"),
        ({"stages": [{"step": 2, "train": []}]}, "at least 1 item"),
        (
            {"train": ["a"], "stages": [{"step": 6, "train": ["a"]}]},
            "stages: step 6 is not before run.steps, 6; lower it",
        ),
        ({"train": ["a"], "stages": [{"step": 2, "weights": ["a"]}]}, "weights"),
    ],
)
def test_stages_that_cannot_be_are_refused(make_config, settings, said):
    with pytest.raises(ValidationError) as caught:
        make_config("sft", "partial", strategy=settings)
    assert said in str(caught.value)
