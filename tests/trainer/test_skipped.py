"""Numbers that are not finite, and the scale of fp16's loss: what is stepped, skipped, counted and refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from serving.directory import BadInput
from trainer import build, distributed, loop
from trainer.distributed import NotFinite
from trainer.metrics import RunLog

CLOCKED = {"seconds", "tokens_per_s", "peak_memory_bytes", "program_memory_bytes"}
SKIP = {"on_non_finite": "skip"}


@pytest.fixture
def poisoned(monkeypatch, train):
    """Return a function that trains a config whose loss or gradient is not finite in some steps, and its weights
    after each step."""

    def run(config, steps: set[int], *, what: str = "loss") -> dict[int, list[torch.Tensor]]:
        weights, now = {}, []

        def build_poisoned(config, *rest):
            parts = build.build(config, *rest)
            norm = parts.world.accelerator.unwrap_model(parts.model).model.norm

            def is_bad() -> bool:
                return norm.training and now[-1:] and now[-1] + 1 in steps

            if what == "loss":
                norm.register_forward_hook(lambda _, args, out: out * math.nan if is_bad() else out)
            else:
                norm.weight.register_hook(lambda grad: grad * math.inf if is_bad() else grad)
            kept.append(parts)
            return parts

        def step_or_skip(config, parts, log, done, **named):
            found = step_for_real(config, parts, log, done, **named)
            state = parts.optimizer.optimizer.state_dict()["state"]
            tensors = [*parts.model.parameters(), *(t for entry in state.values() for t in entry.values())]
            weights[done.step + 1] = [tensor.detach().clone() for tensor in tensors]
            return found

        def micro_batches(self, step):
            now.append(step)
            return micro_batches_for_real(self, step)

        kept, step_for_real, micro_batches_for_real = [], loop.step_or_skip, build.Feed.micro_batches
        with monkeypatch.context() as patch:
            patch.setattr(loop, "build", build_poisoned)
            patch.setattr(loop, "step_or_skip", step_or_skip)
            patch.setattr(build.Feed, "micro_batches", micro_batches)
            assert train(config) == 0
        return weights

    return run


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def result(config) -> dict:
    return json.loads((config.run.folder / "result.json").read_text())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_bit_for_bit_and_is_counted(make_config, poisoned, read_lines, capfd, what):
    config = make_config(optim=SKIP)
    weights = poisoned(config, {3, 5}, what=what)
    for step in (3, 5):
        assert same(weights[step], weights[step - 1])
    for step in (2, 4, 6):
        assert not same(weights[step], weights[step - 1])
    lines = read_lines(config)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4, 6]
    skipped = [line for line in lines if line["kind"] == "skip"]
    assert skipped == [{"kind": "skip", "step": step, "skipped_steps": i + 1} for i, step in enumerate((3, 5))]
    assert (result(config)["steps"], result(config)["skipped_steps"]) == (6, 2)
    said = "the loss is nan" if what == "loss" else "the norm of the gradients is"
    assert f"step 3 was skipped: {said}" in capfd.readouterr().err
    text = (config.run.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert '"loss": 0.0' not in text


def test_a_bad_first_step_leaves_the_optimizer_empty(make_config, poisoned):
    config = make_config(optim=SKIP, run={"steps": 2})
    weights = poisoned(config, {1})
    assert len(weights[1]) < len(weights[2]), "AdamW keeps nothing yet"


@pytest.mark.parametrize(
    ("bad", "limit", "ends_at"), [({2, 3, 4}, 2, 3), ({2, 3, 5}, 2, None), ({2, 3}, 1, 2), ({2}, 0, 1)]
)
def test_too_many_skipped_steps_in_a_row_end_the_run(make_config, poisoned, bad, limit, ends_at):
    config = make_config(optim={**SKIP, "max_skipped_steps": limit})
    if ends_at is None:
        poisoned(config, bad)
        return
    with pytest.raises(NotFinite) as caught:
        poisoned(config, bad)
    message = str(caught.value)
    assert caught.value.step == ends_at
    assert message.startswith(f"step {ends_at + 1}, rows [")
    assert f"number {limit + 1} in a row, and optim.max_skipped_steps is {limit}; lower optim.lr" in message


def test_a_step_that_ends_the_run_names_its_rows_and_the_last_finite_norm(make_config, poisoned, read_lines):
    config = make_config()
    with pytest.raises(NotFinite) as caught:
        poisoned(config, {3})
    rows = build.build(config).feed.rows_at(2)
    norm = [line["grad_norm"] for line in read_lines(config) if line["kind"] == "train"][1]
    assert str(caught.value).startswith(
        f"step 3, rows {rows} of the training data: the loss is nan (the last finite norm was {norm:.4g}); lower"
    )
    status = json.loads((config.run.folder / "status.json").read_text())
    assert (status["state"], status["step"], status["code"]) == ("failed", 2, 1)


def test_a_run_that_failed_goes_on_without_the_step_when_it_is_told_to_skip(make_config, poisoned, read_lines):
    failed = make_config(checkpoint={"every": 1})
    with pytest.raises(NotFinite):
        poisoned(failed, {4})
    poisoned(make_config(checkpoint={"every": 1}, optim=SKIP), {4})
    assert [(line["kind"], line["step"]) for line in read_lines(failed)][-5:] == [
        ("train", 3), ("skip", 4), ("train", 5), ("train", 6), ("eval", 6),
    ]  # fmt: skip


# --- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(make_config, fp16_on_cpu):
    """A world of fp16 with a small model, and the same model with the same optimizer without a scale."""
    world = distributed.start(make_config(precision={"type": "fp16"}))
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    return world, *world.accelerator.prepare(models[0], optimizers[0]), models[1], optimizers[1]


def test_scaled_gradients_give_the_step_of_unscaled_ones_bit_for_bit(half):
    """A scale is a power of two, so it takes nothing from a number in fp32."""
    world, model, optimizer, plain, plain_optimizer = half
    assert world.scaler.get_scale() == 2.0**16
    inputs = torch.randn(4, 3)
    distributed.backward(world, model, model(inputs).square().sum(), accumulation=1, is_last=True)
    norm = distributed.finish_step(world, model, optimizer, learning_rate=0.1, max_norm=0.5)
    plain(inputs).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    plain_optimizer.step()
    assert norm == float(expected)
    assert torch.equal(model.weight, plain.weight)


def test_an_overflow_halves_the_scale_and_touches_nothing_else(half):
    world, model, optimizer, *_ = half
    before = model.weight.detach().clone()
    for scale in (2.0**15, 2.0**14):
        distributed.backward(world, model, model(torch.ones(1, 3)).sum() * 1e38, accumulation=1, is_last=True)
        norm = distributed.finish_step(world, model, optimizer, learning_rate=0.1, max_norm=0.5)
        assert not math.isfinite(norm)
        assert world.scaler.get_scale() == scale
        assert torch.equal(model.weight, before)
        assert not optimizer.optimizer.state
        assert model.weight.grad is None


def test_fp16_learns_what_fp32_learns_and_keeps_and_saves_fp32(make_config, train, read_lines, fp16_on_cpu):
    exact, rough = (make_config(run={"name": kind}, precision={"type": kind}) for kind in ("fp32", "fp16"))
    assert train(exact) == 0
    assert train(rough) == 0
    losses = [[line["loss"] for line in read_lines(each) if line["kind"] == "train"] for each in (exact, rough)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert result(rough)["skipped_steps"] == 0
    saved = load_file(rough.run.folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.fixture
def too_large_a_scale(monkeypatch, fp16_on_cpu):
    """Runs begin with a scale that fp16 cannot bear, so that their first steps are skipped."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**40, growth_interval=3))


def test_steps_in_which_the_scale_was_too_large_are_skipped_and_counted(
    make_config, train, read_lines, too_large_a_scale
):
    config = make_config(precision={"type": "fp16"}, run={"steps": 40}, optim={"max_skipped_steps": 40})
    assert train(config) == 0
    skipped = [line["step"] for line in read_lines(config) if line["kind"] == "skip"]
    assert skipped[:3] == [1, 2, 3]
    assert 3 < len(skipped) < 36
    assert result(config)["skipped_steps"] == len(skipped)
    assert result(config)["score"] < result(config)["initial_metrics"]["eval_loss"]


def test_a_scale_that_is_never_small_enough_ends_the_run(make_config, train, too_large_a_scale):
    config = make_config(precision={"type": "fp16"}, optim={"max_skipped_steps": 4})
    with pytest.raises(NotFinite, match=r"\(no step was taken yet\): number 5 in a row, and optim\.max_skipped_steps"):
        train(config)


def test_fp16_resumes_with_its_scale_bit_for_bit(make_config, train, monkeypatch, read_lines, too_large_a_scale):
    settings = {"precision": {"type": "fp16"}, "checkpoint": {"every": 7}, "optim": {"max_skipped_steps": 40}}
    whole, killed = (make_config(run={"name": name, "steps": 40}, **settings) for name in ("whole", "killed"))
    assert train(whole) == 0

    class Killed(BaseException):
        pass

    def log(self, step, **fields):
        if step > 33:
            raise Killed
        return log_for_real(self, step, **fields)

    log_for_real = RunLog.train
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", log)
        patch.setattr("launch.train.BaseException", (), raising=False)
        with pytest.raises(Killed):
            train(killed)
    newest = max((killed.run.folder / "checkpoints").iterdir())
    manifest = json.loads((newest / "trivet.json").read_text())
    assert manifest["loss_scale"]["scale"] < 2.0**30
    taken = manifest["step"] - manifest["skipped_steps"]
    assert set(manifest["optimizer_steps"].values()) == {taken}, "AdamW counts its own steps"
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(whole)
    assert {k: v for k, v in result(killed).items() if k not in CLOCKED} == {
        k: v for k, v in result(whole).items() if k not in CLOCKED
    }
    models = [(each.run.folder / "model" / "model.safetensors").read_bytes() for each in (whole, killed)]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim": {"type": "sgd"}}, r"optim\.type: sgd found; accepted with zero2: adamw"),
        ({"optim": {"type": "adafactor"}}, r"optim\.type: adafactor found"),
        ({"optim": SKIP}, r"optim\.on_non_finite: skip found; accepted with zero2: stop"),
        ({"precision": {"type": "fp16"}}, r"precision\.type: fp16 found; accepted with zero2: fp32, bf16"),
    ],
)
def test_what_deepspeed_would_do_in_its_own_way_is_refused(make_config, monkeypatch, change, said):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(BadInput, match=said):
        distributed.start(make_config(**change))
