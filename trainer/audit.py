"""What the loss mask of a run does, in numbers, and what is wrong with it.

The faults it looks for are silent: such a run goes well, and its model never stops, or has learned the questions.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer import cache
from trainer.columns import chat_of
from trainer.objectives import Objective
from trainer.packing import IGNORED, Batch, Example, Row
from trainer.rows import Rows

MOST_ROWS = 20_000  # looked at for the counts: those of a longer data set are of its first rows

_PART = 1000
_TOLD_ROWS = 1000  # looked at where a run starts, so that it hardly takes time
_WORTH_SAYING = 0.01  # of all tokens
_UNCUT_TOKENS = 10**6  # longer than any example, and a length that tokenizers take


class MaskFault(BadInput):
    """A loss mask that cannot be meant."""


@dataclass
class Examples:
    """What became of the rows of the data. Lengths are compared with the same rows at no limit."""

    data_rows: int = 0
    examples: int = 0
    longer: int = 0  # than batch.max_length, before they were cut
    tokens_before: int = 0
    tokens: int = 0
    lost: int = 0  # examples of which no token to learn is left
    all_learned: int = 0  # examples without any token that is only read
    ends_before: int = 0  # examples that learned to stop, before they were cut
    ends: int = 0
    turns: Counter[str] = field(default_factory=Counter)  # of chats, by role
    dropped: Counter[str] = field(default_factory=Counter)  # turns whose text the chat template leaves out

    @property
    def are_cut(self) -> bool:
        """Whether what is too long loses its rest; language modelling goes on in another example."""
        return self.tokens < self.tokens_before


@dataclass
class Batches:
    """What whole batches hold: `slots` are all places of their tensors, `room` what full rows would hold."""

    rows: int = 0
    tokens: int = 0
    slots: int = 0
    room: int = 0
    learned: int = 0
    ends: int = 0
    learned_by_examples: int = 0  # what the examples of these rows ask to be learned
    ends_by_examples: int = 0

    def __add__(self, other: "Batches") -> "Batches":
        return Batches(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Batches)))


def generates(objective: Objective) -> bool:
    """Whether each token is learned from those before it, so that a model must learn to stop."""
    return objective.head == "AutoModelForCausalLM"


def count_examples(
    objective: Objective, data_rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    """Return the counts of the first MOST_ROWS rows."""
    found, end = Examples(), tokenizer.eos_token_id
    for part in _parts(itertools.islice(data_rows, MOST_ROWS)):
        whole = objective.encode(part, tokenizer, _UNCUT_TOKENS, found.data_rows)
        examples = objective.encode(part, tokenizer, max_length, found.data_rows)
        found.data_rows += len(part)
        found.examples += len(examples)
        found.longer += sum(len(example.input_ids) > max_length for example in whole)
        found.tokens_before += sum(len(example.input_ids) for example in whole)
        found.tokens += sum(len(example.input_ids) for example in examples)
        found.lost += max(0, sum(map(_num_learned, whole)) and _num_learning(whole) - _num_learning(examples))
        found.all_learned += sum(bool((example.targets != IGNORED).all()) for example in examples)
        found.ends_before += sum(bool((example.targets == end).any()) for example in whole)
        found.ends += sum(bool((example.targets == end).any()) for example in examples)
        if objective.section.type == "sft":
            _count_turns(found, objective, part, tokenizer)
    return found


def count_batch(batch: Batch, rows: list[Row], max_length: int, end_id: int) -> Batches:
    """Return the counts of a batch that was made of `rows`."""
    examples = [example for row in rows for example in row]
    return Batches(
        rows=len(rows),
        tokens=sum(len(example.input_ids) for example in examples),
        slots=batch["input_ids"].numel(),
        room=len(rows) * max_length,
        learned=int((batch["targets"] != IGNORED).sum()),
        ends=int((batch["targets"] == end_id).sum()),
        learned_by_examples=sum(map(_num_learned, examples)),
        ends_by_examples=sum(int((example.targets == end_id).sum()) for example in examples),
    )


def tell_cut(
    objective: Objective, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, about: dict[str, Any]
) -> list[str]:
    """Say in a line how many of the first rows' examples are cut, where more than a hundredth of their tokens is lost.

    Kept in the cache; `about` says what else shapes the examples.
    """

    def count() -> list[int]:
        found = count_examples(objective, itertools.islice(rows, _TOLD_ROWS), tokenizer, max_length)
        return [found.data_rows, found.longer, found.tokens_before, found.tokens]

    key = cache.key_of(cut=_TOLD_ROWS, rows=rows.fingerprint, labels=objective.labels, max_length=max_length, **about)
    num_rows, longer, before, after = cache.fact(key, count)
    if before - after <= _WORTH_SAYING * before:
        return []
    return [
        f"cut: {longer:,} examples of {'the first ' if num_rows == _TOLD_ROWS else ''}{num_rows:,} training rows are "
        f"longer than batch.max_length {max_length}: {1 - after / before:.1%} of all tokens are lost; raise it to keep "
        "them"
    ]


def check(objective: Objective, examples: Examples, batches: Batches, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise MaskFault where nothing is learned, or everything of a chat, or the stop token never is."""
    if not batches.learned:
        raise MaskFault(
            f"objective.type: no token of {batches.rows:,} rows carries loss, so nothing can be learned; look at the "
            "chat template and at the data, or raise batch.max_length"
        )
    if not generates(objective):
        return
    end = tokenizer.eos_token
    for role, dropped in examples.dropped.items():
        if dropped == examples.turns[role]:
            raise MaskFault(
                f"tokenizer.chat_template: leaves out what the {role} says: none of {dropped:,} such turns is in the "
                "text that the model reads; use a template that shows it, or data without it"
            )
    if objective.section.type == "sft" and examples.all_learned == examples.examples:
        raise MaskFault(
            "tokenizer.chat_template: nothing is masked: every token of every chat is learned, none is a question "
            "that is only read; use a template that shows the user's turns"
        )
    if objective.section.type == "sft" and batches.learned == batches.ends:
        raise MaskFault(
            f"data: the assistant says nothing in {batches.rows:,} rows: only the stop token {end!r} is learned, and "
            "the model would be silent; look at the answers, or leave empty ones out with data.skip_bad_rows=true"
        )
    if batches.learned > batches.learned_by_examples:
        raise MaskFault(
            f"objective.type: nothing is masked in the batches: they learn {batches.learned:,} tokens where the "
            f"examples ask for {batches.learned_by_examples:,}; mend the objective's collate"
        )
    if not examples.ends and examples.ends_before:
        raise MaskFault(
            f"batch.max_length: the stop token {end!r} is never learned: every example is cut before it; raise it"
        )
    if not examples.ends or (batches.ends_by_examples and not batches.ends):
        raise MaskFault(
            f"tokenizer: the stop token {end!r} (eos_token) is never learned, so the model would never stop; let the "
            "chat template end each turn of the assistant with it"
        )


def remarks(objective: Objective, examples: Examples, max_length: int) -> list[str]:
    """Return a line for each thing that is not wrong in all of the data, but in some of it."""
    said = []
    if examples.lost:
        said.append(
            f"{examples.lost:,} of {examples.examples + examples.lost:,} examples are cut to nothing by "
            f"batch.max_length {max_length} and left out: no token to learn is within it; raise it to keep them"
        )
    if examples.longer and examples.are_cut:
        share = 1 - examples.tokens / examples.tokens_before
        said.append(
            f"{examples.longer:,} examples are longer than batch.max_length {max_length} and cut: {share:.1%} of all "
            "tokens are lost; raise it to keep them"
        )
    if generates(objective) and examples.are_cut and examples.ends < examples.examples:
        said.append(f"{examples.examples - examples.ends:,} examples are cut before their stop token")
    for role, dropped in examples.dropped.items():
        if dropped:
            said.append(f"the chat template leaves out {dropped:,} of {examples.turns[role]:,} turns of the {role}")
    if objective.section.type == "sft" and examples.all_learned:
        said.append(f"{examples.all_learned:,} chats are learned whole: nothing in them is only read")
    return said


def _count_turns(
    found: Examples, objective: Objective, part: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    for index, row in enumerate(part):
        messages = chat_of(row, index, objective.columns)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for turn in messages:
            found.turns[turn["role"]] += 1
            found.dropped[turn["role"]] += turn["content"].strip() not in text


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while part := list(itertools.islice(rows, _PART)):
        yield part


def _num_learned(example: Example) -> int:
    return int((example.targets != IGNORED).sum())


def _num_learning(examples: list[Example]) -> int:
    return sum(_num_learned(example) > 0 for example in examples)
