"""Each class of exactness holds, and says so when it does not: the code is broken once for each."""

import itertools
import math

import pytest
import torch
from peft.tuners.lora.layer import Linear

from launch import config_file, verify_runs, verify_training
from launch.verify_runs import Runs
from trainer import checkpoint, exactness, loop, model_dir, strategies, token_model
from trainer.feed import Feed
from trainer.metrics import RunLog
from trainer.objectives import OBJECTIVES

STAGED = {"train": ["model.layers.1.*"], "stages": [{"step": 30, "train": ["model.layers.0.*"]}]}


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing of the run catches it."""


@pytest.fixture
def runs(make_config, tmp_path, monkeypatch):
    """Return a function that makes the runs of a tiny config, in which a kill is an exception."""

    def kill_here(step, config, folder):
        log = RunLog.train

        def log_and_die(self, at, **fields):
            log(self, at, **fields)
            if at == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "train", log_and_die)
            with pytest.raises(Killed):
                loop.train(config, config_file.to_yaml(config))

    monkeypatch.setattr(verify_runs, "kill_after", kill_here)

    def make(objective="causal_lm", strategy="scratch", /, *, steps=4, **changes):
        (tmp_path / "verify").mkdir(exist_ok=True)
        return Runs(make_config(objective, strategy, **changes), tmp_path / "verify", steps)

    return make


@pytest.fixture
def wrap(monkeypatch):
    """Return a function that puts `around` around the function at a place: it is given the real one first."""

    def put(owner, name, around):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: around(real, *args, **named))

    return put


def failed(check) -> bool:
    return not check.ok and check.deviation is not None


@pytest.mark.parametrize(
    ("objective", "strategy", "changes"),
    [
        ("sft", "lora", {}),
        pytest.param("causal_lm", "scratch", {"data": {"streaming": True, "window_rows": 7}}, marks=pytest.mark.slow),
        pytest.param("causal_lm", "full", {"optim": {"type": "adafactor"}}, marks=pytest.mark.slow),
        pytest.param("causal_lm", "full", {"precision": {"type": "bf16"}}, marks=pytest.mark.slow),
        pytest.param("classification", "full", {"batch": {"micro_rows": 1}}, marks=pytest.mark.slow),
        pytest.param("causal_lm", "partial", {"strategy": STAGED, "run": {"steps": 40}}, marks=pytest.mark.slow),
        pytest.param("classification", "adapter", {}, marks=pytest.mark.slow),
        pytest.param("sft", "linear_probe", {}, marks=pytest.mark.slow),
    ],
)
def test_every_class_holds_or_says_why_it_does_not_apply(runs, objective, strategy, changes):
    made = runs(objective, strategy, **changes)
    checks = [look(made) for look in verify_training.CLASSES]
    assert [(check.name, check.deviation, check.note) for check in checks if not check.ok] == []
    not_applied = {check.name: check.note for check in checks if check.deviation is None}
    expected = set() if strategy in exactness.ADDS_LAYERS else {"step 0 = base"}
    assert not_applied.keys() == expected | ({"packed = unpacked"} if objective == "classification" else set())
    assert all(not_applied.values())


def test_a_run_that_draws_from_what_went_before_is_not_the_same_twice(runs, wrap):
    numbers = iter(range(10**6))
    wrap(loop.order, "dropout_seed", lambda real, *args: next(numbers))
    check = verify_training.same_run_twice(runs("sft", "lora", strategy={"dropout": 0.3}))
    assert failed(check)
    assert "of step" in check.note


def test_a_resume_that_forgets_the_optimizer_is_seen(runs, wrap):
    def forget(real, path, world, model, optimizer, **named):
        done = real(path, world, model, optimizer, **named)
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
        return done

    wrap(checkpoint, "load", forget)
    check = verify_training.resume(runs())
    assert failed(check)
    assert "of step 3" in check.note or "of step 4" in check.note


def test_a_resume_that_starts_the_data_again_is_seen(runs, wrap):
    made = runs()
    assert made.whole.read

    def from_the_start(real, self, step):
        return real(self, step - made.saved_after if step >= made.saved_after else step)

    made.killed  # noqa: B018 (made before the code is broken)
    real = Feed.micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "micro_batches", lambda self, step: from_the_start(real, self, step))
        assert failed(verify_training.resume(made))
        assert failed(verify_training.resume_with_another_micro_batch(made))


def test_a_mean_of_means_is_seen(runs, wrap):
    """Each micro-batch divided by its own count: what many a trainer did under accumulation."""

    def mean(real, self, model, batch):
        sums = real(self, model, batch)
        num_documents = batch["attention_mask"].numel() - 1
        return sums | {"loss": sums["loss"] / sums["count"] * num_documents}

    made = runs("sft", "full")
    with pytest.MonkeyPatch.context() as patch:
        real = OBJECTIVES["sft"].sums
        patch.setattr(OBJECTIVES["sft"], "sums", lambda self, model, batch: mean(real, self, model, batch))
        check = verify_training.accumulation(made)
    assert failed(check)
    assert check.deviation > 1e-3


def test_documents_that_see_each_other_are_seen(runs, monkeypatch):
    collate = token_model.collate_packed

    def leak(rows, *first_position):
        batch = collate(rows, *first_position)
        return batch | {"attention_mask": batch["attention_mask"][..., [0, -1]]}

    made = runs()
    assert made.parts.objective.packs
    monkeypatch.setattr(token_model, "collate_packed", leak)
    # What tells documents apart is broken too: their bounds are where positions start again.
    monkeypatch.setattr(exactness, "documents", by_positions)
    assert failed(verify_training.packing(made))


@pytest.mark.parametrize("leak", ["one token", "two documents"])
def test_a_leak_between_two_documents_is_seen_in_the_gradients(runs, monkeypatch, leak):
    made = runs("sft", "full")
    sums = made.parts.objective.sums

    def leaky(model, batch):
        ends = batch["attention_mask"].clone()
        if leak == "one token":
            ends[..., 1] -= 1  # the second document begins with the last token of the first
        else:
            ends = torch.cat([ends[..., :1], ends[..., 2:]], -1)
        return sums(model, batch | {"attention_mask": ends})

    batch = next(made.parts.feed.micro_batches(0))
    gradients = []
    for each in (sums, sums, leaky):
        each(made.parts.model, batch)["loss"].backward()
        gradients.append(exactness._take_gradients(made.parts.model))
    assert exactness.gradient_deviation(*gradients[:2]) <= exactness.ROUNDING
    assert exactness.gradient_deviation(gradients[0], gradients[2]) > 100 * exactness.ROUNDING


def test_the_deviation_of_gradients_worked_by_hand():
    first = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}  # of length 5
    second = {"a": torch.tensor([3.0, 3e-4]), "b": torch.tensor([4.0 + 4e-4])}
    assert exactness.gradient_deviation(first, second) == pytest.approx(1e-4, rel=1e-2)
    assert exactness.gradient_deviation(first, first) == 0
    for broken in ({"a": first["a"]}, first | {"b": torch.tensor([math.nan])}, first | {"b": torch.tensor([math.inf])}):
        assert exactness.gradient_deviation(first, broken) == math.inf
        assert exactness.gradient_deviation(broken, first) == math.inf


def test_gradients_that_are_no_number_are_seen(runs):
    made = runs("sft", "full")
    weight = next(made.parts.model.parameters())
    real = made.parts.objective.sums

    def poisoned(model, batch):
        found = real(model, batch)
        found["loss"].register_hook(lambda grad: grad * math.nan)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.parts.objective, "sums", poisoned)
        assert weight.requires_grad
        assert failed(verify_training.packing(made))


def test_runs_whose_last_step_is_skipped_are_compared_too(runs, monkeypatch, fp16_on_cpu):
    """With a scale that fp16 cannot bear no step of these is taken; the weights at the end are those of the start."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**60))
    made = runs(precision={"type": "fp16"})
    assert verify_training.same_run_twice(made).ok
    assert made.whole.after == made.whole.before
    assert verify_training.saved(made).ok
    check = verify_training.only_claimed(made)
    assert failed(check)
    assert check.note == "nothing changed at all"


def by_positions(batch):
    ids, targets = batch["input_ids"][0], batch["targets"][0]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), len(ids)]
    return [(ids[start:stop], targets[start:stop]) for start, stop in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", ["lora", "adapter", "linear_probe"])
def test_layers_that_change_the_model_before_any_step_are_seen(runs, monkeypatch, kind):
    assert verify_training.step_zero(runs("causal_lm", kind)).ok
    apply = strategies.STRATEGIES[kind]

    def apply_badly(model, config):
        model = apply(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        return model

    monkeypatch.setitem(strategies.STRATEGIES, kind, apply_badly)
    assert failed(verify_training.step_zero(runs("causal_lm", kind)))


def test_a_merge_with_another_scale_is_seen(runs, monkeypatch):
    monkeypatch.setattr(model_dir, "MERGE_TOLERANCE", 10.0)  # its own check would refuse to publish
    made = runs("causal_lm", "lora")
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: delta(self, name) * 1.1)
    check = verify_training.saved(made) if made.whole else None
    assert failed(check)
    assert check.name == "merged = unmerged"


def test_weights_that_are_saved_wrong_are_seen(runs, wrap):
    def damaged(real, folder):
        model = real(folder)
        with torch.no_grad():
            next(model.parameters()).add_(1e-4)
        return model

    made = runs("causal_lm", "full")
    assert made.whole.outputs is not None
    assert verify_training.saved(made).ok
    wrap(model_dir, "load", damaged)
    assert failed(verify_training.saved(made))


def test_a_frozen_weight_that_changes_is_seen(runs, wrap):
    def nudge(real, world, model, *args, **named):
        norm = real(world, model, *args, **named)
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        frozen.data.add_(1e-6)
        return norm

    wrap(loop.distributed, "finish_step", nudge)
    check = verify_training.only_claimed(runs("causal_lm", "lora"))
    assert failed(check)
    assert check.note.endswith("changed, though it is frozen")


def test_a_run_in_which_nothing_learns_is_seen(runs, wrap):
    wrap(torch.optim.AdamW, "step", lambda real, self, closure=None: None)
    assert failed(verify_training.only_claimed(runs()))


def test_a_rank_that_reads_ahead_is_seen(runs, monkeypatch):
    made = runs()
    assert verify_training.world_sizes(made).ok
    parts_at = Feed.parts_at
    monkeypatch.setattr(Feed, "parts_at", lambda self, step: parts_at(self, step + self.rank))
    check = verify_training.world_sizes(made)
    assert failed(check)
    assert check.note == "2 processes read other tokens or targets in step 1"


def test_masks_that_depend_on_the_rank_are_seen(runs, monkeypatch):
    made = runs(objective={"type": "masked_lm"}, model={"architecture": "encoder", "num_kv_heads": 4})
    assert verify_training.world_sizes(made).ok
    collate = Feed._collate
    monkeypatch.setattr(
        Feed, "_collate", lambda self, rows, draws: collate(self, rows, [draw + self.rank for draw in draws])
    )
    assert failed(verify_training.world_sizes(made))


def test_another_micro_batch_that_changes_the_order_is_seen(runs, monkeypatch):
    made = runs()
    made.killed  # noqa: B018 (made before the code is broken)
    assert made.whole.read
    rows_of_rank = loop.order.rows_of_rank

    def turned(rows, *, micro_rows, **named):
        return rows_of_rank(rows if micro_rows == len(rows) else rows[::-1], micro_rows=micro_rows, **named)

    monkeypatch.setattr(loop.order, "rows_of_rank", turned)
    check = verify_training.resume_with_another_micro_batch(made)
    assert failed(check)
    assert "steps differ" in check.note


def test_a_single_row_cannot_be_cut_and_says_so(runs):
    made = runs(batch={"rows": 1})
    for look in (verify_training.resume_with_another_micro_batch, verify_training.accumulation):
        check = look(made)
        assert (check.deviation, check.ok) == (None, True)
        assert "batch.rows is 1" in check.note
    assert verify_training.world_sizes(made).note == "batch.rows 1 cannot be shared by several processes"


def test_nan_never_holds():
    assert failed(exactness.Check("a", "b", 1e-5, float("nan")))
