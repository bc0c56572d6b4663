"""The checks of a classifier: texts to ids, logits alone and in a padded batch, and the labels that are served.

Shape letters: N rows, L labels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from serving.checks import TOLERANCES, Cases, Check, check_text, graded, max_abs_diff, near_tie
from serving.directory import REFERENCE
from serving.manifest import Manifest
from serving.session import Session
from serving.tasks import Classifier, Prediction, padded_logits
from serving.text import Text


@dataclass(frozen=True)
class Reference:
    """What the source answered to whole texts, each alone and unpadded, and the names of its labels."""

    logits_NL: np.ndarray
    labels: list[str]
    cases: Cases
    dtype: str = "fp32"

    @classmethod
    def load(cls, folder: Path, dtype: str = "fp32") -> "Reference":
        """Read the directory's reference.safetensors; `dtype` is what the graph is in, which sets what is accepted."""
        with safe_open(folder / REFERENCE, framework="numpy") as file:
            stored = {name: json.loads(text) for name, text in file.metadata().items()}
            return cls(file.get_tensor("logits"), stored.pop("labels"), stored, dtype)

    @property
    def texts(self) -> list[str]:
        """The texts, in the order of the logits."""
        return [case["text"] for case in self.cases["cut"]]

    @property
    def rows(self) -> list[list[int]]:
        """What the source was given for each text."""
        return [case["row"] for case in self.cases["cut"]]

    @property
    def tolerance(self) -> float:
        """The largest absolute logit difference that is accepted."""
        return TOLERANCES[self.dtype] * float(self.logits_NL.std())

    @property
    def near_tie(self) -> float:
        """How close two logits must lie for either label to be right."""
        return near_tie(self.dtype, self.tolerance)


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks, calling `report` at the start of each stage; return them by name."""
    reference = Reference.load(folder, manifest["dtype"])
    report("verifying text")
    checks = {"text": check_text(folder, reference.cases)}
    report("verifying logits")
    checks["logits_one_by_one"] = check_logits(session, manifest, reference, batch=1)
    checks["logits_padded_batch"] = check_logits(session, manifest, reference, batch=len(reference.rows))
    report("verifying labels")
    checks["labels"] = check_labels(Classifier(manifest, session, Text.open(folder)), reference)
    return checks


def check_logits(session: Session, manifest: Manifest, reference: Reference, *, batch: int) -> Check:
    """Compare the logits of all rows with the source's, `batch` rows to a run, the shorter ones padded right."""
    rows = reference.rows
    found_NL = [padded_logits(session, manifest, rows[start : start + batch]) for start in range(0, len(rows), batch)]
    difference = max_abs_diff(np.concatenate(found_NL), reference.logits_NL)
    return graded(difference, reference.tolerance, rows=len(rows), batch=batch)


def check_labels(classifier: Classifier, reference: Reference) -> Check:
    """Compare what the classifier answers to the texts, labels by name and scores, with the source's.

    A wrong label is excused where the source's two best logits are a near tie.
    """
    expected = [Prediction.of(logits_L, reference.labels) for logits_L in reference.logits_NL]
    try:
        found = classifier.classify(reference.texts)
    except FloatingPointError as error:
        return {"passed": False, "found": str(error)}
    wrong, near_ties, differences = [], 0, [0.0]
    for text, logits_L, mine, theirs in zip(reference.texts, reference.logits_NL, found, expected, strict=True):
        if mine.scores.keys() == theirs.scores.keys():
            differences.append(max(abs(mine.scores[label] - theirs.scores[label]) for label in theirs.scores))
        if mine.label == theirs.label:
            continue
        second, first = np.partition(logits_L, -2)[-2:]
        if first - second < reference.near_tie:
            near_ties += 1
        else:
            wrong.append(f"{text[:40]!r} is {mine.label!r}, not {theirs.label!r}")
    check = graded(max(differences), reference.tolerance, rows=len(found), mismatches=len(wrong), near_ties=near_ties)
    check["found"] = check["found"].replace("logits", "scores")
    if classifier.labels != reference.labels:
        wrong.insert(0, f"the labels are {classifier.labels}, not {reference.labels}")
    if wrong:
        check |= {"passed": False, "found": f"{check['found']}; {len(wrong)} differences, first: {wrong[0]}"}
    return check
