"""The training loop: from a validated config to a finished run folder. Every mode and strategy goes through here."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from serving import directory
from trainer import (
    disk_space,
    distributed,
    early_stop,
    handshake,
    leaks,
    order,
    out_of_memory,
    profile,
    run_folder,
    samples,
    tracking,
)
from trainer.build import Parts, build
from trainer.checkpoint import Counters
from trainer.config import RunConfig
from trainer.distributed import NotFinite
from trainer.evaluate import Metrics, evaluate, to_device
from trainer.flops import flops_per_token
from trainer.guards import StopRequest, failed, starting
from trainer.metrics import RunLog, Terminal, peak_memory_bytes
from trainer.optim import learning_rate
from trainer.plan import glibc
from trainer.plan.of_run import own_mode, planned
from trainer.plan.plan import Plan
from trainer.progress import finish, is_best, leave, save, save_before_model
from trainer.resume import resume
from trainer.skipped import step_or_skip
from trainer.strategies import unfreeze


def train(config: RunConfig, config_yaml: str, stop: StopRequest | None = None) -> int:
    """Train one run from its newest checkpoint, or from the start; return 0 when done, 75 when stopped after a save.

    `config_yaml` is the resolved config, saved with the run; `stop` hears signals already, if given. Raises BadInput
    for what the user can mend, before step 0.
    """
    folder = config.run.folder
    with nullcontext(stop) if stop else StopRequest() as stop, handshake.met(config) as watchdog:
        with out_of_memory.while_building(config):
            parts = build(config, watchdog)
        is_main, device = parts.world.is_main, parts.world.accelerator.device
        plan = check_memory(config, parts, mode=own_mode(parts.world), world_size=parts.world.size)
        if is_main:
            check_disk(config, parts)
            parts.planned_bytes = None if plan is None else glibc.taken_bytes(plan)
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
    world, model, feed = parts.world, parts.model, parts.feed
    started, saved_step = time.perf_counter() - done.elapsed_s, done.step
    metrics = Metrics()
    if world.any(bool(stop.signal_name)):  # while the run was being built
        return leave(config, world, done, stop, log)
    if done.step == 0:
        done, _ = evaluate_and_log(config, parts, log, done, started)
    with profile.window(config, log) as profiled:
        for step in range(done.step, config.run.steps):
            if reason := early_stop.reason(config.evaluation, done.scores, parts.objective.score[1]):
                if log is not None:
                    log.say(reason)
                break
            profiled(step)
            if (joined := unfreeze(world.accelerator.unwrap_model(model), step)) and log is not None:
                log.say(f"step {step}: {joined:,} more weights learn from here on")
            step_started, data_wait_s, metrics = time.perf_counter(), 0.0, Metrics()
            # Ranks hold different numbers of targets, so divide by the global count: a mean of means is biased.
            count = feed.count_at(step)
            loss_sum = torch.zeros((), device=world.accelerator.device)
            batches = feed.micro_batches(step)
            for i in range(feed.accumulation):
                world.at("data", step + 1)
                asked = time.perf_counter()
                batch = to_device(world, next(batches))
                data_wait_s += time.perf_counter() - asked
                is_last = i == feed.accumulation - 1
                torch.manual_seed(order.dropout_seed(config.run.seed, step, i, world.rank))
                world.at("forward")
                with distributed.accumulating(world, model, is_last=is_last):
                    with world.autocast():
                        loss = parts.objective.sums(model, batch)["loss"]
                    # Gradients are averaged over ranks, so the sum over all targets is size * mean.
                    scale = world.size / (count or 1)
                    world.at("backward")
                    distributed.backward(world, model, loss * scale, accumulation=feed.accumulation, is_last=is_last)
                loss_sum += loss.detach()
            world.at("update")
            total_loss, stops = world.sum([float(loss_sum), bool(stop.signal_name)])
            lr = learning_rate(step, config.optim, config.run.steps)
            done = step_or_skip(config, parts, log, done, loss=total_loss, learning_rate=lr)
            tokens, now = feed.tokens_at(step), time.perf_counter()
            done = replace(done, step=step + 1, total_tokens=done.total_tokens + tokens, elapsed_s=now - started)
            if log is not None and not done.skipped_in_a_row:
                log.train(
                    done.step, loss=total_loss / (count or 1), lr=lr, grad_norm=done.last_norm, tokens=tokens,
                    total_tokens=done.total_tokens, tokens_per_s=tokens / (now - step_started),
                    data_wait_s=data_wait_s, memory_bytes=peak_memory_bytes(), elapsed_s=done.elapsed_s,
                )  # fmt: skip
            if is_due(done.step, config.evaluation.every) and done.step < config.run.steps:
                done, metrics = evaluate_and_log(config, parts, log, done, started)
            if stops or is_due(done.step, config.checkpoint.every) or is_best(config, parts, done):
                save(config, parts, done)
                saved_step = done.step
            if stops and done.step < config.run.steps:
                return leave(config, world, done, stop, log)
    if not metrics:
        done, metrics = evaluate_and_log(config, parts, log, done, started)
    if saved_step < done.step:
        save_before_model(config, parts, done)
    finish(config, parts, done, metrics)
    return 0


def check_memory(
    config: RunConfig, parts: Parts, *, mode: str, world_size: int, nproc: int | None = None
) -> Plan | None:
    """Return how much memory a rank needs; say so where it may be more than there is.

    `nproc` of the ranks share this machine's memory, where no launcher says how many. None where the model is of a kind
    that cannot be planned. Raises OutOfMemory where it certainly is too much.
    """
    plan = planned(config, parts, mode=mode, world_size=world_size)
    if plan is None:
        return None
    device = parts.world.accelerator.device
    warning = out_of_memory.refuse_what_cannot_fit(plan, config, device, nproc=nproc or world_size)
    if warning and parts.world.is_main:
        Terminal.say_once(warning)
    return plan


def check_disk(config: RunConfig, parts: Parts) -> None:
    """Say so where the disk may have no room for what the run will write. Raises BadInput where the model has none."""
    if warning := disk_space.check(config, parts.outline):
        Terminal.say_once(warning)


def rehearse(parts: Parts) -> None:
    """Run the longest batch forward and back once, so that running out of memory shows before step 0."""
    if parts.world.mode == "deepspeed":
        return  # its engine counts every backward pass as part of a step
    batch = to_device(parts.world, parts.feed.longest())
    with parts.world.autocast():
        loss = parts.objective.sums(parts.model, batch)["loss"]
    (loss * 0.0).backward()
    parts.optimizer.zero_grad()


def count_flops(parts: Parts) -> float | None:
    """Return how much arithmetic a token takes, on the main rank alone.

    None under DeepSpeed, where each backward pass is part of a step, and where no rank can run the model alone.
    """
    world = parts.world
    if world.mode == "deepspeed" or world.lockstep:
        return None
    row = to_device(world, parts.feed.longest(1))
    return flops_per_token(world.accelerator.unwrap_model(parts.model), parts.objective, row, world.autocast)


def start(config: RunConfig, config_yaml: str, parts: Parts, done: Counters) -> RunLog:
    """Write that the run is running and return its log.

    Raises BadInput where nothing can be written, or a tracker cannot start. Trackers come last, and are ended where
    something fails after them; what they leave in the folder then lies beside a config that says whose it is.
    """
    folder = config.run.folder
    with starting(folder):
        directory.write_text(folder / "config.yaml", config_yaml)
        run_folder.write_status(folder, "running", code=None, step=done.step)
        if parts.splits.leaks is not None:
            leaks.write(folder, parts.splits.leaks)
        try:
            with tracking.opened(config, parts.samples(config.log.sample_text)) as trackers:
                return RunLog(
                    folder,
                    start_step=done.step,
                    total_steps=config.run.steps,
                    every=config.log.every,
                    tensorboard=config.log.tensorboard,
                    trackers=trackers,
                    is_over=bool(early_stop.reason(config.evaluation, done.scores, parts.objective.score[1])),
                    flops_per_token=count_flops(parts),
                )
        except Exception as error:
            run_folder.write_status(folder, "failed", code=2, step=done.step, reason=str(error))
            raise


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def evaluate_and_log(
    config: RunConfig, parts: Parts, log: RunLog | None, done: Counters, started: float
) -> tuple[Counters, Metrics]:
    """Return the counters with the score, and the held-out metrics, which are logged on the main rank, with samples.

    Raises NotFinite for NaN or infinity.
    """
    step = done.step
    metrics = evaluate(parts.world, parts.model, parts.objective, parts.feed)
    for name, value in metrics.items():
        if not math.isfinite(value):
            mend = "lower optim.lr" if step else "the model that the run starts from is broken, or a held-out row is"
            raise NotFinite(f"step {step}: the held-out {name} is {value}; {mend}", step=step)
    if log is not None:
        log.evaluation(step, metrics, time.perf_counter() - started)
    if config.evaluation.samples and (log is not None or parts.world.lockstep):
        for line in samples.write(config, parts, step):
            if log is not None:
                log.say(line)
    scores = {**done.scores, str(step): metrics[parts.objective.score[0]]} if step else {}
    return replace(done, scores=scores), metrics
