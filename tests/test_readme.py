"""The README's commands are real: each names a command, options and files that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() if line.startswith("trivet ")]


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"\b(?:configs|trainer|serving|launch|tests|benchmarks)/[\w/]+\.\w+", README))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_takes_these_options(words):
    import typer

    from launch.cli import app

    command = typer.main.get_command(app).commands[words[1]]
    context = command.make_context(words[1], words[2:])
    assert context.params


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([\w-]+)", README))))
def test_every_make_target_of_the_readme_exists(target):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_quickstart_holds_every_claim(tmp_path):
    command = [sys.executable, "-m", "launch.cli", "quickstart", "--tiny", "--dir", str(tmp_path / "quickstart")]
    ended = subprocess.run(command, cwd=tmp_path, env=None, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "every claim holds" in ended.stderr
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 10_000
