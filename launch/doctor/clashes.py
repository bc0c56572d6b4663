"""Distributions that own the same folder, where Python takes whichever comes first. Standard library only."""

import shlex

import trivet
from launch import onnxruntime_wheels
from launch.doctor import repair
from launch.doctor.findings import Finding


def wheel_clash(installed: dict[str, str], *, gpu: bool = False) -> list[Finding]:
    """Two onnxruntime wheels own one folder: the later one wins file by file, and removing either breaks both."""
    if clash := onnxruntime_wheels.wheel_clash(installed, gpu=gpu):
        found, fix = clash
        return [Finding("onnxruntime", found, "problem", fix)]
    return []


def shadows() -> list[Finding]:
    """A package of ours that is another's, as `trivet` itself sees it; or that another distribution installs too."""
    foreign = {each.name: each for each in trivet.foreign_packages()}
    findings = [Finding(name, each.found, "problem", _mend(each)) for name, each in foreign.items()]
    for name in trivet.PACKAGES:
        if name not in foreign and (owners := trivet.foreign_owners(name)):
            fix = _without(*owners)
            findings.append(Finding(name, f"also installed by {', '.join(owners)}", "problem", fix))
    return findings


def _mend(foreign: trivet.Foreign) -> str:
    if foreign.owners and foreign.first:  # ours lies elsewhere, whole
        return repair.pip("uninstall", "-y", *foreign.owners)
    if foreign.owners:
        return _without(*foreign.owners)
    if foreign.first:
        aside = foreign.first.with_name(f"{foreign.first.stem}_other{foreign.first.suffix}")
        return f"mv {shlex.quote(str(foreign.first))} {shlex.quote(str(aside))}  # or leave that folder"
    return repair.own_files()


def _without(*owners: str) -> str:
    """Take other distributions away; where their files lie among Trivet's, that takes some of Trivet's, too."""
    uninstall = repair.pip("uninstall", "-y", *owners)
    return uninstall if repair.is_clone() else f"{uninstall} && {repair.own_files()}"
