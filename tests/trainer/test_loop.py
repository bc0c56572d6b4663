"""The loop against an independent one, and what it does with numbers that are not finite."""

import copy
import importlib.metadata
import json
import math

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from serving.directory import BadInput
from trainer import build, checkpoint, loop
from trainer.distributed import NotFinite
from trainer.evaluate import evaluate
from trainer.guards import RunFailed
from trainer.lm_head import Head
from trainer.packing import IGNORED


def losses(config, read_lines) -> list[float]:
    return [line["loss"] for line in read_lines(config) if line["kind"] == "train"]


def reference_losses(config, steps: int) -> tuple[list[float], list[float], torch.nn.Module]:
    """Train in plain torch; return losses, gradient norms and the model.

    Every document runs alone, without packing, padding or mask. The learning rate, the clipping and AdamW's update
    (decoupled decay, arXiv:1711.05101) are written out.
    """
    parts = build.build(config)
    model = copy.deepcopy(parts.world.accelerator.unwrap_model(parts.model)).double().eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    optim, (beta1, beta2) = config.optim, config.optim.betas
    losses, norms = [], []
    for step in range(steps):
        documents = [example for row in parts.feed.rows_at(step) for example in parts.feed.train[row]]
        total, count = torch.zeros((), dtype=torch.float64), 0
        for document in documents:
            ids = torch.tensor(document.input_ids.tolist())[None]
            log_probabilities = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
            for position, target in enumerate(document.targets.tolist()):
                if target != IGNORED:
                    total, count = total - log_probabilities[position, target], count + 1
        loss = total / count
        gradients = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        shrink = min(1.0, optim.max_grad_norm / (norm + 1e-6))
        if step < optim.warmup_steps:
            rate = optim.lr * (step + 1) / optim.warmup_steps
        else:
            angle = math.pi * (step - optim.warmup_steps) / (config.run.steps - optim.warmup_steps)
            rate = optim.lr * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
        with torch.no_grad():
            for weight, gradient, mean, square in zip(weights, gradients, means, squares, strict=True):
                gradient = gradient * shrink
                mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                if weight.dim() > 1:
                    weight.mul_(1 - rate * optim.weight_decay)
                corrected = mean / (1 - beta1 ** (step + 1))
                spread = (square / (1 - beta2 ** (step + 1))).sqrt() + optim.eps
                weight.sub_(rate * corrected / spread)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, model


@pytest.mark.parametrize(
    ("objective", "strategy"), [("causal_lm", "scratch"), ("sft", "full"), ("sft", "lora"), ("causal_lm", "full")]
)
def test_the_losses_are_those_of_a_plain_loop_written_here(make_config, parts_of, read_lines, objective, strategy):
    changes = {
        "batch": {"rows": 4, "micro_rows": 2, "max_length": 24},
        "optim": {"weight_decay": 0.2, "max_grad_norm": 0.2},
    }
    config = make_config(objective, strategy, evaluation={"max_rows": 2}, **changes)
    expected, norms, reference = reference_losses(config, 6)
    trained = parts_of(config)
    assert losses(config, read_lines) == pytest.approx(expected, rel=1e-5)
    logged = [line["grad_norm"] for line in read_lines(config) if line["kind"] == "train"]
    assert logged == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.2, "nothing was clipped"
    if strategy != "lora":  # whose adapter was merged when the model was saved
        weights = dict(trained.world.accelerator.unwrap_model(trained.model).named_parameters())
        for name, value in reference.named_parameters():
            # AdamW divides by the gradient's own size, so where that is tiny fp32 shows: a hundredth of a step of 1e-2
            torch.testing.assert_close(weights[name].double(), value, rtol=0, atol=1e-4)


def test_every_example_is_in_the_packed_rows_that_the_loop_reads(make_config):
    config = make_config(batch={"max_length": 24})
    parts = build.build(config)
    texts = [row["text"] for row in parts.splits.train]
    expected = sorted(
        piece[start : start + 25]
        for ids in (parts.tokenizer(text)["input_ids"] for text in texts)
        for piece in [[*ids, parts.tokenizer.eos_token_id]]
        for start in range(0, len(piece) - 1, 24)
    )
    found = [[*e.input_ids.tolist(), int(e.targets[-1])] for row in parts.feed.train for e in row]
    assert sorted(found) == expected


def test_a_run_is_the_same_twice_and_another_seed_is_another_run(make_config, train, read_lines):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = make_config(run={"name": name, "seed": seed})
        assert train(config) == 0
        runs[name] = read_lines(config)
    assert runs["a"] == runs["b"]
    assert runs["a"] != runs["c"]


def test_the_seed_decides_the_first_weights_and_the_order(make_config):
    parts = [build.build(make_config(run={"seed": seed})) for seed in (0, 1)]
    first, second = (torch.cat([p.detach().flatten() for p in part.model.parameters()]) for part in parts)
    assert not torch.equal(first, second)
    assert parts[0].feed.rows_at(0) != parts[1].feed.rows_at(0)


def test_dropout_changes_training_and_not_evaluation(make_config, train, read_lines):
    seen = {}
    for dropout in (0.0, 0.5):
        config = make_config("sft", "lora", run={"name": f"drop{dropout}"}, strategy={"dropout": dropout})
        assert train(config) == 0
        seen[dropout] = losses(config, read_lines)
    assert seen[0.0][0] == seen[0.5][0]  # the adapter is zero at first
    assert seen[0.0][2:] != seen[0.5][2:]

    parts = build.build(config)
    with torch.no_grad():
        for name, weight in parts.model.named_parameters():
            weight += 0.1 * ("lora_B" in name)
    first, second = (evaluate(parts.world, parts.model, parts.objective, parts.feed) for _ in range(2))
    assert first == second
    assert all(module.training for module in parts.model.modules())


def test_the_run_folder_tells_what_happened(make_config, train):
    config = make_config("sft", "lora", evaluation={"every": 3}, log={"every": 4, "tensorboard": True})
    assert train(config) == 0
    folder = config.run.folder
    status = json.loads((folder / "status.json").read_text())
    stamp = {"format_version": 2, "trivet": importlib.metadata.version("trivet")}
    assert status == {**stamp, "state": "done", "code": 0, "step": 6, "reason": ""}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0), ("train", 1), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert (result["score_name"], result["score_mode"], result["steps"]) == ("eval_loss", "min", 6)
    assert result["score"] == result["metrics"]["eval_loss"] == lines[-1]["eval_loss"]
    assert result["initial_metrics"]["eval_loss"] == lines[0]["eval_loss"]
    # rank 8 on seven linear layers of each of two blocks: 8 * (in + out) each
    q, kv, mlp = 8 * (32 + 32), 8 * (32 + 16), 8 * (32 + 64)
    assert result["trainable_parameters"] == 2 * (2 * q + 2 * kv + 3 * mlp)
    assert result["tokens"] == lines[-2]["total_tokens"]
    assert list((folder / "tensorboard").iterdir())


def test_total_tokens_counts_what_was_read(make_config, train):
    config = make_config(batch={"rows": 3, "max_length": 24})
    parts = build.build(config)
    expected = sum(len(e.input_ids) for step in range(6) for i in parts.feed.rows_at(step) for e in parts.feed.train[i])
    assert train(config) == 0
    assert json.loads((config.run.folder / "result.json").read_text())["tokens"] == expected


def poison_the_loss(parts) -> None:
    """In training only: a model that is broken from the start shows in the evaluation before step 0."""
    parts.model.model.norm.register_forward_hook(lambda norm, _, out: out * float("nan") if norm.training else out)


def poison_a_gradient(parts) -> None:
    parts.model.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))


@pytest.mark.parametrize(
    ("poison", "said"),
    [(poison_the_loss, "the loss is nan"), (poison_a_gradient, "the norm of the gradients is (inf|nan)")],
)
def test_a_number_that_is_not_finite_stops_before_the_optimizer_steps(make_config, train, monkeypatch, poison, said):
    kept = {}

    def build_poisoned(config, *rest):
        parts = build.build(config, *rest)
        poison(parts)
        kept.update(parts=parts, before=[p.detach().clone() for p in parts.model.parameters()])
        return parts

    monkeypatch.setattr(loop, "build", build_poisoned)
    config = make_config(checkpoint={"every": 1})
    with pytest.raises(NotFinite, match=rf"step 1, rows \[.*\] of the training data: {said}"):
        train(config)
    for before, now in zip(kept["before"], kept["parts"].model.parameters(), strict=True):
        assert torch.equal(before, now)
    assert not kept["parts"].optimizer.optimizer.state
    status = json.loads((config.run.folder / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 1)
    assert "NotFinite" in status["reason"]
    assert not (config.run.folder / "checkpoints").exists()


def test_a_model_that_scores_no_number_is_never_published(make_config, train):
    config = make_config(run={"steps": 1}, optim={"lr": 1e38, "warmup_steps": 0})
    with pytest.raises(NotFinite, match=r"step 1: the held-out eval_loss is nan; lower optim\.lr") as caught:
        train(config)
    assert caught.value.step == 1
    assert not (config.run.folder / "model").exists()
    assert not (config.run.folder / "result.json").exists()
    lines = (config.run.folder / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [0, 1]


@pytest.mark.parametrize(
    ("poison_at", "said"), [("loss", "step 3, .*: the loss is nan"), ("norm", "step 3, .*: the norm .* is nan")]
)
def test_a_run_that_cannot_go_on_knows_its_finished_steps(make_config, train, monkeypatch, poison_at, said):
    def poisoned(function, *, call):
        calls = []
        return lambda *args, **kwargs: (
            calls.append(1),
            function(*args, **kwargs) * (nan if len(calls) == call else 1),
        )[1]

    nan = float("nan")
    if poison_at == "loss":
        monkeypatch.setattr("trainer.lm_head.Head.loss_sum", poisoned(Head.loss_sum, call=8))
    else:
        monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", poisoned(Accelerator.clip_grad_norm_, call=3))
    # The losses before that of step 3: two for the memory plan, of the rehearsal, one to count its arithmetic, of the
    # evaluation before step 0, of steps 1 and 2.
    with pytest.raises(NotFinite, match=said) as caught:
        train(make_config(evaluation={"max_rows": 1}))
    assert caught.value.step == 2


def test_a_model_that_is_broken_from_the_start_is_said_to_be(make_config, train, monkeypatch):
    def build_poisoned(config, *rest):
        parts = build.build(config, *rest)
        with torch.no_grad():
            parts.model.model.norm.weight[3] = float("nan")
        return parts

    monkeypatch.setattr(loop, "build", build_poisoned)
    with pytest.raises(NotFinite, match="step 0: the held-out eval_loss is nan; the model that the run starts from"):
        train(make_config())


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_keeps_what_is_there(make_config, train, monkeypatch):
    saved = []

    def no_space(*args, **kwargs):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return save_file(*args, **kwargs)

    config = make_config(checkpoint={"every": 2})
    monkeypatch.setattr("trainer.checkpoint.save_file", no_space)
    said = r"the checkpoint of step 4 cannot be written \(.*No space.*; started again, the run goes on from step 2$"
    with pytest.raises(RunFailed, match=said) as caught:
        train(config)
    assert caught.value.step == 2
    path, skipped = checkpoint.newest(config.run.folder / "checkpoints")
    assert (path.name, skipped) == ("step-00000002", [])


@pytest.mark.parametrize(("objective", "strategy"), [("causal_lm", "scratch"), ("sft", "lora")])
@pytest.mark.parametrize("place", ["trainer.model_dir.save_model", "trainer.run_folder.write_result"])
def test_a_model_that_cannot_be_written_costs_no_step(
    make_config, train, monkeypatch, capfd, read_lines, objective, strategy, place
):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    whole, config = (make_config(objective, strategy, run={"name": name}) for name in ("whole", "failed"))
    assert train(whole) == 0
    assert not list(whole.run.folder.glob("checkpoints/*"))
    with monkeypatch.context() as patch:
        patch.setattr(place, no_space)
        with pytest.raises(RunFailed, match=r"No space.*; started again, the run goes on from step 6$") as caught:
            train(config)
    status = json.loads((config.run.folder / "status.json").read_text())
    assert (status["state"], status["step"], caught.value.step) == ("failed", 6, 6)
    monkeypatch.setattr("trainer.loop.learning_rate", lambda *args: pytest.fail("a step was taken again"))
    assert train(config) == 0
    assert "going on from" in capfd.readouterr().err
    assert not list(config.run.folder.glob("checkpoints/*"))
    assert read_lines(config) == read_lines(whole)
    models = [(each.run.folder / "model" / "model.safetensors").read_bytes() for each in (whole, config)]
    assert models[0] == models[1]


@pytest.mark.parametrize("why", ["no room for both", "a quota that nobody tells"])
def test_where_there_is_no_room_for_a_last_checkpoint_the_model_is_written_without(
    make_config, train, monkeypatch, capfd, why
):
    """As before the checkpoint was thought of: the model is what the run is for."""
    from trainer import disk_space

    def no_space(*args, **kwargs):
        raise OSError(122, "Disk quota exceeded")

    config = make_config()
    model = build.build(config).model
    if why == "no room for both":
        free = disk_space.model_bytes(model) + disk_space.checkpoint_bytes(model, config.optim) - 1
        monkeypatch.setattr(disk_space, "free_bytes", lambda folder: free)
        monkeypatch.setattr("trainer.checkpoint.save", lambda *args, **kwargs: pytest.fail("it was tried"))
    else:
        monkeypatch.setattr("trainer.checkpoint.save_file", no_space)
    assert train(config) == 0
    said = "may have no room for the last checkpoint" if why == "no room for both" else "Disk quota exceeded"
    assert said in capfd.readouterr().err
    assert (config.run.folder / "model" / "trivet.json").is_file()
    assert not list(config.run.folder.glob("checkpoints/*"))


def test_a_batch_that_cannot_be_divided_is_refused(make_config):
    with pytest.raises(BadInput, match=r"batch\.micro_rows: 3 does not divide the 4 rows"):
        build.build(make_config(batch={"micro_rows": 3}))
    from trainer.modes import micro_rows

    with pytest.raises(BadInput, match=r"batch\.rows: 4 rows cannot be shared by 3 processes"):
        micro_rows(make_config(), 3)


def test_bad_data_leaves_no_run_folder(make_config, train, tmp_path):
    data = {"type": "files", "train": str(tmp_path / "absent.jsonl")}
    config = make_config(data=data)
    with pytest.raises(BadInput, match="no such file"):
        train(config)
    assert not config.run.folder.exists()


def test_the_longest_rows_are_rehearsed_without_a_trace(make_config):
    config = make_config(batch={"rows": 2, "max_length": 24})
    parts = build.build(config)
    longest = parts.feed.longest()
    assert longest["input_ids"].shape == (1, 2 * 24)
    before = [p.detach().clone() for p in parts.model.parameters()]
    ran = []
    parts.model.register_forward_pre_hook(
        lambda _, args, kwargs: ran.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    parts.model.model.norm.weight.register_hook(lambda gradient: ran.append("back"))
    loop.rehearse(parts)
    assert ran == [tuple(longest["input_ids"].shape), "back"]
    assert all(torch.equal(old, new) for old, new in zip(before, parts.model.parameters(), strict=True))
    assert all(p.grad is None for p in parts.model.parameters())
    assert not parts.optimizer.optimizer.state


def test_bf16_computes_in_bf16_and_keeps_and_saves_fp32(make_config, train, train_child, read_lines):
    exact = make_config(run={"name": "fp32"})
    rough = make_config(run={"name": "bf16"}, precision={"type": "bf16"})
    assert train(exact) == 0
    code, output = train_child(rough)  # one process knows one precision
    assert code == 0, output
    expected, found = losses(exact, read_lines), losses(rough, read_lines)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    with safe_open(rough.run.folder / "model" / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


def test_the_test_rows_are_scored_once_at_the_end_by_the_model_that_is_written(make_config, train, data_files):
    held_out = data_files["classification"]["validation"]
    config = make_config("classification", "full", data={"test": held_out}, evaluation={"max_rows": 100})
    assert train(config) == 0
    result = json.loads((config.run.folder / "result.json").read_text())
    assert result["test_metrics"] == pytest.approx(result["metrics"]), "the same rows here"
    assert sum(map(sum, result["details"]["confusion"])) == 9
    none = make_config("classification", "full", run={"name": "none"})
    assert train(none) == 0
    assert json.loads((none.run.folder / "result.json").read_text())["test_metrics"] == {}
