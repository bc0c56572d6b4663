"""The training loop: from a validated config to a finished run folder. Every mode and strategy goes through here."""

import math
import time
from contextlib import nullcontext
from functools import partial

import torch

from serving import directory
from trainer import checkpoint, disk_space, distributed, order, out_of_memory, run_folder, tracking
from trainer.build import Parts, build
from trainer.checkpoint import Counters
from trainer.config import RunConfig
from trainer.distributed import NotFinite
from trainer.evaluate import evaluate, to_device
from trainer.guards import StopRequest, failed, starting
from trainer.metrics import RunLog, Terminal, peak_memory_bytes
from trainer.optim import learning_rate
from trainer.plan import Plan, make_plan
from trainer.progress import finish, leave, save, save_before_model


def train(config: RunConfig, config_yaml: str) -> int:
    """Train one run from its newest checkpoint, or from the start; return 0 when done, 75 when stopped after a save.

    `config_yaml` is the resolved config, saved with the run. Raises BadInput for what the user can mend, before step 0.
    """
    folder = config.run.folder
    with StopRequest() as stop:
        with out_of_memory.while_building(config):
            parts = build(config)
        is_main, device = parts.world.is_main, parts.world.accelerator.device
        plan = check_memory(config, parts, world_size=parts.world.size)
        if is_main:
            check_disk(config, parts)
        with out_of_memory.explained(plan, config, device):
            rehearse(parts)
        with run_folder.claimed(folder) if is_main else nullcontext():
            with out_of_memory.explained(plan, config, device):
                done = resume(config, parts)
                log = start(config, config_yaml, parts, done) if is_main else None
            with log or nullcontext(), out_of_memory.explained(plan, config, device, failure=partial(failed, folder)):
                return run_steps(config, parts, done, stop, log)


def run_steps(config: RunConfig, parts: Parts, done: Counters, stop: StopRequest, log: RunLog | None) -> int:
    """Take the steps that are left and write the results; return the exit code."""
    world, model, optimizer, feed = parts.world, parts.model, parts.optimizer, parts.feed
    started, saved_step = time.perf_counter() - done.elapsed_s, done.step
    if world.any(bool(stop.signal_name)):  # while the run was being built
        return leave(config, world, done, stop, log)
    if done.step == 0:
        evaluate_and_log(parts, log, 0, started)
    for step in range(done.step, config.run.steps):
        step_started, data_wait_s = time.perf_counter(), 0.0
        # Ranks hold different numbers of targets, so divide by the global count: a mean of means is biased.
        count = feed.count_at(step)
        loss_sum = torch.zeros((), device=world.accelerator.device)
        batches = feed.micro_batches(step)
        for i in range(feed.accumulation):
            asked = time.perf_counter()
            batch = to_device(world, next(batches))
            data_wait_s += time.perf_counter() - asked
            is_last = i == feed.accumulation - 1
            torch.manual_seed(order.dropout_seed(config.run.seed, step, i, world.rank))
            with distributed.accumulating(world, model, is_last=is_last):
                with world.accelerator.autocast():
                    loss = parts.objective.sums(model, batch)["loss"]
                # Gradients are averaged over ranks, so the sum over all targets is size * mean.
                scale = world.size / max(count, 1)
                distributed.backward(world, model, loss * scale, accumulation=feed.accumulation, is_last=is_last)
            loss_sum += loss.detach()
        total_loss, stops = world.sum([float(loss_sum), bool(stop.signal_name)])
        where = f"step {step + 1}, rows {feed.rows_at(step)} of the training data"
        if not math.isfinite(total_loss):
            raise NotFinite(f"{where}: the loss is {total_loss}; lower optim.lr, or mend those rows", step=step)
        lr = learning_rate(step, config.optim, config.run.steps)
        norm = distributed.finish_step(
            world, model, optimizer, learning_rate=lr, max_norm=config.optim.max_grad_norm, where=where, step=step
        )
        tokens, now = feed.tokens_at(step), time.perf_counter()
        done = Counters(step + 1, done.total_tokens + tokens, now - started)
        if log is not None:
            log.train(
                done.step,
                loss=total_loss / max(count, 1),
                lr=lr,
                grad_norm=norm,
                tokens=tokens,
                total_tokens=done.total_tokens,
                tokens_per_s=tokens / (now - step_started),
                data_wait_s=data_wait_s,
                memory_bytes=peak_memory_bytes(),
                elapsed_s=done.elapsed_s,
            )
        if is_due(done.step, config.evaluation.every) and done.step < config.run.steps:
            evaluate_and_log(parts, log, done.step, started)
        if stops or is_due(done.step, config.checkpoint.every):
            save(config, parts, done)
            saved_step = done.step
        if stops and done.step < config.run.steps:
            return leave(config, world, done, stop, log)
    metrics = evaluate_and_log(parts, log, done.step, started)
    if saved_step < done.step:
        save_before_model(config, parts, done)
    finish(config, parts, done, metrics)
    return 0


def resume(config: RunConfig, parts: Parts) -> Counters:
    """Load the newest complete checkpoint, if there is one; return where the run stands."""
    path, skipped = checkpoint.newest(config.run.folder / "checkpoints")
    if parts.world.is_main:
        for reason in skipped:
            Terminal.say_once(f"checkpoint skipped: {reason}")
    if path is None:
        return Counters()
    if parts.world.is_main:
        Terminal.say_once(f"going on from {path}")
    return checkpoint.load(path, parts.world, parts.model, parts.optimizer, fingerprints=parts.fingerprints)


def check_memory(config: RunConfig, parts: Parts, *, world_size: int) -> Plan | None:
    """Return how much memory a rank needs; say so where it may be more than there is. None under DeepSpeed.

    Raises OutOfMemory where it certainly is.
    """
    if parts.world.mode == "deepspeed":
        return None  # its engine divides gradients and moments among the ranks
    model, accelerator = parts.world.accelerator.unwrap_model(parts.model), parts.world.accelerator
    row = to_device(parts.world, parts.feed.longest(1))
    plan = make_plan(model, parts.objective, row, config, world_size=world_size, autocast=accelerator.autocast)
    warning = out_of_memory.refuse_what_cannot_fit(plan, config, accelerator.device, world_size=world_size)
    if warning and parts.world.is_main:
        Terminal.say_once(warning)
    return plan


def check_disk(config: RunConfig, parts: Parts) -> None:
    """Say so where the disk may have no room for what the run will write. Raises BadInput where the model has none."""
    if warning := disk_space.check(config, parts.world.accelerator.unwrap_model(parts.model)):
        Terminal.say_once(warning)


def rehearse(parts: Parts) -> None:
    """Run the longest batch forward and back once, so that running out of memory shows before step 0."""
    if parts.world.mode == "deepspeed":
        return  # its engine counts every backward pass as part of a step
    batch = to_device(parts.world, parts.feed.longest())
    with parts.world.accelerator.autocast():
        loss = parts.objective.sums(parts.model, batch)["loss"]
    parts.world.accelerator.backward(loss * 0.0)
    parts.optimizer.zero_grad()


def start(config: RunConfig, config_yaml: str, parts: Parts, done: Counters) -> RunLog:
    """Write that the run is running and return its log.

    Raises BadInput where nothing can be written, or a tracker cannot start. Trackers come last, and are ended where
    something fails after them; what they leave in the folder then lies beside a config that says whose it is.
    """
    folder = config.run.folder
    with starting(folder):
        directory.write_text(folder / "config.yaml", config_yaml)
        run_folder.write_status(folder, "running", code=None, step=done.step)
        try:
            with tracking.opened(config, parts.samples(config.log.sample_text)) as trackers:
                return RunLog(
                    folder,
                    start_step=done.step,
                    total_steps=config.run.steps,
                    every=config.log.every,
                    tensorboard=config.log.tensorboard,
                    trackers=trackers,
                )
        except Exception as error:
            run_folder.write_status(folder, "failed", code=2, step=done.step, reason=str(error))
            raise


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def evaluate_and_log(parts: Parts, log: RunLog | None, step: int, started: float) -> dict[str, float]:
    """Return the held-out metrics after `step` steps, logged on the main rank. Raises NotFinite for NaN or infinity."""
    metrics = evaluate(parts.world, parts.model, parts.objective, parts.feed)
    for name, value in metrics.items():
        if not math.isfinite(value):
            mend = "lower optim.lr" if step else "the model that the run starts from is broken, or a held-out row is"
            raise NotFinite(f"step {step}: the held-out {name} is {value}; {mend}", step=step)
    if log is not None:
        log.evaluation(step, metrics, time.perf_counter() - started)
    return metrics
