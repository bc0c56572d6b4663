"""Proof that an ONNX directory answers as its source did. Without torch, on the provider that will serve.

The source's inputs and outputs come from reference.safetensors; what is compared depends on the task, see
verify_decoder.py and verify_rows.py.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving import verify_decoder, verify_module, verify_quantized, verify_rows
from serving.checks import Check, check_facts
from serving.directory import MANIFEST, BadInput, check_files, identity, read_manifest
from serving.manifest import Manifest, check_fields
from serving.proofs import append_verification, earlier_records
from serving.reference_file import read_facts
from serving.session import RunFailed, Session, onnxruntime_version
from serving.tasks import TASKS

RUN_CHECKS = {
    "causal_lm": verify_decoder.run_checks,
    "module": verify_module.run_checks,
    **dict.fromkeys(TASKS, verify_rows.run_checks),
}


class VerificationFailed(BadInput):
    """The ONNX directory does not answer as its source does; the message has the evidence, `record` all of it."""

    record: dict[str, Any] | None = None


def verify(
    folder: str | Path, provider: str = "cpu", *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compare the ONNX directory with its source and add the record to verification.json; return the record.

    Raises VerificationFailed when a gate fails (the record is kept: the engine then refuses the directory), and
    BadInput when the directory is altered or the provider is not there.
    """
    folder = Path(folder)
    earlier_records(folder)  # refuses a newer format before any work
    record = prove(folder, provider, progress=progress)
    append_verification(folder, record)
    if not record["passed"]:
        raise VerificationFailed(f"{folder}: not equal to its source: {record['reason']}; export it again")
    return record


def prove(folder: Path, provider: str = "cpu", *, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run all checks and return the record, passed or not, without writing it. Raises BadInput like `verify`."""
    report = progress or (lambda stage: None)
    started = time.perf_counter()
    manifest = read_manifest(folder, "onnx")
    check_files(folder, manifest)
    check_fields(folder, manifest)
    session = Session.open(folder, provider=provider)
    _check_inputs(folder, manifest, session)
    try:
        checks = _checks(folder, manifest, session, report)
    except RunFailed as error:
        checks = {"run": {"passed": False, "found": f"the graph cannot be run: {error}"}}
    failed = [f"{name}: {check['found']}" for name, check in checks.items() if not check["passed"]]
    return {
        "provider": provider,
        "onnxruntime": onnxruntime_version(),
        "identity": identity(folder),
        "passed": not failed,
        "reason": "; ".join(failed) or None,
        "checks": checks,
        "seconds": round(time.perf_counter() - started, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_inputs(folder: Path, manifest: Manifest, session: Session) -> None:
    """Raise BadInput where the manifest is of another graph."""
    said = manifest.get("inputs", session.inputs)
    if sorted(said) != sorted(session.inputs):
        raise BadInput(
            f"{folder}: its graph takes {', '.join(session.inputs)}, but its {MANIFEST} says {', '.join(said)}; "
            "export the model again"
        )


def _checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks, first that of the manifest, which the others go by."""
    facts, written = read_facts(folder), read_manifest(folder, "onnx", as_written=True)
    first = {} if facts is None else {"manifest": check_facts(folder, written, facts)}
    run_checks = verify_quantized.run_checks if manifest.get("quantization") else RUN_CHECKS[manifest["task"]]
    try:
        return first | run_checks(folder, manifest, session, report)
    except Exception:
        if all(check["passed"] for check in first.values()):
            raise
        return first  # of a wrong manifest the others may not even run
