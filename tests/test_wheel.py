"""What travels in the wheel and what it asks for; and, slow, that it works in empty environments outside the clone."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "serving", "launch")
LOCK = ROOT / "requirements.lock"
QUESTION = "What does `textwrap.dedent` do?"


@dataclass(frozen=True)
class Install:
    """An environment with the wheel in it, and an empty folder to stand in."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "venv" / "bin" / "trivet"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def trivet(self, *arguments: object, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        return run([self.program, *arguments], cwd=self.work, timeout=timeout_s)

    def pip(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        pip = [self.program.with_name("python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        return run([*pip, *arguments], cwd=self.folder)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from that."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


# --- without a network -----------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_packages_with_page_and_configs_and_nothing_else(wheel):
    expected = {"trivet.py"}
    for package in PACKAGES:
        expected |= {str(path.relative_to(ROOT)) for path in files_under(ROOT / package)}
    expected |= {f"launch/{path.relative_to(ROOT)}" for path in files_under(ROOT / "configs")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"serving/server/page/index.html", "launch/configs/accelerate/ddp.yaml"} <= held


def test_the_wheel_carries_its_license_and_starts_at_the_door(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "trivet = trivet:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_wheel_of_an_image_is_the_wheel_of_the_repository(wheel, tmp_path):
    """What .dockerignore keeps from the container files is in no wheel."""
    context = tmp_path / "context"
    context.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if (name := line.removeprefix("!")) != line:
            source, target = ROOT / name, context / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    build(context, tmp_path / "dist")
    image_wheel = next((tmp_path / "dist").glob("*.whl"))
    assert set(zipfile.ZipFile(image_wheel).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_source_distribution_holds_what_tests_and_images_are_made_from(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "requirements.lock", "trivet.py"}
    wanted |= {"tests/test_wheel.py", "configs/sft_lora.yaml", "containers/serve.Dockerfile", ".dockerignore"}
    assert not wanted - held
    assert not [name for name in held if re.match(r"(runs|dist|\.venv)/|.*__pycache__", name)]


def test_the_metadata_says_what_a_package_index_shows(metadata):
    assert (metadata["Name"], metadata["License-Expression"]) == ("trivet", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    extras = {"train", "export", "serve-cpu", "serve-gpu", "sweep", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))


def test_an_install_for_serving_asks_for_no_torch(metadata):
    heavy = {"torch", "transformers", "ray", "accelerate", "onnx"}
    asked = {
        extra: {each.name for each in requirements_of(metadata, extra)} for extra in metadata.get_all("Provides-Extra")
    }
    assert not heavy & (asked["serve-cpu"] | asked["serve-gpu"])
    assert heavy <= asked["train"] | asked["sweep"]


def test_the_locked_versions_are_those_that_the_package_asks_for(metadata):
    locked = dict(line.split("==") for line in LOCK.read_text().splitlines() if "==" in line)
    locked = {normal(name): version for name, version in locked.items()}
    asked = [each for extra in ("train", "serve-cpu", "sweep", "dev") for each in requirements_of(metadata, extra)]
    assert len(asked) > 30
    assert {normal(each.name) for each in asked} <= set(locked)
    assert not [str(each) for each in asked if locked[normal(each.name)] not in each.specifier]


def build(source: Path, folder: Path) -> None:
    """Build the source distribution and from it the wheel, with the backend that is installed here."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def requirements_of(metadata: Message, extra: str) -> list[Requirement]:
    """What an extra asks for, the extras that it names and what every install gets included."""
    asked = [Requirement(each) for each in metadata.get_all("Requires-Dist", [])]
    asked = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]
    named = [each for part in asked if part.name == "trivet" for each in part.extras]
    inner = [each for name in named for each in requirements_of(metadata, name)]
    return [each for each in asked if each.name != "trivet"] + inner


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- in empty environments -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(wheel, tmp_path_factory) -> Install:
    """An environment that trains, exports and serves."""
    torch = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    return install(tmp_path_factory.mktemp("whole"), torch, f"{wheel}[train,serve-cpu]")


@pytest.fixture(scope="module")
def serving(wheel, tmp_path_factory) -> Install:
    """An environment that only serves."""
    return install(tmp_path_factory.mktemp("serving"), f"{wheel}[serve-cpu]")


@pytest.fixture(scope="module")
def onnx_dir(whole) -> Path:
    """What the quickstart of the wheel exported."""
    done = whole.trivet("quickstart", "--tiny", timeout_s=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every claim holds" in done.stderr
    return whole.work / "runs" / "quickstart" / "onnx"


@pytest.mark.slow
def test_the_wheel_lays_out_the_example_configs_and_trains_one(whole):
    assert whole.trivet("init").returncode == 0
    assert len(list((whole.work / "configs").rglob("*.yaml"))) == len(list((ROOT / "configs").rglob("*.yaml")))
    done = whole.trivet("train", "configs/pretrain_tiny.yaml", "run.steps=20", "run.name=short")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (whole.work / "runs" / "short" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_without_a_clone(onnx_dir):
    assert (onnx_dir.parent / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_an_install_for_serving_has_no_torch_and_proves_and_generates(serving, onnx_dir):
    names = {normal(each["name"]) for each in json.loads(serving.pip("list", "--format=json").stdout)}
    assert not names & {"torch", "transformers", "ray", "accelerate", "onnx", "openai"}
    assert {"trivet", "onnxruntime", "tokenizers"} <= names
    assert serving.trivet("verify", onnx_dir).returncode == 0
    assert serving.trivet("generate", onnx_dir, "--prompt", QUESTION).stdout.strip()


@pytest.mark.slow
def test_an_install_for_serving_answers_a_chat_and_shows_its_page(serving, onnx_dir):
    command = [serving.program, "serve", onnx_dir, "--port", "0"]
    server = subprocess.Popen(command, cwd=serving.work, env=outside(), stderr=subprocess.PIPE, text=True)
    try:
        url = server.stderr.readline().split()[-1]
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            assert json.load(response)["usage"]["completion_tokens"] > 0
        with urllib.request.urlopen(url, timeout=600) as response:
            assert b"</html>" in response.read()
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train configs/pretrain_tiny.yaml", "train"),
        ("train configs/pretrain_tiny.yaml --nproc 2", "train"),
        ("quickstart --tiny", "train"),
        ("sweep configs/sweep_strategies.yaml", "sweep"),
    ],
)
def test_what_an_install_for_serving_lacks_is_one_line_with_the_extra(serving, command, extra):
    serving.trivet("init")
    done = serving.trivet(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"pip install 'trivet[{extra}]'\n")
    assert done.stderr.count("\n") == 1
    assert not (serving.work / "runs").exists()


def install(folder: Path, *requirements: str) -> Install:
    """Make an empty environment and install the requirements one by one, at the versions of the lock file."""
    made = Install(folder)
    venv.create(folder / "venv", with_pip=True)
    made.work.mkdir()
    probe = made.pip("install", "--no-deps", "typing_extensions", "-c", LOCK)
    if probe.returncode != 0:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    for requirement in requirements:
        done = made.pip("install", "-q", requirement, "-c", LOCK)
        assert done.returncode == 0, done.stderr[-3000:]
    return made


def run(command: list[object], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], env=outside(), capture_output=True, text=True, **options)


def outside() -> dict[str, str]:
    """The environment, without what leads Python back to the clone."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"DS_BUILD_OPS": "0"}
