"""The proof that an export is published with: of its graph in fp32, and of what is rounded from it after that.

What is quantised, or in half precision, says other numbers than its source, so that its own proof cannot tell a small
fault from rounding: it counts beside a proof in fp32 of the graph that it was made of, not in the place of one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.checks import Check
from serving.directory import identity
from serving.export.halved import halve_written
from serving.export.quantized import quantize_written
from serving.export_options import Options
from serving.proof_process import prove_apart
from serving.session import GRAPH
from serving.verify import VerificationFailed, prove

LARGE_BYTES = 256 << 20  # of a graph and its weights; below, starting a process costs more than it spares


def proven(
    folder: Path,
    provider: str | None,
    options: Options,
    write_again: Callable[[Path], None],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Return the record of the proof of what is to be published; without a provider, of its graph in fp32.

    Where it is to be quantised or in half precision, the graph in fp32 is proven first, on the CPU, and rounded once
    that has passed; where it has not, the record is that of fp32. `write_again` writes the graph in half precision.
    """
    # A large model's proof has a process of its own, the second too: this one still holds what tracing took.
    large = sum(path.stat().st_size for path in folder.glob(f"{GRAPH}*")) >= LARGE_BYTES
    proof = prove_apart if large else prove
    if options.quantization is None and options.dtype == "fp32":
        assert provider is not None
        return proof(folder, provider, progress=report)
    when = f"before {'quantisation' if options.quantization else options.dtype}"
    before = proof(folder, "cpu", progress=lambda stage: report(f"{when}: {stage}"))
    if not before["passed"]:
        return before | {"reason": f"{when}, in fp32: {before['reason']}"}
    checks = {when.replace(" ", "_"): _evidence(before), **_round(folder, options, write_again, report)}
    failed = next((check["found"] for check in checks.values() if not check["passed"]), None)
    if failed is not None or provider is None:
        reason = failed or f"its graph in fp32 is the source's, but nothing here runs {options.dtype}"
        nowhere = {"provider": None, "identity": identity(folder), "passed": False}
        return before | nowhere | {"reason": reason, "checks": checks}
    record = proof(folder, provider, progress=report)
    return record | {"checks": checks | record["checks"]}


def _evidence(record: dict[str, Any]) -> Check:
    """Return what the passed proof in fp32 found, as one check: the largest difference, and all its checks inside."""
    compared = [check for check in record["checks"].values() if "max_abs_diff" in check]
    worst = max(compared, key=lambda check: check["max_abs_diff"])
    figures = {name: worst[name] for name in ("max_abs_diff", "tolerance")}
    return {
        "passed": record["passed"],
        "found": f"the graph in fp32 is the source's: {worst['found']}",
        **figures,
        "checks": record["checks"],
    }


def _round(
    folder: Path, options: Options, write_again: Callable[[Path], None], report: Callable[[str], None]
) -> dict[str, Check]:
    """Make of the proven graph in fp32 the one that is asked for; return what shows that it was made of it."""
    if options.quantization is not None:
        report(f"quantising the graph to {options.quantization}")
        quantize_written(folder, options.quantization)
        return {}
    report(f"writing the graph in {options.dtype}")
    return halve_written(folder, options.dtype, write_again)


def require_passed(source: str | Path, record: dict[str, Any]) -> None:
    """Raise VerificationFailed where something was compared and differs."""
    if all(check["passed"] for check in record["checks"].values()):
        return
    reason = record["reason"]
    said = f"{source}: exported, but not equal to its source, so nothing was published: {reason}"
    if [name for name, check in record["checks"].items() if not check["passed"]] == ["quality"]:
        said = (
            f"{source}: quantised, but it costs too much, so nothing was published: {reason}; take another --quantize"
        )
    error = VerificationFailed(said)
    error.record = record
    raise error
