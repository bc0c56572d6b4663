"""What was found in a data set, in words: the same lines for the terminal and for the head of the config."""

from launch.init.choices import num_lost
from launch.init.column import Column
from launch.init.guesses import Guess
from launch.init.profiles import Profile
from launch.init.user_data import Found
from trainer.data_files import ending
from trainer.sources import LeftOut

_LABELS_SHOWN = 12
_COLUMN_NAME_CHARS = 40
_MISSING = {"nan", "none", "n/a", "na", "null", "nil", "-", "?", "<na>", "#n/a", "missing"}


def findings(
    found: Found, columns: list[Column], guess: Guess, profile: Profile, max_length: int
) -> list[tuple[str, str]]:
    """Return (what, finding) lines, without line breaks or control characters; rows will have `max_length` tokens."""
    lines = [("rows", _rows(found, profile)), (guess.objective, f"{guess.reason}{_unused(columns, guess)}")]
    if profile.labels:
        lines.append(("labels", _labels(profile)))
    lines.append(("tokens", _lengths(profile)))
    if lost := num_lost(profile, max_length):
        lines.append(("lost", f"answers cut away: {lost:,} rows, whose prompt alone fills {max_length:,} tokens"))
    lines.append(("repeated", _repeated(profile)))
    lines += [("left out", _left_out(each)) for each in profile.splits.left_out]
    lines += [("note", remark) for remark in (*found.remarks, *_doubts(found, columns, guess, profile))]
    return [(what, clean(text)) for what, text in lines]


def clean(text: str) -> str:
    """Return the text on one line, without what a terminal or YAML would not print."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _rows(found: Found, profile: Profile) -> str:
    splits = profile.splits
    where = f"in {found.validation.name}" if found.validation else "chosen by their content"
    return f"{len(splits.train):,} to train on, {len(splits.held_out):,} held out ({where})"


def _unused(columns: list[Column], guess: Guess) -> str:
    rest = [f"`{column.name}`" for column in columns if column.name not in guess.columns.values()]
    return f"; not used: {', '.join(rest)}" if rest else ""


def _labels(profile: Profile) -> str:
    total = sum(count for _, count in profile.labels)
    shown = [f"{label} {count:,} ({count / total:.0%})" for label, count in profile.labels[:_LABELS_SHOWN]]
    more = [f"and {len(profile.labels) - _LABELS_SHOWN:,} more"] if len(profile.labels) > _LABELS_SHOWN else []
    return (
        ", ".join([*shown, *more])
        + f"; always saying the first is right {profile.labels[0][1] / total:.0%} of the time"
    )


def _lengths(profile: Profile) -> str:
    lengths, rows = profile.lengths, len(profile.splits.train)
    of = "" if lengths.num_counted == rows else f", counted on {lengths.num_counted:,} rows and the longest"
    return (
        f"half of the training rows have up to {lengths.median:,}, 95% up to {lengths.p95:,}, the longest "
        f"{lengths.longest:,} (by {lengths.by}{of})"
    )


def _repeated(profile: Profile) -> str:
    counts = {
        "training rows that say the same as an earlier one": profile.duplicates,
        "training texts that have several labels": profile.contradictions,
        "held-out rows that are trained on too, which flatters the score": profile.shared,
    }
    return "; ".join(f"{what}: {count:,}" for what, count in counts.items() if count) or "nothing"


def _left_out(each: LeftOut) -> str:
    more = ", ..." if each.count > len(each.places) else ""
    return f"rows {each.reason}: {each.count:,} ({'; '.join(each.places)}{more})"


def _doubts(found: Found, columns: list[Column], guess: Guess, profile: Profile) -> list[str]:
    """What may not be as the user thinks."""
    doubts = []
    odd = [column.name for column in columns if column.name.isdigit() or len(column.name) > _COLUMN_NAME_CHARS]
    if odd and ending(found.train) == ".csv":
        doubts.append(
            f"the first line is read as column names ({odd[0][:_COLUMN_NAME_CHARS]!r}): if it is data, put a line of "
            f"names before it"
        )
    if profile.labels:
        doubts += _label_doubts(guess, profile)
    doubts += _other_uses([column for column in columns if column.name not in guess.columns.values()], guess)
    if found.validation is not None and found.validation.name.startswith("test"):
        doubts.append(f"{found.validation.name} is used as held-out data: keep other rows for final figures")
    return doubts


def _other_uses(rest: list[Column], guess: Guess) -> list[str]:
    """What the columns that are not used could be used for, by settings that init does not write."""
    texts, by_hand = [column.name for column in rest if column.is_prose], "in a config of your own: objective.type="
    if guess.objective == "classification":
        return [f"`{name}` is a text too: to judge both as a pair, set data.text_pair to it" for name in texts[:1]]
    if guess.objective != "causal_lm":
        return []
    numbers = [column.name for column in rest if column.type == "number"]
    lists = [column.name for column in rest if column.type == "list"]
    return [
        *(
            f"`{name}` holds numbers: to learn them {by_hand}classification, objective.problem=regression"
            for name in numbers[:1]
        ),
        *(
            f"`{name}` holds lists: if of labels, {by_hand}classification, objective.problem=multi_label"
            for name in lists[:1]
        ),
    ]


def _label_doubts(guess: Guess, profile: Profile) -> list[str]:
    column, names = guess.columns["label"], [label for label, _ in profile.labels]
    doubts = []
    if guess.is_weak:
        doubts.append(f"that `{column}` is a label is guessed; if not: --objective causal_lm")
    if len(names) > len(profile.splits.train) / 2:
        doubts.append(f"`{column}` has nearly as many values as rows: is it a label?")
    few = [label for label, count in profile.labels if count < 10]
    if few and len(few) < len(names):
        doubts.append(f"classes with fewer than 10 training rows: {len(few)} ({', '.join(few[:5])})")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
    for alike in [group for group in groups.values() if len(group) > 1][:_LABELS_SHOWN]:
        shown = ", ".join(map(repr, sorted(alike)))
        doubts.append(f"labels that differ only in case or spaces are classes of their own: {shown}; are they one?")
    missing = [name for name in names if name.strip().casefold() in _MISSING]
    if missing:
        doubts.append(f"labels that look like missing values: {', '.join(map(repr, missing))}; remove such rows?")
    return doubts
