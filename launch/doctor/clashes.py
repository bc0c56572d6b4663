"""Distributions that own the same folder, where Python takes whichever comes first. Standard library only."""

import importlib.metadata
import importlib.util
import shlex
from pathlib import Path

from launch import onnxruntime_wheels
from launch.doctor import repair
from launch.doctor.findings import Finding

OURS = ("trainer", "serving", "launch")


def wheel_clash(installed: dict[str, str], *, gpu: bool = False) -> list[Finding]:
    """Two onnxruntime wheels own one folder: the later one wins file by file, and removing either breaks both."""
    if clash := onnxruntime_wheels.wheel_clash(installed, gpu=gpu):
        found, fix = clash
        return [Finding("onnxruntime", found, "problem", fix)]
    return []


def shadows() -> list[Finding]:
    """Another distribution that installs a package named as one of ours, or another folder that is imported first."""
    findings = []
    owners = importlib.metadata.packages_distributions()
    for name in OURS:
        foreign = sorted({owner for owner in owners.get(name, ()) if owner != "trivet"})
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if foreign:
            fix = repair.pip("uninstall", *foreign)
            findings.append(Finding(name, f"also installed by {', '.join(foreign)}", "problem", fix))
        elif origin is None:
            findings.append(Finding(name, f"missing in {repair.HOME}", "problem", repair.reinstall()))
        elif origin != repair.HOME / name:
            fix = f"mv {shlex.quote(str(origin))} {shlex.quote(f'{origin}_other')}  # or leave that folder"
            findings.append(Finding(name, f"imported from {origin}, not from {repair.HOME}", "problem", fix))
    return findings
