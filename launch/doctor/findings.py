"""What the doctor says: one finding a line. Standard library only, like everything that looks before torch is there."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import Literal
from urllib.parse import unquote

State = Literal["ok", "note", "problem"]
SHORTEST_SECRET = 6  # shorter values would blank out ordinary words

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PASSWORD = re.compile(r"(?:^|//)[^/@\s:]*:([^/@\s]+)@")


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
    """Return the finding with passwords in URLs, and every secret of the environment, as `***`."""
    secrets = _secrets()
    return dataclasses.replace(
        finding,
        subject=_hide(finding.subject, secrets),
        found=_hide(finding.found, secrets),
        fix=_hide(finding.fix, secrets),
    )


def _hide(text: str, secrets: list[str]) -> str:
    text = _USER_OF_URL.sub("***", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _secrets() -> list[str]:
    """The values of variables whose name says that they are secret, and the passwords in those that hold a URL."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for value in os.environ.values():
        for password in _PASSWORD.findall(value):
            found |= {password, unquote(password)}
    return sorted((secret for secret in found if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)
