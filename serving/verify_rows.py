"""The checks of models over whole texts: texts to rows, what the graph says alone and in a padded batch, and answers.

Shape letters: R answers of all rows, one after the other, L numbers an answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.checks import (
    RMS_TOLERANCES,
    TOLERANCES,
    Cases,
    Check,
    check_text,
    graded,
    graded_mean,
    max_abs_diff,
    near_tie,
)
from serving.directory import REFERENCE, BadInput, DirectoryError
from serving.manifest import Manifest
from serving.reference_file import metadata, opened
from serving.session import Session
from serving.tasks import TASKS, Row, TextTask, run_rows
from serving.text import Text

LONGEST_PADDED = 512  # tokens of a text of the reference that is padded with others; the one that is longer is alone
_ROUNDING = 1e-5  # of the largest output; seen: 1e-6


@dataclass(frozen=True)
class Reference:
    """What the source said of whole texts, each alone and unpadded, and the names of its labels."""

    outputs_RL: np.ndarray
    labels: list[str] | None
    questions: list[dict[str, Any]]
    cases: Cases
    dtype: str = "fp32"

    @classmethod
    def load(cls, folder: Path, dtype: str = "fp32") -> "Reference":
        """Read the directory's reference.safetensors; `dtype`, what the graph is in, sets what is accepted.

        Raises DirectoryError for one of an older Trivet.
        """
        with opened(folder) as file:
            stored = metadata(file)
            if "questions" not in stored:
                raise DirectoryError(f"{folder / REFERENCE}: written by an older Trivet; export the model again")
            cases = {"texts": stored["texts"]}
            return cls(file.get_tensor("outputs"), stored["labels"], stored["questions"], cases, dtype)

    @property
    def rows(self) -> list[Row]:
        """What the source was given, in the order of its outputs."""
        return [
            Row(row["input_ids"], False, row.get("token_type_ids"))
            for question in self.questions
            for row in question["rows"]
        ]

    @property
    def tolerance(self) -> float:
        """The largest absolute difference of outputs that is accepted."""
        return self._share(TOLERANCES[self.dtype])

    @property
    def rms_tolerance(self) -> float:
        """The largest root of the mean squared difference that is accepted."""
        return self._share(RMS_TOLERANCES[self.dtype])

    def _share(self, accepted: float) -> float:
        largest = float(np.abs(self.outputs_RL).max())
        return max(accepted * float(self.outputs_RL.std()), _ROUNDING * largest)


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks, calling `report` at the start of each stage; return them by name."""
    reference = Reference.load(folder, manifest["dtype"])
    task = TASKS[manifest["task"]](manifest, session, Text.open(folder))
    report("verifying text")
    checks = {"text": check_text(folder, reference.cases), "rows": check_rows(task, reference)}
    report("verifying logits")
    checks["logits_one_by_one"] = check_outputs(session, manifest, reference, batch=1)
    checks["logits_padded_batch"] = check_outputs(session, manifest, reference, batch=len(reference.rows))
    report("verifying answers")
    # Failed already where no difference can be told.
    seen = max(checks[name].get("max_abs_diff", 0.0) for name in ("logits_one_by_one", "logits_padded_batch"))
    checks["answers"] = check_answers(task, reference, seen)
    return checks


def check_rows(task: TextTask, reference: Reference) -> Check:
    """Compare the rows that are served for the texts, cut as in training, with the source's: equal, or failed."""
    wrong = []
    for case in reference.questions:
        try:
            question = _served_as(task, case["max_length"]).encode(case["text"], case["pair"])
        except BadInput as error:
            wrong.append(f"{case['text'][:40]!r}: {error}")
            continue
        mine = [{"input_ids": row.ids, "token_type_ids": row.types} for row in question.rows]
        theirs = [{"token_type_ids": None, **row} for row in case["rows"]]
        if mine != theirs or any(row.truncated for row in question.rows) != case["is_cut"]:
            wrong.append(f"{case['text'][:40]!r}")
    count = len(reference.questions)
    found = f"the rows of {len(wrong)} of {count} texts differ" + (f", first {wrong[0]}" if wrong else "")
    return {"passed": not wrong, "found": found, "cases": count, "differ": len(wrong)}


def check_outputs(session: Session, manifest: Manifest, reference: Reference, *, batch: int) -> Check:
    """Compare the outputs of all rows with the source's, `batch` rows to a run, the shorter ones padded right."""
    rows = reference.rows
    runs = [run_rows(session, manifest, group) for group in _groups(rows, batch)]
    found_RL = np.concatenate([each for run in runs for each in run])
    if found_RL.shape != reference.outputs_RL.shape:
        found = f"outputs of shape {found_RL.shape}, not {reference.outputs_RL.shape}"
        return {"passed": False, "found": found, "rows": len(rows), "batch": batch}
    difference = max_abs_diff(found_RL, reference.outputs_RL)
    check = graded(difference, reference.tolerance, rows=len(rows), batch=batch)
    rms = float(np.square(found_RL - reference.outputs_RL, dtype=np.float64).mean() ** 0.5)
    return graded_mean(check, rms, reference.rms_tolerance)


def _groups(rows: list[Row], batch: int) -> list[list[Row]]:
    """Return the rows, in their order, `batch` at a time; those that all others would be padded to run alone."""
    groups: list[list[Row]] = []
    for row in rows:
        alone = len(row.ids) > LONGEST_PADDED
        if not groups or alone or len(groups[-1]) == batch or len(groups[-1][0].ids) > LONGEST_PADDED:
            groups.append([])
        groups[-1].append(row)
    return groups


def check_answers(task: TextTask, reference: Reference, seen: float) -> Check:
    """Compare what is answered to the texts, names and scores, with what the source's answers are by transformers.

    A text with a wrong name is excused where one of the source's own decisions about it was a near tie, beside the
    largest difference of outputs that was `seen`.
    """
    wrong, near_ties, differences = [], 0, [0.0]
    for case in reference.questions:
        served = _served_as(task, case["max_length"])
        try:
            answer = served.answer(served.encode(case["text"], case["pair"]))
        except (FloatingPointError, BadInput) as error:
            return {"passed": False, "found": f"{case['text'][:40]!r}: {error}"}
        difference, place = compare(answer, case["answer"])
        if not place:
            differences.append(difference)
        elif case["margin"] < near_tie(reference.dtype, seen):
            near_ties += 1
        else:
            wrong.append(f"{case['text'][:40]!r}: {place}")
    facts = {"rows": len(reference.questions), "mismatches": len(wrong), "near_ties": near_ties}
    check = graded(max(differences), reference.tolerance, **facts)
    check["found"] = check["found"].replace("logits", "scores")
    if task.manifest.get("labels") != reference.labels:
        wrong.insert(0, f"the labels are {task.manifest.get('labels')}, not {reference.labels}")
    if wrong:
        check |= {"passed": False, "found": f"{check['found']}; {len(wrong)} differences, first: {wrong[0]}"}
    return check


def compare(found: Any, expected: Any, place: str = "") -> tuple[float, str]:
    """Return the largest difference of the numbers in two answers, and the first place where anything else differs.

    The answer that is found may say more than is expected of it, but in lists.
    """
    if isinstance(expected, float) and isinstance(found, float):
        difference = abs(found - expected)
        return (difference if math.isfinite(difference) else math.inf), ""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() <= found.keys():
        each = [compare(found[key], value, f"{place}.{key}") for key, value in expected.items()]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        each = [compare(*both, f"{place}[{at}]") for at, both in enumerate(zip(found, expected, strict=True))]
    else:
        differs = found != expected
        return 0.0, f"{place.lstrip('.') or 'it'} is {_brief(found)}, not {_brief(expected)}" if differs else ""
    return max((number for number, _ in each), default=0.0), next((where for _, where in each if where), "")


def _served_as(task: TextTask, max_length: int) -> TextTask:
    """Return the task, cutting at another length: the reference's texts are not as long as the longest."""
    return type(task)({**task.manifest, "max_length": max_length}, task._session, task.text)


def _brief(value: Sequence[Any] | Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
