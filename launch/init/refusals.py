"""Tables that init will not guess about: nothing learns what they hold, or only a config of one's own, or their label
cannot be used."""

import shlex
from collections.abc import Collection
from pathlib import Path

from launch.init import labels
from launch.init.column import Column
from serving.directory import BadInput

_TAGS = "objective.type=token_classification, data.tokens and data.tags for the columns, an encoder (configs/tag.yaml)"
_HIDDEN = "objective.type=masked_lm, data.text for the column, an encoder (configs/pretrain_encoder.yaml)"
_PAIRS = "objective.type=classification, data.text={0} and data.text_pair={1} (configs/classify.yaml)"

# What Trivet does not learn yet, told by its columns: (all of these, one of these) -> what it is.
_NOT_YET = (
    (("chosen", "rejected"), (), "preference pairs (DPO, reward models)"),
    (("choices",), (), "questions with choices"),
    (("question", "context", "answers"), (), "answers marked inside a context (extractive question answering)"),
)
# What it learns by a config that init does not write: the same, and how such a config begins.
_BY_HAND = (
    (
        ("tokens",),
        ("ner_tags", "tags", "pos_tags", "labels"),
        "labels for single tokens (token classification)",
        _TAGS,
    ),
    (("sentence1", "sentence2"), (), "labels for pairs of texts", _PAIRS.format("sentence1", "sentence2")),
    (("premise", "hypothesis"), (), "labels for pairs of texts", _PAIRS.format("premise", "hypothesis")),
)
_OBJECTIVES_BY_HAND = {"token_classification": _TAGS, "masked_lm": _HIDDEN}
_PLAIN = "to learn the plain text: --objective causal_lm"


def refuse_objectives_by_hand(objective: str, accepted: str) -> None:
    """Raise BadInput for an objective that can be trained, but that init writes no config for."""
    if how := _OBJECTIVES_BY_HAND.get(objective):
        raise BadInput(
            f"--objective: init writes no config for {objective}, which can be trained: write one with {how}; "
            f"accepted here: {accepted}"
        )


def refuse_what_is_not_learned_yet(source: Path, columns: list[Column]) -> None:
    """Raise BadInput for tables of tasks that have no objective here, or none that init writes a config for."""
    names = {column.name for column in columns}
    for wanted, any_of, what, how in _BY_HAND:
        if names.issuperset(wanted) and (not any_of or names.intersection(any_of)):
            raise BadInput(
                f"--from: {source} holds {what}, for which init writes no config; write one with {how}; or name a "
                "column to learn the text from: --objective causal_lm --text COLUMN"
            )
    for needed, one_of, what in _NOT_YET:
        if names.issuperset(needed) and (not one_of or names.intersection(one_of)):
            raise BadInput(
                f"--from: {source} holds {what}, which is not supported yet; its columns: "
                f"{', '.join(column.name for column in columns)}; name what to learn from instead, "
                f"for example --objective causal_lm --text COLUMN"
            )


def refuse_unusable_labels(source: Path, columns: list[Column], used: Collection[str]) -> None:
    """Raise BadInput where a column is named like a label and is none, or several are labels of 0 and 1.

    Columns that are `used` for something else are passed over.
    Nothing else says that the label is missed: the plain text would be learned.
    """
    for column in labels.named_labels(columns):
        if column.name in used or labels.text_column(columns, column.name) is None:
            continue
        if column.distinct == 1 and column.type not in ("list", "object"):
            raise BadInput(
                f"--from: {source}: every row has the same {column.name!r} ({column.example}); at least two "
                f"classes are needed; {_PLAIN}"
            )
        if why := labels.why_no_label(column):
            anyway = f"to use it as it is: {_label(column)}; " if labels.can_be_asked_for(column) else ""
            raise BadInput(f"--from: {source}: the column {column.name!r} {why}; {anyway}{_PLAIN}")
    several = labels.several_labels([column for column in columns if column.name not in used])
    if several and any(column.is_prose for column in columns):
        names = ", ".join(repr(column.name) for column in several)
        raise BadInput(
            f"--from: {source}: {names} hold 0 and 1: several labels in a row, for which init writes no config; put "
            f"their names into one column of lists and set objective.problem=multi_label; "
            f"to learn one of them: {_label(several[0])}; {_PLAIN}"
        )


def _label(column: Column) -> str:
    return f"--label {shlex.quote(column.name)}"
