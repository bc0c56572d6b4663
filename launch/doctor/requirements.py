"""Requirements of one installed package that the installed version of another breaks."""

import dataclasses
import importlib.metadata
from typing import TYPE_CHECKING

from launch.doctor import repair
from launch.doctor.findings import Finding, State
from launch.doctor.packages import contains, normalised

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

# transformers imports these where they are installed, so a broken one breaks it.
IMPORTED_WHEN_PRESENT = ("torchvision", "torchaudio", "scikit-learn", "scipy", "pandas", "sentencepiece", "tiktoken")


def broken_requirements(installed: dict[str, str], own: list[str] | None) -> list[Finding]:
    """Return a finding for every installed package whose own requirement the installed version of another breaks.

    `own` are the requirements in trivet's metadata, None where it is not installed. It is a problem where Trivet uses
    the package (by that metadata, or since transformers imports it), else a note; so is a line that cannot be read.
    """
    if "packaging" not in installed:
        return [Finding("requirements", "not compared without packaging", "note", repair.pip("install", "packaging"))]
    read = {owner: _requires(owner) for owner in sorted(set(installed) - {"trivet"})}
    ranges = Ranges.of(own or [], {owner: needs for owner, (needs, _) in read.items()})
    findings = []
    for owner, (needs, unreadable) in read.items():
        if unreadable:
            found = f"its metadata asks for {unreadable[0]!r}, which is no valid requirement: not compared"
            findings.append(Finding(owner, found, "note", repair.install(owner, options=("--upgrade",))))
        for needed in needs:
            name = normalised(needed.name)
            if name not in installed or contains(needed.specifier, installed[name]):
                continue
            found = f"{installed[name]} is installed, but {owner} {installed[owner]} needs {name}{needed.specifier}"
            state: State = "problem" if owner in ranges.used or owner in IMPORTED_WHEN_PRESENT else "note"
            findings.append(Finding(name, found, state, _fix(owner, name, installed[name], ranges)))
    return findings


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The versions that Trivet works with: `direct` by its own metadata, `used` by that of all it requires as well."""

    direct: dict[str, "SpecifierSet"]
    used: dict[str, "SpecifierSet"]

    @classmethod
    def of(cls, own: list[str], needs: "dict[str, list[Requirement]]") -> "Ranges":
        """Read them off Trivet's own requirements and, by distribution, those of all that are installed."""
        from packaging.requirements import Requirement

        direct = [needed for text in own if (needed := Requirement(text)).name != "trivet"]  # its extras name it
        used, names, seen = list(direct), [normalised(needed.name) for needed in direct], set()
        while names:
            name = names.pop()
            if name not in seen:
                seen.add(name)
                used += needs.get(name, [])
                names += [normalised(needed.name) for needed in needs.get(name, [])]
        return cls(_joined(direct), _joined(used))


def _fix(owner: str, name: str, version: str, ranges: Ranges) -> str:
    """The command that brings the two together, and never takes `name` out of the range that Trivet works with."""
    is_right = name in ranges.direct and contains(ranges.direct[name], version)
    if owner in ranges.used and not is_right:
        return repair.install(f"{name}{ranges.used[name]}")
    kept = [f"{name}=={version}"] if is_right else [f"{name}{ranges.used[name]}"] if name in ranges.used else []
    command = repair.install(f"{owner}{ranges.used.get(owner, '')}", *kept, options=("--upgrade",))
    return command if owner in ranges.used else f"{command}  # or: {repair.pip('uninstall', owner)}"


def _joined(requirements: "list[Requirement]") -> "dict[str, SpecifierSet]":
    """The range of each name that meets all of its requirements."""
    ranges: dict[str, SpecifierSet] = {}
    for needed in requirements:
        name = normalised(needed.name)
        ranges[name] = ranges[name] & needed.specifier if name in ranges else needed.specifier
    return ranges


def _requires(name: str) -> "tuple[list[Requirement], list[str]]":
    """The requirements of an installed distribution that hold here, without its extras; and lines that are none."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return [], []
    needs, unreadable = [], []
    for text in texts:
        try:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                needs.append(needed)
        except ValueError:  # of the requirement, or of its marker
            unreadable.append(text)
    return needs, unreadable
