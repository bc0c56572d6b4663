"""How a finished run scores label by label: F1, and which labels it takes for which."""

from typing import Any

from launch import report_page
from launch.report_data import Run, is_number, mapping

_MOST_SHOWN = 40  # labels: a wider table is not read


def by_label(run: Run) -> list[str]:
    """Return a table of the labels of a run, as parts of a page; nothing where its result has none, or too many."""
    details = mapping(run.result, "details")
    labels, scores, matrix = (_list(details, name) for name in ("labels", "f1", "confusion"))
    if not 0 < len(labels) == len(scores) <= _MOST_SHOWN or not all(map(is_number, scores)):
        return []
    columns, rows = ["label", "F1"], [[label, f"{score:.3f}"] for label, score in zip(labels, scores, strict=True)]
    note = ""
    if len(matrix) == len(labels) and all(isinstance(row, list) and len(row) == len(labels) for row in matrix):
        columns += [f"said {label}" for label in labels]
        rows = [[*row, *counts] for row, counts in zip(rows, matrix, strict=True)]
        note = "A row holds the held-out examples that have its label, by what the model said they are."
    return [
        report_page.heading(f"{run.name}: held-out labels"),
        report_page.table(columns, rows),
        report_page.note(note),
    ]


def _list(values: dict[str, Any], name: str) -> list[Any]:
    value = values.get(name)
    return value if isinstance(value, list) else []
