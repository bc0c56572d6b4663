"""Which distributions are installed, and whether they are what Trivet's extras ask for."""

import importlib.metadata
import re
from typing import TYPE_CHECKING

from launch.doctor import repair
from launch.doctor.findings import Finding, State

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

EXTRAS = {
    "train": "training",
    "export": "export to ONNX",
    "serve-cpu": "serving on CPUs",
    "serve-gpu": "serving on NVIDIA GPUs",
    "sweep": "sweeps",
    "dev": "working on Trivet",
}


def installed_versions() -> dict[str, str]:
    """Return normalised distribution name -> version of everything importable here; of two copies the first found."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(normalised(name), distribution.version or "unknown")
    return versions


def installed_and_own() -> tuple[dict[str, str], list[str] | None]:
    """Return those versions, and the requirements in trivet's own metadata: None where it is not installed."""
    installed = installed_versions()
    return installed, importlib.metadata.requires("trivet") or [] if "trivet" in installed else None


def normalised(requirement: str) -> str:
    """Return the normalised distribution name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*", requirement).group()).lower()  # type: ignore[union-attr]


def extras(installed: dict[str, str], requirements: list[str] | None, *, gpu: bool = False) -> list[Finding]:
    """For every extra the versions that are installed, or the command that installs it.

    `requirements` are those in trivet's own metadata, None where it is not installed. A missing extra is a note:
    nobody needs them all. A version outside the range is a problem.
    """
    if requirements is None:
        return [Finding("trivet", "runs from its sources, not installed", "note", repair.reinstall())]
    findings = [Finding("trivet", installed["trivet"])]
    has_gpu_wheel = "onnxruntime-gpu" in installed or (gpu and "onnxruntime" not in installed)
    unfit = "serve-cpu" if has_gpu_wheel else "serve-gpu"  # never advise the second of two wheels that break each other
    wanted = {extra: needs(extra, requirements) for extra in EXTRAS if extra != unfit}
    findings += [_one_extra(extra, needed, installed) for extra, needed in wanted.items()]
    return findings + (_outside(list(wanted.values()), installed) if "packaging" in installed else [])


def _outside(wanted: list[list[str]], installed: dict[str, str]) -> list[Finding]:
    """Versions outside their range: a problem in an extra that is complete, a note in one that may not be meant."""
    found = {}
    for needed in sorted(wanted, key=lambda needed: _is_complete(needed, installed)):
        for text in filter(lambda text: _is_outside(text, installed), needed):
            name, asked = normalised(text), text.split(";")[0].strip()
            state: State = "problem" if _is_complete(needed, installed) else "note"
            said = f"{installed[name]}; Trivet needs {asked}"
            found[name] = Finding(name, said, state, repair.install(asked))
    return list(found.values())


def _is_complete(needed: list[str], installed: dict[str, str]) -> bool:
    return all(normalised(text) in installed for text in needed)


def needs(extra: str, requirements: list[str]) -> list[str]:
    """Return the requirements of one extra, those of the extras that it names (`trivet[export]`) included."""
    needed = []
    for text in requirements:
        if f"extra == '{extra}'" in text.replace('"', "'"):
            inner = re.match(r"trivet\[([\w-]+)\]", text)
            needed += needs(inner[1], requirements) if inner else [text]
    return needed


def _one_extra(extra: str, needed: list[str], installed: dict[str, str]) -> Finding:
    subject = f"{extra} ({EXTRAS[extra]})"
    missing = [normalised(text) for text in needed if normalised(text) not in installed]
    if missing:
        return Finding(subject, f"not installed: {', '.join(missing)}", "note", repair.extra(extra))
    return Finding(subject, ", ".join(f"{normalised(text)} {installed[normalised(text)]}" for text in needed))


def _is_outside(requirement: str, installed: dict[str, str]) -> bool:
    from packaging.requirements import Requirement  # comes with every package that an extra names

    version = installed.get(normalised(requirement))
    return version is not None and not contains(Requirement(requirement).specifier, version)


def contains(specifier: "SpecifierSet", version: str) -> bool:
    """Whether the version lies in the range; what is no version does not."""
    from packaging.version import InvalidVersion

    try:
        return specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
