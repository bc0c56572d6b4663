"""`make gpu-check`: one plain word where there is no GPU, and a row for each test where there is one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_2():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("gpu-check:")]
    assert line.startswith("gpu-check: no GPU here: torch ")
    assert line.endswith("finds no CUDA device; nothing was run")


def test_make_runs_it():
    done = subprocess.run(["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "benchmarks/gpu_check.py" in done.stdout


def test_every_test_of_a_report_is_a_row_with_its_end(gpu_check, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_that_is_right(): pass\n"
        "def test_that_is_wrong(): assert 1 == 2, 'one | two'\n"
        "def test_that_cannot_be(): pytest.skip('no TensorRT')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no driver')\n"
        "def test_whose_ground_is_broken(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tmp_path]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    rows = gpu_check.rows_of(report)
    assert [(what, outcome) for what, outcome, _ in rows] == [
        ("test: test that is right", "passed"),
        ("test: test that is wrong", "FAILED"),
        ("test: test that cannot be", "skipped"),
        ("test: test whose ground is broken", "FAILED"),
    ]
    assert "one | two" in rows[1][2]
    assert "no TensorRT" in rows[2][2]
    assert "no driver" in rows[3][2]
    shown = gpu_check.table(rows)
    assert shown.count("\n| ") == 1 + len(rows)
    assert "one / two" in shown


def test_what_fails_costs_its_own_row_alone(gpu_check):
    def broken() -> str:
        raise RuntimeError("CUDA out of memory\nmore")

    assert gpu_check.tried("decode", broken) == ("decode", "FAILED", "RuntimeError: CUDA out of memory")
    assert gpu_check.tried("decode", lambda: "5 tokens/s") == ("decode", "done", "5 tokens/s")


def test_there_are_tests_for_a_gpu():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests/serving", "tests/trainer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("::test_") >= 10
