"""A package of another's that stands before ours, and two wheels of onnxruntime in one environment."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

import trivet

ROOT = Path(__file__).resolve().parents[2]
OURS = ("trainer", "serving", "launch")


@pytest.fixture
def foreign(tmp_path):
    """Return a function that makes a package in a folder of its own, and returns that folder."""

    def make(name: str) -> Path:
        folder = tmp_path / "foreign"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("print('foreign code ran')")
        return folder

    return make


@pytest.mark.parametrize("name", OURS)
def test_a_folder_on_pythonpath_that_shadows_ours_is_named_and_never_run(command, error_of, foreign, work, name):
    folder = foreign(name)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = command("train", "tiny.yaml", "run.name=new", env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert error_of(done.stderr, alone=True) == (
        f"{name}: {folder / name} comes before Trivet's own {ROOT / name}; rename it, or take {folder} off PYTHONPATH"
    )
    assert not (work / "runs").exists()


@pytest.mark.parametrize("name", ["trainer", "serving"])
def test_a_folder_where_one_stands_is_named_by_a_rank_too(command, error_of, foreign, name):
    """`accelerate launch -m launch.train` starts ranks with `python -m`, which puts that folder first."""
    folder = foreign(name)
    done = command("x.yaml", module="launch.train", cwd=folder, env={"PYTHONSAFEPATH": ""})
    assert (done.returncode, done.stdout) == (2, "")
    message = error_of(done.stderr, alone=True)
    assert message.startswith(f"{name}: {folder / name} comes before Trivet's own")
    assert message.endswith("; rename it, stand elsewhere, or set PYTHONSAFEPATH=1")


def test_a_file_of_that_name_shadows_too(command, error_of, tmp_path):
    (tmp_path / "serving.py").write_text("print('foreign code ran')")
    done = command("--help", cwd=tmp_path, env={"PYTHONSAFEPATH": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert error_of(done.stderr, alone=True).startswith(f"serving: {tmp_path / 'serving.py'} comes before")


def test_the_commands_that_we_compose_look_past_the_folder_where_one_stands(foreign, monkeypatch):
    from launch import processes

    monkeypatch.chdir(foreign("trainer"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    done = subprocess.run([*processes.python_module("launch.train")], capture_output=True, text=True, timeout=600)
    assert done.stderr == "usage: python -m launch.train CONFIG [section.key=value ...]\n"
    _, env = processes.accelerate_command(Path("x.yaml"), [], nproc=2, parallel="ddp")
    assert env["PYTHONSAFEPATH"] == "1"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The interpreter of an environment with our packages as a wheel leaves them: files, RECORD, what they import."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in OURS:
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "trivet.py", site)
    record(site, "trivet", [f"{name}/__init__.py" for name in OURS])
    (site / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"


def record(site: Path, distribution: str, files: list[str]) -> None:
    """Write the metadata that pip leaves for a distribution with these files."""
    from base64 import urlsafe_b64encode
    from hashlib import sha256

    info = site / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    hashes = {file: urlsafe_b64encode(sha256((site / file).read_bytes()).digest()).decode()[:-1] for file in files}
    (info / "RECORD").write_text("".join(f"{file},sha256={value},1\n" for file, value in hashes.items()))


def test_a_healthy_start_does_not_read_what_every_distribution_installed(monkeypatch):
    monkeypatch.setattr(
        trivet.importlib.metadata, "packages_distributions", lambda: pytest.fail("that takes half a second")
    )
    assert trivet.foreign_packages() == []


def test_a_wheel_that_overwrote_ours_is_named(installed, error_of, tmp_path):
    site = next(installed.parents[1].glob("lib/python*/site-packages"))

    def trivet():
        command = [installed, "-m", "trivet", "--help"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # or a clone's is found first
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = trivet()
    assert done.returncode == 0, done.stderr
    (site / "launch" / "__init__.py").write_text("print('foreign code ran')")
    record(site, "ros-launch", ["launch/__init__.py"])
    done = trivet()
    assert (done.returncode, done.stdout) == (2, "")
    assert error_of(done.stderr, alone=True) == (
        f"launch: files of ros-launch lie in Trivet's {site / 'launch'}; uninstall ros-launch, "
        "then install Trivet again, in an environment of its own"
    )


@pytest.mark.parametrize(
    "arguments",
    [["export", "model", "new"], ["verify", "onnx"], ["generate", "onnx", "--prompt", "x"], ["serve", "onnx"],
     ["predict", "onnx", "--text", "x"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_both_wheels_of_onnxruntime_are_refused_before_either_is_loaded(refused, tmp_path, monkeypatch, arguments):
    (tmp_path / "onnxruntime_gpu-9.9.dist-info").mkdir()
    (tmp_path / "onnxruntime_gpu-9.9.dist-info" / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    pip, keep = f"{sys.executable} -m pip", f"onnxruntime=={version('onnxruntime')}"
    assert refused(*arguments) == (
        "onnxruntime: onnxruntime and onnxruntime-gpu overwrite each other's files; run: "
        f"{pip} uninstall -y onnxruntime onnxruntime-gpu && {pip} install --no-deps {keep}"
    )
