"""Commands that mend: by make in a clone, by pip in a wheel, and never a CUDA build of torch by the way."""

import re
import sys
from pathlib import Path

import pytest

from launch.doctor import known_bad, packages, repair

ROOT = Path(__file__).resolve().parents[3]
PACKAGING = {"packaging": "26.3"}
PIP = f"{sys.executable} -m pip"


def test_a_clone_is_mended_by_its_makefile(torch_build):
    torch_build("2.13.0", gpu=True)
    assert repair.reinstall() == f"make -C {ROOT} clean install"


def test_a_wheel_is_mended_by_pip_though_a_makefile_lies_there(torch_build, wheel, tmp_path):
    torch_build("2.13.0", gpu=True)
    for name in ("Makefile", "requirements.lock"):
        (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    assert repair.reinstall() == f"{PIP} install --force-reinstall 'trivet[train,serve-cpu]'"


@pytest.mark.parametrize(("version", "gpu"), [("2.5.1+cpu", False), ("2.5.1+cpu", True), ("2.5.1", False)])
def test_a_repair_keeps_a_cpu_build_of_torch_at_the_locked_version(torch_build, version, gpu):
    torch_build(version, gpu=gpu)
    [locked] = re.findall(r"^torch==.*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    [finding] = known_bad.known_bad_pairs({"torch": version} | PACKAGING)
    assert finding.fix == f"{PIP} install {locked}{repair.CPU_BUILDS}"
    assert "PIP_EXTRA_INDEX_URL" in repair.CPU_BUILDS
    [outside] = packages._outside([["torch<3,>=2.13"]], {"torch": version})
    assert outside.fix == finding.fix
    assert repair.reinstall() == f"make -C {ROOT} clean install{repair.CPU_BUILDS}"
    assert repair.reinstall(cuda=True) == f"make -C {ROOT} clean install"


def test_a_repair_of_a_cuda_build_gets_the_range_and_no_remark(torch_build):
    torch_build("2.5.1+cu124", gpu=True)
    [finding] = known_bad.known_bad_pairs({"torch": "2.5.1+cu124"} | PACKAGING)
    assert finding.fix == f"{PIP} install 'torch>=2.13,<3'"


def test_a_wheel_without_a_gpu_gets_torch_at_the_lower_bound_that_it_was_tested_with(torch_build, wheel):
    torch_build("2.14.0+cpu", gpu=False)
    command = f"{PIP} install --force-reinstall 'trivet[train,serve-cpu]' torch==2.13"
    assert repair.reinstall() == command + repair.CPU_BUILDS
    assert repair.extra("train") == f"{PIP} install 'trivet[train]'"  # the torch that is there stays
