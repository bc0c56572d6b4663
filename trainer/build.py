"""What a run is made of: everything between a validated config and step 0, on every rank alike."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from trainer import (
    compute,
    distributed,
    handshake,
    hub,
    leaks,
    model_dir,
    model_fit,
    model_folder,
    models,
    resident,
    tracking,
)
from trainer.config import PretrainedModel, PretrainedTokenizer, RunConfig
from trainer.dataset import Data, make_feed, prepare_data
from trainer.distributed import World
from trainer.feed import Feed
from trainer.metrics import Terminal
from trainer.modes import micro_rows
from trainer.objectives import Objective
from trainer.optim import build_optimizer
from trainer.splits import Splits
from trainer.strategies import STRATEGIES, check_world, tell_learning, tell_tied
from trainer.watchdog import Watchdog


@dataclass
class Parts:
    """What a run is made of, built once before step 0."""

    world: World
    splits: Splits
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    feed: Feed
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    fingerprints: dict[str, str]  # of what must be the same when the run goes on
    outline: torch.nn.Module  # the whole model on the meta device, however the ranks divide it
    program_bytes: int = 0  # of memory, taken before the data and the model were there
    planned_bytes: int | None = None  # at most, beyond that; None where nobody knows
    left_out: Callable[[], list[str]] = list  # says which rows of a stream, as far as it was read, nothing learns from

    def samples(self, count: int) -> list[str]:
        """Return the text of so many held-out examples, as the model reads them."""
        examples = itertools.chain.from_iterable(self.feed.held_out)
        return [self.tokenizer.decode(example.input_ids) for example in itertools.islice(examples, count)]


def build(config: RunConfig, watchdog: Watchdog | None = None) -> Parts:
    """Return everything a run needs, on all ranks that `watchdog` watches. Raises BadInput for what cannot work."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its warnings of retries hold the address, and a mirror's may hold a password
    tracking.check(config.log)
    world = distributed.start(config, watchdog)
    program_bytes = 0 if world.accelerator.device.type == "cuda" else resident.now_bytes()
    check_world(config.strategy, world.mode)
    micro = micro_rows(config, world.size)
    if world.is_main:
        for warning in model_folder.remote_code_warnings(config):
            Terminal.say_once(warning)
    if isinstance(config.model, PretrainedModel):
        hub.check_reachable(config.model.path, "model.path")
        model_dir.refuse_unmerged(config.model.path)
        model_folder.check_base(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if isinstance(config.tokenizer, PretrainedTokenizer) and config.tokenizer.path is not None:
        hub.check_reachable(config.tokenizer.path, "tokenizer.path")
    data = prepare_data(config)
    objective, tokenizer = data.objective, data.tokenizer
    model = plain_model(config, objective, tokenizer)
    outline = outline_of(model)
    without = [*tell_tied(model, config.strategy), *objective.try_out(model, config.batch.max_length)]
    compute.set_up(model, config.batch)
    feed = make_feed(config, data, world)
    fingerprints = take_fingerprints(config, data)
    brief = {name: value[:12] for name, value in fingerprints.items()}
    handshake.agree(world.watchdog, "data", brief, "give every machine the same files")
    # Whether rows can be packed was tried out here, with numbers that other processors may round otherwise.
    batches = {"packed rows": objective.packs, "rows of batches": len(feed.train)}
    handshake.agree(world.watchdog, "batches", batches, "let all ranks run on processors of one kind")
    optimizer = build_optimizer(model, config.optim, fused=world.mode != "deepspeed")
    if world.is_main:
        found = [*data.cut(config), *([f"leaks: {leaks.tell(data.splits.leaks)}"] if data.splits.leaks else [])]
        for line in [*data.left_out(config), *found, describe(config, world, model, data, feed), *without]:
            Terminal.say_once(line)
    model, optimizer = distributed.prepare(world, model, optimizer, config, micro_rows=micro)
    left_out = functools.partial(data.left_out, config) if data.splits.streaming else list
    return Parts(
        world, data.splits, objective, tokenizer, feed, model, optimizer, fingerprints, outline,
        program_bytes=program_bytes, left_out=left_out,
    )  # fmt: skip


def plain_model(config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """Return the model with its strategy as every run starts with it, the same each time, in no mode yet."""
    torch.manual_seed(config.run.seed)
    model = models.build_model(
        config.model, tokenizer, objective.head, objective.labels, problem_type=objective.problem_type
    )
    model_fit.check_length(model, tokenizer, config.batch.max_length)
    return STRATEGIES[config.strategy.type](model, config.strategy).train()


def outline_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the model on the meta device: its shapes, and what learns, without its numbers."""
    instead: dict[int, Any] = {}
    for parameter in model.parameters():
        instead[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    instead |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, instead)


def take_fingerprints(config: RunConfig, data: Data) -> dict[str, str]:
    """Return hashes of the data, the tokenizer, and the base model: of one from the hub its commit."""
    found = data.fingerprints(config)
    if isinstance(config.model, PretrainedModel) and (base := model_folder.fingerprint(config.model.path)) is not None:
        found["base model"] = base
    return found


def describe(config: RunConfig, world: World, model: torch.nn.Module, data: Data, feed: Feed) -> str:
    """Return a line that says what is about to be trained."""
    return (
        f"{config.run.name}: {config.objective.type}, {config.strategy.type}: {tell_learning(model)}; "
        f"{data.sizes(feed)}; {world.name}, {world.size} process{'es' if world.size > 1 else ''}"
    )
