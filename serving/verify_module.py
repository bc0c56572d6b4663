"""The checks of a plain module: its outputs, the rows one by one and in one batch.

Shape letters: N rows.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.checks import TOLERANCES, Check, graded, max_abs_diff
from serving.manifest import Manifest
from serving.module import compute
from serving.reference_file import opened
from serving.session import Session

_ROUNDING = 1e-5  # of the largest output


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Compare each output with the source's, the rows one by one and in one batch; return the checks by name."""
    with opened(folder) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    inputs = {name.removeprefix("inputs."): value for name, value in stored.items() if name.startswith("inputs.")}
    report("verifying outputs")
    num_rows = len(next(iter(inputs.values())))
    checks = {}
    for size, where in ((1, "one_by_one"), (num_rows, "batch")):
        parts = [slice(start, start + size) for start in range(0, num_rows, size)]
        runs = [compute(session, manifest, {name: value[part] for name, value in inputs.items()}) for part in parts]
        for name in manifest["outputs"]:
            found_N = np.concatenate([run[name] for run in runs])
            checks[f"{name}_{where}"] = _compared(found_N, stored[f"outputs.{name}"], manifest["dtype"], size)
    return checks


def _compared(found_N: np.ndarray, expected_N: np.ndarray, dtype: str, batch: int) -> Check:
    if found_N.shape != expected_N.shape:
        return {"passed": False, "found": f"outputs of shape {found_N.shape}, not {expected_N.shape}", "batch": batch}
    if not np.issubdtype(expected_N.dtype, np.floating):  # of whole numbers and truths a near one is another one
        wrong = int((found_N != expected_N).sum())
        found = f"{wrong} of {expected_N.size} values differ; accepted: none"
        return {"passed": wrong == 0, "found": found, "rows": len(expected_N), "batch": batch}
    largest = float(np.abs(expected_N).max())
    tolerance = max(TOLERANCES[dtype] * float(expected_N.std()), _ROUNDING * largest)
    check = graded(max_abs_diff(found_N, expected_N), tolerance, rows=len(expected_N), batch=batch)
    return check | {"found": check["found"].replace("logits", "outputs")}
