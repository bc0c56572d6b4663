"""What a run is made of: everything between a validated config and step 0, on every rank alike."""

import hashlib
import itertools
from dataclasses import dataclass

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from trainer import distributed, hub, models, tracking
from trainer.config import NewModel, PretrainedModel, PretrainedTokenizer, RunConfig, TrainedTokenizer
from trainer.distributed import World
from trainer.feed import Feed, micro_rows
from trainer.metrics import Terminal
from trainer.objectives import OBJECTIVES, Objective
from trainer.optim import build_optimizer
from trainer.packing import Row, pack
from trainer.sources import DataError, Splits, read_splits, tell_left_out
from trainer.strategies import STRATEGIES, count_parameters
from trainer.tokenizers import load_tokenizer, train_tokenizer


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

    def samples(self, count: int) -> list[str]:
        """Return the text of so many held-out examples, as the model reads them."""
        examples = itertools.chain.from_iterable(self.feed.held_out)
        return [self.tokenizer.decode(example.input_ids) for example in itertools.islice(examples, count)]


def build(config: RunConfig) -> Parts:
    """Return everything a run needs. Raises BadInput for data, model or batch that cannot work."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # its warnings of retries hold the address, and a mirror's may hold a password
    tracking.check(config.log)
    world = distributed.start(config)
    micro = micro_rows(config, world.size)
    if isinstance(config.model, PretrainedModel):
        hub.check_reachable(config.model.path, "model.path")
        models.check_folder(config.model.path)
    if isinstance(config.tokenizer, PretrainedTokenizer) and config.tokenizer.path is not None:
        hub.check_reachable(config.tokenizer.path, "tokenizer.path")
    splits = read_splits(config.data, config.objective.type)
    objective = OBJECTIVES[config.objective.type](config.objective, config.data, splits.train)
    tokenizer = build_tokenizer(config, objective, splits)
    length = config.batch.max_length
    train_rows = make_rows(objective, splits.train, tokenizer, length)
    held_out_rows = make_rows(objective, splits.held_out, tokenizer, length)
    feed = Feed(
        config, objective, train_rows, held_out_rows,
        pad_id=tokenizer.pad_token_id, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    fingerprints = take_fingerprints(config, tokenizer, splits)
    torch.manual_seed(config.run.seed)
    model = models.build_model(config.model, tokenizer, objective.head, objective.labels)
    models.check_length(model, length)
    model = STRATEGIES[config.strategy.type](model, config.strategy).train()
    optimizer = build_optimizer(model, config.optim, fused=world.mode != "deepspeed")
    if world.is_main:
        if splits.left_out:
            Terminal.say_once(tell_left_out(splits))
        Terminal.say_once(describe(config, world, model, splits, num_rows=len(train_rows)))
    model, optimizer = distributed.prepare(world, model, optimizer, config, micro_rows=micro)
    return Parts(world, splits, objective, tokenizer, feed, model, optimizer, fingerprints)


def make_rows(objective: Objective, rows: list, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return the rows that batches are made of. Raises DataError where nothing can be learned from."""
    examples = objective.encode(rows, tokenizer, max_length)
    if not examples:
        raise DataError(objective.nothing_left(len(rows), max_length))
    return pack(examples, max_length) if objective.packs else [[example] for example in examples]


def build_tokenizer(config: RunConfig, objective: Objective, splits: Splits) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer: trained on its own training text, or loaded."""
    tokenizer, model = config.tokenizer, config.model
    if isinstance(tokenizer, TrainedTokenizer) and isinstance(model, NewModel):
        return train_tokenizer(objective.texts(splits.train), tokenizer.vocab_size, model.context_length)
    assert isinstance(tokenizer, PretrainedTokenizer), "the config lets only a new model train its tokenizer"
    path = tokenizer.path
    if path is None:
        assert isinstance(model, PretrainedModel), "the config lets no new model be without a tokenizer"
        path = model.path
    return load_tokenizer(path, tokenizer.chat_template)


def take_fingerprints(config: RunConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> dict[str, str]:
    """Return hashes of the data, the tokenizer, and a base model that lies in a folder."""
    described = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    found = {"data": splits.fingerprint, "tokenizer": hashlib.sha256(described.encode()).hexdigest()}
    if isinstance(config.model, PretrainedModel) and (base := models.fingerprint(config.model.path)) is not None:
        found["base model"] = base
    return found


def describe(config: RunConfig, world: World, model: torch.nn.Module, splits: Splits, *, num_rows: int) -> str:
    """Return a line that says what is about to be trained."""
    learning, total = count_parameters(model)
    return (
        f"{config.run.name}: {config.objective.type}, {config.strategy.type}: {learning:,} of {total:,} weights learn; "
        f"{len(splits.train):,} training and {len(splits.held_out):,} held-out examples, {num_rows:,} rows; "
        f"{world.mode}, {world.size} process{'es' if world.size > 1 else ''}"
    )
