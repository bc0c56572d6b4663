"""What is kept of a run's progress, and in which order: a checkpoint, its status, and at the end the model."""

import shutil
from dataclasses import replace
from typing import Any

import torch

from trainer import checkpoint, disk_space, early_stop, model_dir, run_folder, shards
from trainer.build import Parts, plain_model
from trainer.checkpoint import Counters
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.evaluate import Metrics, evaluate
from trainer.guards import RunFailed, StopRequest, writing
from trainer.metrics import RunLog, Terminal, peak_memory_bytes
from trainer.strategies import count_parameters

STOPPED = 75  # exit code of a run that saved a checkpoint because it was asked to stop


def save(config: RunConfig, parts: Parts, done: Counters) -> None:
    """Write a checkpoint on all ranks, and that the run has come this far."""
    folder = config.run.folder / "checkpoints"
    parts.world.at("checkpoint")
    with writing(f"{folder}: the checkpoint of step {done.step}", config.run.folder):
        checkpoint.save(
            folder, parts.world, parts.model, parts.optimizer, replace(done, feed=parts.feed.state_after(done.step)),
            keep=config.checkpoint.keep, fingerprints=parts.fingerprints, best=best_step(config, parts, done),
        )  # fmt: skip
    write_status(config, parts.world, "running", None, done.step)


def is_best(config: RunConfig, parts: Parts, done: Counters) -> bool:
    """Whether the step just done is to be kept because none was better."""
    return done.step > 0 and best_step(config, parts, done) == done.step


def best_step(config: RunConfig, parts: Parts, done: Counters) -> int | None:
    """Return the step whose checkpoint is kept because none was better; None where the config asks for none."""
    return early_stop.best_step(done.scores, parts.objective.score[1]) if config.checkpoint.best else None


def go_back_to_best(config: RunConfig, parts: Parts, done: Counters, metrics: Metrics) -> tuple[int, Metrics]:
    """Load the best checkpoint, where one is kept and it is not the last; return its step, and its metrics.

    Where it was damaged since, the last step stands for it, and that is said.
    """
    best = best_step(config, parts, done)
    if best is None or best == done.step:
        return done.step, metrics
    path = checkpoint.step_folder(config.run.folder / "checkpoints", best)
    reason = checkpoint.verify(path)
    if parts.world.any(bool(reason)):
        if parts.world.is_main:
            Terminal.say_once(f"warning: the best checkpoint cannot be used: {reason}; the model is the last step's")
        return done.step, metrics
    checkpoint.load(path, parts.world, parts.model, parts.optimizer, fingerprints=parts.fingerprints)
    return best, evaluate(parts.world, parts.model, parts.objective, parts.feed)


def save_before_model(config: RunConfig, parts: Parts, done: Counters) -> None:
    """Write the last checkpoint, so that a model that cannot be written costs no step.

    The model is what the run is for: where the disk has no room for both, it goes without.
    """
    world = parts.world
    has_room = world.is_main and disk_space.has_room_for_one_more(config, parts.outline)
    if not world.any(has_room):
        return
    try:
        save(config, parts, done)
    except RunFailed as error:
        if world.is_main:
            Terminal.say_once(f"warning: {error}; going on to the model")


def leave(config: RunConfig, world: World, done: Counters, stop: StopRequest, log: RunLog | None) -> int:
    """Say that the run stopped where everything is saved; return the exit code."""
    heard, ranks = world.sum([bool(stop.signal_name), bool(stop.signal_name) * world.rank])
    reason = f"stopped by {stop.signal_name or 'a signal'}" + (
        f" to rank {int(ranks)}" if heard == 1 < world.size else ""
    )
    write_status(config, world, "stopped", STOPPED, done.step, reason)
    if log is not None:
        log.say(f"stopped at step {done.step}; start it again to go on")
    return STOPPED


def finish(config: RunConfig, parts: Parts, done: Counters, metrics: Metrics) -> None:
    """Write the model directory, of the best step where that is asked for, and result.json; then that it is done.

    Removes the checkpoints where none are asked for: from here on they would only take space.
    """
    world, folder = parts.world, config.run.folder
    step, metrics = go_back_to_best(config, parts, done, metrics)
    test = parts.feed.test
    tested = evaluate(world, parts.model, parts.objective, parts.feed, test) if len(test) else Metrics()
    counts = count_parameters(parts.outline)
    world.at("model")
    model = whole_model(config, parts)
    if world.is_main:
        for line in parts.left_out():
            Terminal.say_once(line)
    if model is not None:
        with writing(f"{folder / 'model'}: the model", folder):
            model_dir.save_model(
                folder / "model", model, parts.tokenizer, config,
                labels=parts.objective.labels, step=step, metrics=metrics,
            )  # fmt: skip
        with writing(f"{folder / 'result.json'}", folder):
            result = _result(config, parts, done, step, metrics, tested, *counts)
            run_folder.write_result(folder, **result)
    world.barrier()
    reason = early_stop.reason(config.evaluation, done.scores, parts.objective.score[1])
    write_status(config, world, "done", 0, done.step, reason if done.step < config.run.steps else "")
    if world.is_main and config.checkpoint.every is None:
        for each in {done.step, step}:
            shutil.rmtree(checkpoint.step_folder(folder / "checkpoints", each), ignore_errors=True)


def whole_model(config: RunConfig, parts: Parts) -> torch.nn.Module | None:
    """Return the model as one process has it, on the main rank; None on the others. All ranks must ask.

    Where the ranks divide it, or DeepSpeed computes with copies, it is built again, and what learned is put into it.
    """
    world = parts.world
    if world.mode in ("single", "ddp"):
        return world.accelerator.unwrap_model(parts.model) if world.is_main else None
    model = plain_model(config, parts.objective, parts.tokenizer) if world.is_main else None
    places = dict([*model.named_parameters(), *model.named_buffers()]) if model is not None else {}
    with torch.no_grad():
        for name, weight in shards.whole_weights(world, parts.model, parts.optimizer):
            if model is not None:
                places[name].copy_(weight)
    return model


def write_status(config: RunConfig, world: World, state: str, code: int | None, step: int, reason: str = "") -> None:
    """Write status.json on the main rank. Raises RunFailed where the disk has no room."""
    if world.is_main:
        with writing(f"{config.run.folder / 'status.json'}", config.run.folder):
            run_folder.write_status(config.run.folder, state, code=code, step=step, reason=reason)


def _result(
    config: RunConfig,
    parts: Parts,
    done: Counters,
    model_step: int,
    metrics: Metrics,
    tested: Metrics,
    learning: int,
    total: int,
) -> dict[str, Any]:
    score_name, score_mode = parts.objective.score
    return {
        "objective": config.objective.type,
        "strategy": config.strategy.type,
        "steps": done.step,
        "model_step": model_step,
        "skipped_steps": done.skipped_steps,
        "score": metrics[score_name],
        "score_name": score_name,
        "score_mode": score_mode,
        "metrics": metrics,
        "details": metrics.details,
        "test_metrics": tested,
        "initial_metrics": _initial_metrics(config),
        "baseline": parts.objective.baseline(parts.feed.sample, parts.feed.held_out, len(parts.tokenizer)),
        "trainable_parameters": learning,
        "total_parameters": total,
        "tokens": done.total_tokens,
        "seconds": done.elapsed_s,
        "tokens_per_s": done.total_tokens / max(done.elapsed_s, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
        "program_memory_bytes": parts.program_bytes,
        "planned_memory_bytes": parts.planned_bytes,
        "data_fingerprint": parts.splits.fingerprint,
        "world_size": parts.world.size,
    }


def _initial_metrics(config: RunConfig) -> dict[str, Any]:
    entries = run_folder.read_metrics(config.run.folder / "metrics.jsonl")
    first = next((entry for entry in entries if entry["kind"] == "eval" and entry["step"] == 0), {})
    return {name: value for name, value in first.items() if name not in ("kind", "step", "elapsed_s")}
