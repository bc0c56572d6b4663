"""What a table can teach: the objective that its columns fit, or a refusal that names the columns and the options."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from launch.init.profiles import Column
from serving.directory import BadInput

SETTINGS = {
    "causal_lm": ("text",),
    "sft": ("messages", "prompt", "completion", "context"),
    "classification": ("text", "label"),
}
CHATS = ("messages", "conversations", "conversation", "chat")
TEXTS = ("text", "sentence", "content", "review", "tweet", "comment", "message", "body", "document", "article")
PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "dialogue",
    "article",
    "document",
    "source",
    "input",
    "context",
)
COMPLETIONS = ("completion", "response", "output", "answer", "summary", "target", "continuation", "canonical_solution")
CONTEXTS = ("input", "context", "passage")
LABELS = (
    "label_name",
    "label",
    "labels",
    "class_name",
    "class",
    "category",
    "sentiment",
    "target",
    "topic",
    "intent",
    "emotion",
)
SUFFIXES = ("_label", "_class", "_category", "_sentiment", "_topic", "_intent")

_MOST_CLASSES = 500
_MOST_WEAK_CLASSES = 20  # of a column that is not named like a label
_FILLED = 0.95

# What Trivet does not learn yet, told by its columns: (all of these, one of these) -> what it is.
_NOT_YET = (
    (("tokens",), ("ner_tags", "tags", "pos_tags", "labels"), "labels for single tokens (token classification)"),
    (("chosen", "rejected"), (), "preference pairs (DPO, reward models)"),
    (("choices",), (), "questions with choices"),
    (("question", "context", "answers"), (), "answers marked inside a context (extractive question answering)"),
    (("sentence1", "sentence2"), (), "labels for pairs of texts"),
    (("premise", "hypothesis"), (), "labels for pairs of texts"),
)


@dataclass(frozen=True)
class Wish:
    """What the user asked for: an objective, and columns by the setting that names them."""

    objective: str | None
    columns: dict[str, str]


@dataclass(frozen=True)
class Guess:
    """An objective, the columns it uses by setting, and why these."""

    objective: str
    columns: dict[str, str]
    reason: str


def guess(source: Path, columns: list[Column], wish: Wish) -> Guess:
    """Return what to learn from the columns. Raises BadInput if the wish does not fit them, or nothing does."""
    objective = _objective_of(wish)
    _check_columns(source, columns, wish)
    if objective is None and not wish.columns:
        _refuse_what_is_not_learned_yet(source, columns)
    ways = {"sft": (_chats, _pairs), "classification": (_classes,), "causal_lm": (_texts,)}
    for name in [objective] if objective else list(ways):
        for way in ways[name]:
            if found := way(columns, wish):
                return found
        if objective is None and name == "classification":
            _refuse_a_single_class(source, columns)
    shown = ", ".join(f"{column.name} ({column.type})" for column in columns[:12])
    what = f"{objective} does not fit its columns" if objective else "nothing fits its columns"
    hint = ""
    if len(columns) == 1 and any(mark in columns[0].name for mark in ";\t|"):
        hint = " fields must be separated by commas;"
    raise BadInput(
        f"--from: {source}: {what}: {shown};{hint} name them: --text COLUMN (plain text), --text COLUMN --label COLUMN "
        f"(classes), --prompt COLUMN --completion COLUMN (answers), or --messages COLUMN (chats)"
    )


def _objective_of(wish: Wish) -> str | None:
    """The objective that was asked for, or that the columns asked for imply."""
    if wish.objective is not None and wish.objective not in SETTINGS:
        near = difflib.get_close_matches(wish.objective, SETTINGS, n=1, cutoff=0)[0]
        accepted = ", ".join(SETTINGS)
        raise BadInput(f"--objective: {wish.objective!r} found; did you mean {near}? accepted: {accepted}")
    fitting = [name for name, settings in SETTINGS.items() if set(wish.columns) <= set(settings)]
    if wish.objective is not None and wish.objective not in fitting:
        other = next(name for name in wish.columns if name not in SETTINGS[wish.objective])
        accepted = ", ".join(f"--{name}" for name in SETTINGS[wish.objective])
        raise BadInput(f"--{other}: does not go with --objective {wish.objective}, which takes {accepted}")
    if not fitting:
        raise BadInput(f"--{', --'.join(wish.columns)}: no objective takes all of these; leave some out")
    return wish.objective or (fitting[0] if len(fitting) == 1 else None)


def _check_columns(source: Path, columns: list[Column], wish: Wish) -> None:
    names = [column.name for column in columns]
    for setting, name in wish.columns.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
            raise BadInput(
                f"--{setting}: {source} has no column {name!r}; did you mean {near!r}? it has: {', '.join(names)}"
            )


def _refuse_what_is_not_learned_yet(source: Path, columns: list[Column]) -> None:
    names = {column.name for column in columns}
    for needed, one_of, what in _NOT_YET:
        if names.issuperset(needed) and (not one_of or names.intersection(one_of)):
            raise BadInput(
                f"--from: {source} holds {what}, which is not supported yet; its columns: "
                f"{', '.join(column.name for column in columns)}; name what to learn from instead, "
                f"for example --objective causal_lm --text COLUMN"
            )


def _refuse_a_single_class(source: Path, columns: list[Column]) -> None:
    for column in columns:
        if _label_rank(column) is not None and column.distinct == 1 and _text_column(columns, column.name):
            raise BadInput(
                f"--from: {source}: every row has the same {column.name!r} ({column.example}); at least two "
                f"classes are needed; to learn the plain text: --objective causal_lm"
            )


def _chats(columns: list[Column], wish: Wish) -> Guess | None:
    if wish.columns.keys() & {"prompt", "completion", "context"}:
        return None
    name = wish.columns.get("messages") or _first(CHATS, [column for column in columns if column.type == "chat"])
    return (
        Guess("sft", {"messages": name}, f"`{name}` holds chats; only the assistant's turns are learned")
        if name
        else None
    )


def _pairs(columns: list[Column], wish: Wish) -> Guess | None:
    texts = [column for column in columns if column.is_str and column.type != "empty"]
    completion = wish.columns.get("completion") or _first(
        COMPLETIONS, [each for each in texts if not _names_classes(each)]
    )
    prompts = [each for each in texts if each.name != completion and not _names_classes(each)]
    prompt = wish.columns.get("prompt") or _first(PROMPTS, prompts)
    if not prompt or not completion:
        return None
    found = {"prompt": prompt, "completion": completion}
    others = [each for each in texts if each.name not in found.values()]
    if context := wish.columns.get("context") or _first(CONTEXTS, others):
        found["context"] = context
    middle = f", then `{context}` where it is filled," if context else ""
    return Guess("sft", found, f"`{prompt}`{middle} is what is asked and `{completion}` what is answered")


def _classes(columns: list[Column], wish: Wish) -> Guess | None:
    ranked = [(each.filled_share < _FILLED, rank, each) for each in columns if (rank := _label_rank(each)) is not None]
    named = [each for _, _, each in sorted(ranked, key=lambda item: item[:2]) if _is_label(each)]
    asked = next((each for each in columns if each.name == wish.columns.get("label")), None)
    label = asked or (named[0] if named else None)
    why = f"`{label.name}` names {label.distinct:,} classes" if label else ""
    if label is None:
        few = [each for each in columns if _is_label(each) and _is_weak_label(each)]
        prose = [each for each in columns if each.is_prose]
        if len(few) != 1 or not (len(prose) == 1 or "text" in wish.columns):
            return None
        label = few[0]
        why = f"`{label.name}` is the only column with few values ({label.distinct})"
    numbers = label.name.removesuffix("_name")
    if not asked and numbers != label.name and any(each.name == numbers for each in columns):
        why += f" (preferred to `{numbers}`, so that answers carry names)"
    text = wish.columns.get("text") or _text_column(columns, label.name)
    return (
        Guess("classification", {"text": text, "label": label.name}, f"{why}, `{text}` is the text") if text else None
    )


def _texts(columns: list[Column], wish: Wish) -> Guess | None:
    name = wish.columns.get("text") or _first(TEXTS, [column for column in columns if column.is_str])
    prose = [column for column in columns if column.is_prose]
    if not name and prose and (len(prose) == 1 or wish.objective == "causal_lm"):
        name = max(prose, key=lambda column: column.mean_chars).name
    return Guess("causal_lm", {"text": name}, f"`{name}` is plain text") if name else None


def _text_column(columns: list[Column], label: str) -> str | None:
    """The text that goes with a label: the one with a usual name, else the longest."""
    texts = [column for column in columns if column.is_str and column.name != label]
    prose = [column for column in texts if column.is_prose]
    return _first(TEXTS, texts) or (max(prose, key=lambda column: column.mean_chars).name if prose else None)


def _label_rank(column: Column) -> int | None:
    """How much a column's name sounds like a label: 0 the most, None not at all."""
    name = column.name.lower()
    if name in LABELS:
        return LABELS.index(name)
    return len(LABELS) if name.endswith(SUFFIXES) else None


def _is_label(column: Column) -> bool:
    return column.type in ("text", "whole number") and 2 <= column.distinct <= min(_MOST_CLASSES, column.filled / 2)


def _names_classes(column: Column) -> bool:
    """Whether a column is rather a class than something asked or answered."""
    return _is_label(column) and (column.distinct <= _MOST_WEAK_CLASSES or _label_rank(column) is not None)


def _is_weak_label(column: Column) -> bool:
    few = column.distinct <= min(_MOST_WEAK_CLASSES, column.filled / 10)
    return few and column.filled_share >= _FILLED and not column.is_prose


def _first(names: tuple[str, ...], columns: list[Column]) -> str | None:
    """The column with the first of the names that is there."""
    by_name = {column.name.lower(): column.name for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
