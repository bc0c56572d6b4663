"""Every objective with every strategy, packed or not: a run that is killed within an epoch and goes on from its
checkpoint is the uninterrupted one bit for bit. Each pair of an objective and a strategy is in the fast set."""

import json
import shutil
import signal
from pathlib import Path
from random import Random

import pytest

from launch import config_file, verify_training
from launch.verify_runs import Runs
from trainer import exactness, token_model
from trainer.config import RunConfig
from trainer.metrics import RunLog
from trainer.watch import watch

OBJECTIVES = {
    "causal_lm": {"type": "causal_lm"},
    "sft": {"type": "sft"},
    "masked_lm": {"type": "masked_lm", "mask_probability": 0.3},
    "classification": {"type": "classification"},
    "multi_label": {"type": "classification", "problem": "multi_label"},
    "regression": {"type": "classification", "problem": "regression"},
    "pairs": {"type": "classification", "class_weights": "balanced"},
    "token_classification": {"type": "token_classification"},
}
STRATEGIES = {
    "scratch": {"type": "scratch"},
    "full": {"type": "full"},
    "linear_probe": {"type": "linear_probe"},
    "partial": {"type": "partial", "train": ["*layer*.1.*"], "stages": [{"step": 2, "train": ["*layer*.0.*"]}]},
    "adapter": {"type": "adapter", "size": 4},
    "lora": {"type": "lora", "rank": 2, "dropout": 0.2},
    "dora": {"type": "lora", "rank": 2, "dora": True},
}
PACKING = ("causal_lm", "sft", "masked_lm", "token_classification")
FEW, MORE = (*PACKING, "classification"), ("multi_label", "regression", "pairs")
DECODERS = ("causal_lm", "sft")
STEPS, SAVED_AFTER = 4, 1

ALL = [
    (objective, strategy, packed)
    for objective in OBJECTIVES
    for strategy in STRATEGIES
    for packed in ((True, False) if objective in PACKING else (False,))
]
# Each of the five objectives with each strategy; of those that pack, every other one padded.
FAST = [
    (objective, strategy, objective in PACKING and (row + column) % 2 == 0)
    for row, objective in enumerate(FEW)
    for column, strategy in enumerate(STRATEGIES)
]


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing of the run catches it."""


def names(case) -> str:
    objective, strategy, packed = case
    return f"{objective}-{strategy}" + "-packed" * packed


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """A file for each objective with 30 rows of very different lengths."""
    folder, random = tmp_path_factory.mktemp("rows"), Random(0)
    words = ["the", "quick", "brown", "fox", "returns", "a", "list", "of", "lines", "in", "every", "file"]

    def text(most: int) -> list[str]:
        return random.choices(words, k=random.randint(1, most))

    def row(objective: str) -> dict:
        kind, number = random.choice(["noun", "verb", "other"]), random.random()
        if objective == "sft":
            turns = [("user", " ".join(text(5))), ("assistant", " ".join(text(8)))] * random.randint(1, 2)
            return {"messages": [{"role": who, "content": said} for who, said in turns]}
        tokens = text(12)
        several = random.sample(["a", "b", "c"], random.randint(0, 2))
        label = {"multi_label": several, "regression": number}.get(objective, kind)
        tags = [random.choice(["O", "B-X", "I-X"]) for _ in tokens]
        return {"text": " ".join(tokens), "pair": " ".join(text(4)), "label": label, "tokens": tokens, "tags": tags}

    for objective in OBJECTIVES:
        (folder / objective).write_text("".join(json.dumps(row(objective)) + "\n" for _ in range(30)))
    return {objective: (folder / objective).rename(folder / f"{objective}.jsonl") for objective in OBJECTIVES}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, wordpiece) -> str:
    """A folder with a random BERT (16 wide, 2 layers, with dropout) and its tokenizer, written by transformers."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(wordpiece), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=wordpiece.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder") / "model"
    BertForMaskedLM(config).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config_of(tmp_path, rows, base_model, encoder, monkeypatch):
    """Return a function that makes the config of a tiny run of an objective and a strategy."""

    def make(objective: str, strategy: str, packed: bool, name: str = "run", **batch) -> RunConfig:
        if not packed:
            # As where the model cannot keep packed documents apart.
            monkeypatch.setattr(token_model, "_first_position", lambda *_: None)
        architecture = "decoder" if objective in DECODERS else "encoder"
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 64}
        new = {"type": "new", "architecture": architecture, **sizes}
        base = {"type": "pretrained", "path": base_model if objective in DECODERS else encoder}
        data = {"type": "files", "train": str(rows[objective]), "validation": str(rows[objective])}
        return RunConfig.model_validate({
            "run": {"name": name, "dir": str(tmp_path), "steps": STEPS},
            "objective": OBJECTIVES[objective],
            "model": new if strategy == "scratch" else base,
            "tokenizer": {"type": "train", "vocab_size": 300} if strategy == "scratch" else {"type": "pretrained"},
            "data": data | ({"text_pair": "pair"} if objective == "pairs" else {}),
            "strategy": STRATEGIES[strategy],
            "optim": {"lr": 1e-2},
            "batch": {"rows": 4, "micro_rows": 2, "max_length": 40, **batch},
            "evaluation": {"max_rows": 4},
            "checkpoint": {"every": SAVED_AFTER, "keep": STEPS},
            "log": {"tensorboard": False},
        })  # fmt: skip

    return make


def train(config):
    return watch(config, config_file.to_yaml(config))


def check_same(whole, resumed) -> None:
    check = exactness.same_run("resume", "", whole, resumed, from_step=SAVED_AFTER)
    assert check.ok, check.note
    assert min(resumed.read) == SAVED_AFTER
    assert len({json.dumps(line) for line in whole.lines}) == len(whole.lines) == STEPS + 2


@pytest.mark.parametrize("case", FAST, ids=names)
def test_from_its_checkpoint_a_run_goes_on_bit_for_bit(config_of, tmp_path, case):
    """A kill leaves behind the folder as it was: here, a copy of the finished run without what came later."""
    whole = train(config_of(*case))
    killed = config_of(*case, "killed")
    shutil.copytree(tmp_path / "run", killed.run.folder)
    shutil.rmtree(killed.run.folder / "model")
    for checkpoint in sorted((killed.run.folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    check_same(whole, train(killed))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=names)
def test_killed_between_two_checkpoints_a_run_goes_on_bit_for_bit(config_of, monkeypatch, case):
    whole = train(config_of(*case))
    killed = config_of(*case, "killed")
    log = RunLog.train

    def log_and_die(self, at, **fields):
        log(self, at, **fields)
        if at == SAVED_AFTER + 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", log_and_die)
        with pytest.raises(Killed):
            train(killed)
    check_same(whole, train(killed))


@pytest.mark.parametrize(
    ("objective", "strategy"),
    [
        ("sft", "dora"),
        *(
            pytest.param(objective, strategy, marks=pytest.mark.slow)
            for objective in OBJECTIVES
            for strategy in ("scratch", "partial", "adapter", "lora")
        ),
    ],
)
def test_after_sigkill_a_run_goes_on_bit_for_bit(config_of, train_child, objective, strategy):
    case = (objective, strategy, objective in PACKING)
    whole = train(config_of(*case))
    killed = config_of(*case, "killed")
    code, output = train_child(killed, step=SAVED_AFTER + 1, act="os.kill(os.getpid(), signal.SIGKILL)")
    assert code == -signal.SIGKILL, output
    check_same(whole, train(killed))


@pytest.mark.parametrize("objective", [*FEW, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(config_of, tmp_path, objective):
    check = verify_training.accumulation(Runs(config_of(objective, "full", True), tmp_path, STEPS))
    assert check.compared.endswith("1x4 = 2x2 = 4x1")
    assert 0 < check.deviation <= 1e-5


@pytest.mark.parametrize("strategy", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", PACKING)
def test_packed_documents_learn_what_each_learns_by_itself(config_of, tmp_path, objective, strategy):
    check = verify_training.packing(Runs(config_of(objective, strategy, True), tmp_path, STEPS))
    assert 0 < check.deviation <= 1e-5


@pytest.mark.parametrize(
    ("objective", "strategy"),
    [
        ("causal_lm", "lora"),
        ("classification", "dora"),
        *(pytest.param(each, "lora", marks=pytest.mark.slow) for each in OBJECTIVES if each != "causal_lm"),
        *(pytest.param(each, "dora", marks=pytest.mark.slow) for each in OBJECTIVES if each != "classification"),
    ],
)
def test_the_merged_model_answers_as_the_unmerged_one(config_of, objective, strategy):
    config = config_of(objective, strategy, objective in PACKING)
    run = train(config)
    check = exactness.saved(config.run.folder / "model", run, merges=True)
    assert check.deviation <= 1e-5
    moved = exactness.only_claimed(run)
    assert moved.ok, moved.note


def test_the_fast_set_has_every_objective_with_every_strategy():
    from trainer.objectives import OBJECTIVES as BUILT
    from trainer.strategies import STRATEGIES as APPLIED

    pairs = {(OBJECTIVES[objective]["type"], STRATEGIES[strategy]["type"]) for objective, strategy, _ in FAST}
    assert pairs == {(objective, strategy) for objective in BUILT for strategy in APPLIED}
    assert {packed for objective, _, packed in FAST if objective in PACKING} == {True, False}
