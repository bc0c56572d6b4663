"""What is installed here, what will really run, what is wrong, and the command that mends it.

Importing this, and what it exports, needs the standard library only: `wheel_clash` and `shadows` are also asked
before anything else is known to be right.
"""

import dataclasses
import functools
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from launch.doctor import accelerators, apart, files, known_bad, machine, network, packages, ray_state, requirements
from launch.doctor.clashes import shadows, wheel_clash
from launch.doctor.findings import Finding, without_secrets
from launch.doctor.packages import installed_versions
from launch.onnxruntime_wheels import ONNXRUNTIME_WHEELS

__all__ = ["Finding", "doctor", "examine", "installed_versions", "shadows", "wheel_clash"]

FORMAT_VERSION = 1
LIMIT_S = 15.0  # for a check in this process
TORCH_LIMIT_S, ONNXRUNTIME_LIMIT_S = 90.0, 45.0  # the first import after starting a machine may take a minute

Check = Callable[[], Iterable[Finding]]
NOT_READ: tuple[dict[str, str], list[str] | None] = ({}, None)  # of what is installed: nothing is known


def doctor(json_output: bool = False) -> int:
    """Print what was found on this machine, as a table or as JSON; return 1 if something is wrong, else 0."""
    if json_output:
        findings = examine()
        print(json.dumps(report(findings), indent=2))
    else:
        from rich.console import Console

        from launch.doctor.table import print_table

        with Console(stderr=True).status("looking at this machine, about ten seconds"):
            findings = examine()
        print_table(findings)
    return 0 if _healthy(findings) else 1


def report(findings: list[Finding]) -> dict[str, Any]:
    """Return what `--json` prints. Keys are only ever added within one format version."""
    try:
        version = importlib.metadata.version("trivet")
    except importlib.metadata.PackageNotFoundError:
        version = None
    rows = [dataclasses.asdict(finding) for finding in findings]
    return {"healthy": _healthy(findings), "format_version": FORMAT_VERSION, "trivet": version, "findings": rows}


def examine() -> list[Finding]:
    """Return every finding, by area and without secrets. A check that breaks or hangs is a problem, not a crash."""
    return [
        without_secrets(dataclasses.replace(finding, area=area))
        for area, checks, limit_s in _areas()
        for check in checks
        for finding in apart.bounded(check, limit_s)
    ]


def _areas() -> list[tuple[str, list[Check], float]]:
    """What is asked, in the order of the table: area, checks, limit for each."""
    gpus, no_driver = apart.asked(accelerators.nvidia_gpus, list[str](), LIMIT_S, accelerators.HANGING_DRIVER)
    (installed, own), unread = apart.asked(packages.installed_and_own, NOT_READ, LIMIT_S)
    disk_checks, no_folder = apart.asked(_disk_checks, list[Check](), LIMIT_S)
    ask = functools.partial
    training: list[Check] = [ask(apart.in_child, "launch.doctor.kernels", "training", TORCH_LIMIT_S, gpus=gpus)]
    serving: list[Check] = [ask(apart.in_child, "launch.doctor.providers", "serving", ONNXRUNTIME_LIMIT_S, gpus=gpus)]
    driver: Check = ask(accelerators.driver, gpus, no_driver)
    has_onnxruntime = any(name in installed for name in ONNXRUNTIME_WHEELS)
    areas: list[tuple[str, list[Check], float]] = [
        ("machine", [machine.machine, driver, machine.memory, machine.shared_memory], LIMIT_S),
        ("packages", [lambda: unread] if unread else _package_checks(installed, own, gpus), LIMIT_S),
        ("training", training if "torch" in installed else [], TORCH_LIMIT_S + LIMIT_S),
        ("serving", serving if has_onnxruntime else [], ONNXRUNTIME_LIMIT_S + LIMIT_S),
        ("disk", [lambda: no_folder] if no_folder else disk_checks, LIMIT_S),
        ("network", [network.host_name, network.loopback, network.hub, network.proxies], LIMIT_S),
        ("ray", [ray_state.ray_state] if "ray" in installed else [], LIMIT_S),
    ]
    return areas


def _package_checks(installed: dict[str, str], own: list[str] | None, gpus: list[str]) -> list[Check]:
    ask = functools.partial
    return [
        ask(packages.extras, installed, own, gpu=bool(gpus)),
        ask(wheel_clash, installed, gpu=bool(gpus)),
        shadows,
        ask(known_bad.known_bad_pairs, installed),
        ask(requirements.broken_requirements, installed, own),
    ]


def _disk_checks() -> list[Check]:
    """Look at the folder where runs are written, and at the one for temporary files if it is another disk."""
    try:
        runs, temporary = Path.cwd(), Path(tempfile.gettempdir())
        folders = [runs] if runs.stat().st_dev == temporary.stat().st_dev else [runs, temporary]
    except OSError as error:
        gone = Finding("disk", f"the folder where you stand cannot be used: {error.strerror}", "problem", "cd")
        return [lambda: [gone]]
    return [functools.partial(check, folder) for folder in folders for check in (files.space, files.writing)]


def _healthy(findings: list[Finding]) -> bool:
    return all(finding.state != "problem" for finding in findings)
