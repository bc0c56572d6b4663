"""What a table can teach: the objective that its columns fit, or a refusal that names the columns and the options."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from launch.init import labels, refusals
from launch.init.column import Column
from launch.init.labels import TEXTS, first, text_column
from serving.directory import BadInput

SETTINGS = {
    "causal_lm": ("text",),
    "sft": ("messages", "prompt", "completion", "context"),
    "classification": ("text", "label"),
}
CHATS = ("messages", "conversations", "conversation", "chat")
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
COMPLETIONS = (
    "completion",
    "response",
    "output",
    "answer",
    "summary",
    "highlights",
    "target",
    "continuation",
    "canonical_solution",
)
CONTEXTS = ("input", "context", "passage")


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
    is_weak: bool = False  # nothing but its few values says that the label is one


def guess(source: Path, columns: list[Column], wish: Wish) -> Guess:
    """Return what to learn from the columns. Raises BadInput if the wish does not fit them, or nothing does."""
    objective = _objective_of(wish)
    _check_columns(source, columns, wish)
    if objective is None and not wish.columns:
        refusals.refuse_what_is_not_learned_yet(source, columns)
    ways = {"sft": (_chats, _pairs), "classification": (_named_classes, _weak_classes), "causal_lm": (_texts,)}
    for name in [objective] if objective else list(ways):
        for way in ways[name]:
            if way is _weak_classes and "label" not in wish.columns:
                refusals.refuse_unusable_labels(source, columns, wish.columns.values())
            if found := way(columns, wish):
                return found
    shown = ", ".join(f"{column.name} ({column.type})" for column in columns[:12])
    what = f"{objective} does not fit its columns" if objective else "nothing fits its columns"
    nested = any(column.type in ("object", "list") for column in columns)
    hint = " nested values must be flattened to columns of their own first;" if nested else ""
    raise BadInput(
        f"--from: {source}: {what}: {shown};{hint} name them: --text COLUMN (plain text), --text COLUMN --label COLUMN "
        f"(classes), --prompt COLUMN --completion COLUMN (answers), or --messages COLUMN (chats)"
    )


def _objective_of(wish: Wish) -> str | None:
    """The objective that was asked for, or that the columns asked for imply."""
    if wish.objective is not None and wish.objective not in SETTINGS:
        near = difflib.get_close_matches(wish.objective, SETTINGS, n=1, cutoff=0)[0]
        accepted = ", ".join(SETTINGS)
        refusals.refuse_objectives_by_hand(wish.objective, accepted)
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
        if twice := [other for other, column in wish.columns.items() if column == name and other != setting]:
            raise BadInput(f"--{setting}, --{twice[0]}: both name the column {name!r}; a column has one use")


def _chats(columns: list[Column], wish: Wish) -> Guess | None:
    if wish.columns.keys() & {"prompt", "completion", "context"}:
        return None
    name = wish.columns.get("messages") or first(CHATS, [column for column in columns if column.type == "chat"])
    return (
        Guess("sft", {"messages": name}, f"`{name}` holds chats; only the assistant's turns are learned")
        if name
        else None
    )


def _pairs(columns: list[Column], wish: Wish) -> Guess | None:
    asked = set(wish.columns.values())
    texts = [
        each
        for each in columns
        if each.is_str and each.type != "empty" and each.name not in asked and not labels.names_classes(each)
    ]
    completion = wish.columns.get("completion") or first(COMPLETIONS, texts)
    prompt = wish.columns.get("prompt") or first(PROMPTS, [each for each in texts if each.name != completion])
    if not prompt or not completion:
        return None
    found = {"prompt": prompt, "completion": completion}
    others = [
        each for each in columns if each.is_str and each.type != "empty" and each.name not in {*asked, *found.values()}
    ]
    if context := wish.columns.get("context") or first(CONTEXTS, others):
        found["context"] = context
    middle = f", then `{context}` where it is filled," if context else ""
    return Guess("sft", found, f"`{prompt}`{middle} is what is asked and `{completion}` what is answered")


def _named_classes(columns: list[Column], wish: Wish) -> Guess | None:
    """By a label that was asked for, or is named like one."""
    asked = next((each for each in columns if each.name == wish.columns.get("label")), None)
    named = [
        each
        for each in labels.named_labels(columns)
        if labels.is_label(each) and each.name not in wish.columns.values()
    ]
    label = asked or (named[0] if named else None)
    if label is None:
        return None
    why = f"`{label.name}` names {label.distinct:,} classes"
    numbers = label.name.removesuffix("_name")
    if not asked and numbers != label.name and any(each.name == numbers for each in columns):
        why += f" (preferred to `{numbers}`, so that answers carry names)"
    return _classes(columns, wish, label, why)


def _weak_classes(columns: list[Column], wish: Wish) -> Guess | None:
    """By the only column with few values, where a text is clear."""
    few = [each for each in columns if labels.is_weak_label(each) and each.name not in wish.columns.values()]
    prose = [each for each in columns if each.is_prose]
    if len(few) != 1 or not (len(prose) == 1 or "text" in wish.columns):
        return None
    why = f"`{few[0].name}` is the only column with few values ({few[0].distinct})"
    return _classes(columns, wish, few[0], why, is_weak=True)


def _classes(columns: list[Column], wish: Wish, label: Column, why: str, *, is_weak: bool = False) -> Guess | None:
    text = wish.columns.get("text") or text_column(columns, label.name)
    if text is None:
        return None
    return Guess("classification", {"text": text, "label": label.name}, f"{why}, `{text}` is the text", is_weak)


def _texts(columns: list[Column], wish: Wish) -> Guess | None:
    name = wish.columns.get("text") or first(TEXTS, [column for column in columns if column.is_str])
    prose = [column for column in columns if column.is_prose]
    if not name and prose and (len(prose) == 1 or wish.objective == "causal_lm"):
        name = max(prose, key=lambda column: column.mean_chars).name
    return Guess("causal_lm", {"text": name}, f"`{name}` is plain text") if name else None
