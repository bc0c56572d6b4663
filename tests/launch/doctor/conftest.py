"""Made-up installations and machines; and the check that every repair command that any test here sees can be run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.doctor import repair
from launch.doctor.findings import Finding
from trainer.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
BUILTINS = {"cd", "export", "unset"}
ELSEWHERE = {"apt-get", "dnf", "docker", "ip", "mount", "nvidia-smi", "sudo", "trivet"}  # need not be on this machine


@pytest.fixture(autouse=True)
def every_problem_has_a_command_that_can_be_run(monkeypatch):
    made, real = [], Finding.__init__

    def recorded(self, *values, **named):
        real(self, *values, **named)
        made.append(self)

    monkeypatch.setattr(Finding, "__init__", recorded)
    yield
    for finding in made:
        assert finding.state != "problem" or finding.fix, finding
        if finding.fix:
            check_command(finding.fix)


def check_command(fix: str) -> None:
    """Assert that a shell can parse the line, and that each of its commands exists and takes what it is given."""
    parsed = subprocess.run(["bash", "-n", "-c", fix], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    lexer = shlex.shlex(fix, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word in ("&&", "|", ";"):
            check_program(command, fix)
            command = []
        else:
            command.append(word)


def check_program(command: list[str], fix: str) -> None:
    command = command[1:] if command[:1] == ["sudo"] else command
    assert command or fix.startswith("# "), f"no command in {fix!r}"
    if not command:
        return
    program, *arguments = command
    assert program in BUILTINS | ELSEWHERE or shutil.which(program), fix
    if program == sys.executable and arguments[:2] == ["-m", "pip"]:
        assert arguments[2] in ("install", "uninstall"), fix
        for requirement in arguments[3:]:
            assert requirement.startswith("-") or Requirement(requirement)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in arguments[2:]), fix
    if program == "trivet":
        assert arguments[:2] == ["train", "CONFIG"], fix
        section, key = arguments[2].split("=")[0].split(".")
        assert key in RunConfig.model_fields[section].annotation.model_fields, fix


@pytest.fixture
def by_subject():
    """Return a function that maps findings by their subject."""
    return lambda findings: {finding.subject: finding for finding in findings}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a real `.dist-info` folder in front of the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, version: str, *, packages=(), requires=()):
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "top_level.txt").write_text("\n".join(packages) + "\n")

    return install


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that puts a shell script in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def program(name: str, text: str):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    return program


@pytest.fixture
def torch_build(install, monkeypatch):
    """Return a function that puts a torch in front of the path, on a machine with or without a GPU."""

    def build(version: str, *, gpu: bool):
        install("torch", version)
        monkeypatch.setattr(repair, "has_nvidia_driver", lambda: gpu)

    return build


@pytest.fixture
def wheel(tmp_path, monkeypatch, install):
    """Trivet as a wheel leaves it: among other packages, where a Makefile may be somebody else's."""
    install("trivet", "0.1.0", requires=["torch<3,>=2.13; extra == 'train'"])
    monkeypatch.setattr(repair, "HOME", tmp_path)
