"""Which columns of a table are labels, by name or by their few values, and which text goes with one."""

import re

from launch.init.column import Column

TEXTS = ("text", "sentence", "content", "review", "tweet", "comment", "message", "body", "document", "article")
LABELS = (
    "label_name",
    "label",
    "labels",
    "label_id",
    "class_name",
    "class",
    "class_id",
    "category",
    "category_id",
    "sentiment",
    "target",
    "topic",
    "intent",
    "emotion",
)
SUFFIXES = ("_label", "_class", "_category", "_sentiment", "_topic", "_intent")

# Last words of names whose columns may hold few values and still are no label, unless the user says so.
_NO_LABELS = re.compile(
    "ids?|idx|index|uuid|guid|row|line|number|split|fold|source|origin|file|filename|path|url|link|page|license|date|"
    "time|timestamp|year|month|day|created|updated|lang|language|locale|version|unnamed"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of snake_case and camelCase

NUMBERS = "to learn numbers, set objective.problem=regression in a config of your own"

_MOST_CLASSES = 500
_MOST_WEAK_CLASSES = 20  # of a column that is not named like a label
_MOST_FRACTIONS = 20  # different numbers that training takes for classes
_FILLED = 0.95


def named_labels(columns: list[Column]) -> list[Column]:
    """Return the columns that are named like a label, usable or not, the likeliest first."""
    ranked = [(each.filled_share < _FILLED, rank, each) for each in columns if (rank := label_rank(each)) is not None]
    return [each for _, _, each in sorted(ranked, key=lambda item: item[:2])]


def label_rank(column: Column) -> int | None:
    """Return how much a column's name sounds like a label: 0 the most, None not at all."""
    name = column.name.lower()
    if name in LABELS:
        return LABELS.index(name)
    return len(LABELS) if name.endswith(SUFFIXES) else None


def is_label(column: Column) -> bool:
    """Return whether the values can be classes: names or whole numbers, not too many, each more than once."""
    return why_no_label(column) is None


def why_no_label(column: Column) -> str | None:
    """Return what about the values speaks against classes; None if nothing does."""
    match column.type:
        case "empty":
            return "is empty"
        case "list":
            return "holds lists, for which init writes no config: set objective.problem=multi_label in one of your own"
        case "object" | "chat":
            return "holds nested values, which must be flattened to columns first"
        case "mixed":
            return "holds values of several types"
        case "number":
            return f"holds numbers with fractions, such as {column.example}; {NUMBERS}"
    numbers = f"; {NUMBERS}" if column.type == "whole number" else ""
    if column.distinct < 2:
        return f"has one value only ({column.example})"
    if column.distinct > _MOST_CLASSES:
        return f"has {column.distinct:,} different values, more than {_MOST_CLASSES}{numbers}"
    if column.distinct > column.filled / 2:
        return (
            f"has {column.distinct:,} different values in {column.filled:,} rows, fewer than two rows for each{numbers}"
        )
    return None


def can_be_asked_for(column: Column) -> bool:
    """Return whether training takes the column as a label where the user insists."""
    if column.type == "number":
        return column.is_str and column.distinct <= _MOST_FRACTIONS
    return column.type in ("text", "whole number", "true or false", "mixed") and column.distinct > 1


def is_weak_label(column: Column) -> bool:
    """Return whether a column may be a label though its name does not say so."""
    words = [word.lower() for word in _WORD.findall(column.name)]
    if not column.name or (words and _NO_LABELS.fullmatch(words[-1])) or not is_label(column):
        return False
    few = column.distinct <= min(_MOST_WEAK_CLASSES, column.filled / 10)
    return few and column.filled_share >= _FILLED and not column.is_prose


def names_classes(column: Column) -> bool:
    """Return whether a column is rather a class than something asked or answered."""
    return is_label(column) and (column.distinct <= _MOST_WEAK_CLASSES or label_rank(column) is not None)


def several_labels(columns: list[Column]) -> list[Column]:
    """Return the columns of 0 and 1, if they are several: a text has any number of such labels."""
    found = [column for column in columns if column.is_binary and is_weak_label(column)]
    return found if len(found) > 1 else []


def text_column(columns: list[Column], label: str) -> str | None:
    """Return the text that goes with a label: the one with a usual name, else the longest."""
    texts = [column for column in columns if column.is_str and column.name != label]
    prose = [column for column in texts if column.is_prose]
    return first(TEXTS, texts) or (max(prose, key=lambda column: column.mean_chars).name if prose else None)


def first(names: tuple[str, ...], columns: list[Column]) -> str | None:
    """Return the column with the first of the names that is there."""
    by_name = {column.name.lower(): column.name for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
