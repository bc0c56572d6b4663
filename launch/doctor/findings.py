"""What the doctor says: one finding a line. Standard library only, like everything that looks before torch is there."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Literal

from trainer.redact import redacted

State = Literal["ok", "note", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    `fix` is a shell command that mends it; what has to be said besides stands behind a `#`. `value` is what was
    measured, in `unit`. `area` is the part of the table, set by the one who asks.
    """

    subject: str
    found: str
    state: State = "ok"
    fix: str = ""
    area: str = ""
    value: float | None = None
    unit: str = ""


def collect(checks: Iterable[Callable[[], Iterable[Finding]]], fix: str) -> list[Finding]:
    """Return the findings of every check; one that itself breaks is a problem with the fix `fix`, not a crash."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            findings.append(Finding(name_of(check), reason, "problem", fix))
    return findings


def name_of(check: Callable[..., object]) -> str:
    """Return a subject for a check that could not give one."""
    while isinstance(check, functools.partial):
        check = check.func
    name = getattr(check, "__name__", "<>")
    return "this check" if name.startswith("<") else name.strip("_").replace("_", " ")


def without_secrets(finding: Finding) -> Finding:
    """Return the finding with `***` for every secret."""
    return dataclasses.replace(
        finding,
        subject=redacted(finding.subject),
        found=redacted(finding.found),
        fix=redacted(finding.fix),
    )
