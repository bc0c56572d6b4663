"""The container files, as far as that can be seen without an engine: linted, and every name in them is real."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "containers").glob("*.Dockerfile"))
SERVE = ROOT / "containers" / "serve.Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@each_file
def test_the_linter_finds_nothing(path):
    assert lint(path) == []


def test_the_linter_is_awake(tmp_path):
    bad = tmp_path / "bad.Dockerfile"
    bad.write_text("FROM python:latest\nRUN apt-get install curl\nCMD trivet serve\n")
    assert {"DL3007", "DL3008", "DL3025"} <= {finding["code"] for finding in lint(bad)}


@each_file
def test_what_is_copied_is_there_and_is_let_through(path):
    sources = [source for words in instructions(path, "COPY") for source in words[:-1] if not source.startswith("--")]
    assert sources
    assert not [source for source in sources if not (ROOT / source).exists()]
    assert not set(sources) - {"."} - let_through()


@each_file
def test_every_extra_is_one_of_ours_on_cpu_and_on_gpu(path):
    named = re.search(r'"\.\[([^]]+)\]"', path.read_text())[1]
    for device in ("cpu", "gpu"):
        assert not set(named.replace("${DEVICE}", device).split(",")) - set(PROJECT["optional-dependencies"])


@each_file
def test_python_is_one_that_the_package_takes_and_the_image_is_pinned_by_a_tag(path):
    version, tag = re.search(r"^ARG BASE=python:(\d+\.\d+)(\S*)$", path.read_text(), re.MULTILINE).groups()
    assert tuple(map(int, version.split("."))) >= (3, 11)
    assert tag == "-slim-bookworm"


def test_the_two_lock_files_agree_so_that_both_can_constrain_one_install():
    cpu, gpu = (pins(ROOT / name) for name in ("requirements.lock", "requirements-gpu.lock"))
    assert {name: (cpu[name], gpu[name]) for name in set(cpu) & set(gpu) if cpu[name] != gpu[name]} == {}
    assert set(cpu) ^ set(gpu) == {"onnxruntime", "onnxruntime-gpu"}


@each_file
def test_the_image_starts_a_command_that_exists_in_exec_form_as_nobody_special(path):
    words = json.loads(path.read_text().partition("\nENTRYPOINT ")[2].splitlines()[0])
    assert words[0] == "trivet"
    check_command(words[1:])
    assert instructions(path, "USER")[-1] == ["1000:1000"]
    assert path.read_text().rindex("\nUSER ") > path.read_text().rindex("\nRUN ")


@each_file
def test_every_command_of_the_header_exists(path):
    ran = re.findall(r"^#   docker run .* trivet-(?:train|serve)(.*)$", path.read_text(), re.MULTILINE)
    ran += [f" {options}" for options in re.findall(r"\.\.\. trivet-serve( --\S+ \S+)", path.read_text())]
    assert ran
    for line in ran:
        check_command((["serve", "/model"] if path == SERVE else []) + shlex.split(line))


def test_the_health_check_asks_a_path_that_the_server_answers_without_a_key():
    from serving.server.app import PUBLIC_PATHS

    text = SERVE.read_text()
    port = re.search(r"^EXPOSE (\d+)$", text, re.MULTILINE)[1]
    asked = re.search(r"urlopen\('http://127\.0\.0\.1:(\d+)(/\w+)'", text)
    assert asked.groups() == (port, "/health")
    assert "/health" in PUBLIC_PATHS
    assert f'"--port", "{port}"' in text


def lint(path: Path) -> list[dict]:
    """What hadolint finds in a file, of every severity."""
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [program, "--format", "json", "--disable-ignore-pragma", path], capture_output=True, text=True
    )
    return json.loads(done.stdout)


def instructions(path: Path, name: str) -> list[list[str]]:
    """The words of each instruction of that name, continuation lines joined."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{name} ")]


def let_through() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line[1:] for line in lines if line.startswith("!")}


def pins(lock: Path) -> dict[str, str]:
    return dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)


def check_command(words: list[str]) -> None:
    """Fail unless `trivet WORDS` is a command line that Trivet takes."""
    from launch.cli import app

    if words:
        command = typer.main.get_command(app).commands[words[0]]
        assert command.make_context(words[0], words[1:]).params
    assert not [word for word in words if word.startswith("configs/") and not (ROOT / word).is_file()]
