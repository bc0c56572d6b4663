"""Installed distributions: extras, two owners of one folder, known-bad pairs, requirements that others break."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import InvalidVersion

import trivet
from launch.doctor import clashes, known_bad, packages, requirements

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = [
    "pydantic<3,>=2.14",
    "accelerate<2,>=1.15; extra == 'train'",
    "trivet[export]; extra == 'train'",
    "onnx<2,>=1.23; extra == 'export'",
    "onnxruntime<2,>=1.31; extra == 'serve-cpu'",
    "trivet[serve-common]; extra == 'serve-cpu'",
    "onnxruntime-gpu<2,>=1.31; extra == 'serve-gpu'",
    "fastapi<1,>=0.165; extra == 'serve-common'",
    "ray[tune]<2.61,>=2.60; extra == 'sweep'",
]
COMPLETE = {
    "trivet": "0.1.0",
    "packaging": "26.3",
    "accelerate": "1.15.0",
    "onnx": "1.23.2",
    "onnxruntime": "1.31.1",
    "fastapi": "0.165.0",
}
PACKAGING = {"packaging": "26.3"}
PIP = f"{sys.executable} -m pip"
# Versions that bring out each pair, from the affected ranges of its source.
BAD_VERSIONS = [
    {"torch": "2.5.1+cpu"},
    {"torch": "2.9.1+cu128"},
    {"transformers": "5.0.0rc2", "torch": "2.5.1"},
    {"transformers": "4.57.6", "huggingface-hub": "1.0.0"},
    {"optimum-onnx": "0.1.0", "transformers": "5.23.0"},
    {"onnx": "1.20.1"},
    {"onnx": "1.23.2", "protobuf": "5.29.5"},
    {"numpy": "2.4.6", "pandas": "2.2.1"},
    {"numpy": "2.4.6", "onnxruntime": "1.18.1"},
    {"numpy": "2.4.6", "onnxruntime-gpu": "1.18.1"},
    {"onnxruntime-genai": "0.18.0", "onnxruntime-gpu": "1.31.1"},
    {"onnxruntime-gpu": "1.31.1", "nvidia-cublas-cu12": "12.8.4.1"},
    {"ray": "2.53.0"},
]


def test_a_complete_extra_is_listed_with_the_versions_of_the_extras_it_names(by_subject):
    findings = by_subject(packages.extras(COMPLETE, REQUIREMENTS))
    assert findings["train (training)"].found == "accelerate 1.15.0, onnx 1.23.2"
    assert findings["serve-cpu (serving on CPUs)"].found == "onnxruntime 1.31.1, fastapi 0.165.0"


def test_a_missing_extra_is_a_note_with_the_command_that_installs_it(by_subject):
    finding = by_subject(packages.extras(COMPLETE, REQUIREMENTS))["sweep (sweeps)"]
    assert (finding.state, finding.fix) == ("note", f"{sys.executable} -m pip install 'trivet[sweep]'")
    assert "ray" in finding.found


def test_a_version_outside_the_range_is_a_problem_that_names_the_range(by_subject):
    wrong = by_subject(packages.extras({**COMPLETE, "onnx": "2.0.0"}, REQUIREMENTS))["onnx"]
    assert wrong.state == "problem"
    assert "2.0.0; Trivet needs onnx<2,>=1.23" in wrong.found
    assert wrong.fix.endswith("install 'onnx<2,>=1.23'")


def test_a_version_outside_the_range_is_found_though_the_rest_of_the_extra_is_missing(by_subject):
    installed = {"trivet": "0.1.0", "packaging": "26.3", "accelerate": "2.0.0"}
    findings = by_subject(packages.extras(installed, REQUIREMENTS))
    assert findings["train (training)"].found == "not installed: onnx"
    assert findings["accelerate"].state == "note"  # who only serves may have it for something else


def test_an_installation_without_packaging_is_looked_at_as_far_as_that_goes(monkeypatch, by_subject):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # importing it fails
    installed = {"trivet": "0.1.0", "accelerate": "2.0.0"}
    assert by_subject(packages.extras(installed, REQUIREMENTS))["train (training)"].state == "note"
    assert known_bad.known_bad_pairs(installed) == []
    [finding] = requirements.broken_requirements(installed, REQUIREMENTS)
    assert (finding.state, finding.fix) == ("note", f"{sys.executable} -m pip install packaging")


@pytest.mark.parametrize(
    ("wheel", "gpu", "advised"),
    [
        ("onnxruntime", True, "serve-cpu"),
        ("onnxruntime-gpu", False, "serve-gpu"),
        (None, True, "serve-gpu"),
        (None, False, "serve-cpu"),
    ],
)
def test_only_the_wheel_that_fits_is_ever_advised(wheel, gpu, advised):
    installed = {"trivet": "0.1.0"} | ({wheel: "1.31.1"} if wheel else {})
    subjects = [f.subject.split()[0] for f in packages.extras(installed, REQUIREMENTS, gpu=gpu)]
    assert [name for name in subjects if name.startswith("serve")] == [advised]


def test_distribution_names_are_normalised(install):
    install("Some_Dotted.Name", "1.0")
    assert packages.installed_versions()["some-dotted-name"] == "1.0"


def test_of_two_copies_the_one_that_is_imported_counts(install):
    install("torch", "1.0")
    assert packages.installed_versions()["torch"] == "1.0"


def test_two_onnxruntime_wheels_are_a_problem_whose_fix_removes_both_and_installs_one():
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    [finding] = clashes.wheel_clash(both, gpu=True)
    assert finding.state == "problem"
    assert "uninstall -y onnxruntime onnxruntime-gpu" in finding.fix
    assert finding.fix.endswith("install --no-deps onnxruntime-gpu==1.31.1")
    [finding] = clashes.wheel_clash(both, gpu=False)
    assert finding.fix.endswith("install --no-deps onnxruntime==1.31.1")


def test_one_onnxruntime_wheel_is_no_clash():
    assert clashes.wheel_clash({"onnxruntime-gpu": "1.31.1"}, gpu=True) == []


def test_a_foreign_distribution_with_a_package_named_trainer_is_a_problem(install, by_subject):
    install("coqui-trainer", "0.3.1", packages=["trainer"])
    finding = by_subject(clashes.shadows())["trainer"]
    assert finding.state == "problem"
    assert finding.fix.endswith("uninstall -y coqui-trainer")


def test_a_folder_named_serving_in_front_of_the_path_is_a_problem(tmp_path):
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").touch()
    script = (
        "import sys, launch.doctor as d; from importlib import invalidate_caches; sys.modules.pop('serving', None); "
        f"sys.path.insert(0, {str(tmp_path)!r}); print([f.found for f in d.shadows()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert f"{tmp_path / 'serving'} comes before Trivet's own" in done.stdout, done.stderr


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_a_foreign_package_that_pip_installed_is_uninstalled_on_debian_too(tmp_path, monkeypatch, folder):
    site = tmp_path / folder
    (site / "serving").mkdir(parents=True)
    (site / "serving" / "__init__.py").touch()
    (site / "model_serving-1.0.dist-info").mkdir()
    (site / "model_serving-1.0.dist-info" / "METADATA").write_text("Name: model-serving\nVersion: 1.0\n")
    (site / "model_serving-1.0.dist-info" / "top_level.txt").write_text("serving\n")
    script = (
        f"import sys, launch.doctor as d, trivet; sys.modules.pop('serving', None); sys.path.insert(0, {str(site)!r}); "
        "print(trivet.foreign_package()); print(d.shadows()[0].fix)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
    line, fix = done.stdout.splitlines()
    assert f"run: {PIP} uninstall model-serving (or" in line
    assert fix == f"{PIP} uninstall -y model-serving"


def test_a_package_whose_files_another_wheel_overwrote_is_a_problem(monkeypatch, wheel, by_subject):
    monkeypatch.setattr(trivet, "_was_overwritten", lambda file: file == "launch/__init__.py")
    monkeypatch.setattr(trivet, "foreign_owners", lambda name: ["ros-launch"] if name == "launch" else [])
    finding = by_subject(clashes.shadows())["launch"]
    assert (finding.state, "files of ros-launch lie in Trivet's" in finding.found) == ("problem", True)
    assert finding.fix == f"{PIP} uninstall -y ros-launch && {PIP} install --force-reinstall --no-deps trivet"


@pytest.mark.parametrize("versions", BAD_VERSIONS, ids=lambda versions: "+".join(versions))
def test_each_known_bad_pair_is_found_from_its_versions(versions):
    found = [pair for pair in known_bad.PAIRS if pair.versions.keys() == versions.keys()]
    findings = known_bad.known_bad_pairs(versions | PACKAGING)
    assert any(pair.why in finding.found for pair in found for finding in findings)
    assert all(finding.state != "ok" and finding.fix for finding in findings)


def test_every_known_bad_pair_has_versions_here_that_bring_it_out():
    found = {finding.found for versions in BAD_VERSIONS for finding in known_bad.known_bad_pairs(versions | PACKAGING)}
    assert {pair.why for pair in known_bad.PAIRS} == {text.split("; source: ")[0] for text in found}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-gpu.lock"])
def test_the_versions_of_our_own_lock_files_are_no_known_bad_pair(lock):
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE)
    assert len(pinned) > 50
    assert known_bad.known_bad_pairs({packages.normalised(name): version for name, version in pinned}) == []


def test_what_is_asked_before_anything_else_needs_the_standard_library_only():
    script = "import sys, launch.doctor; print(sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
    loaded = set(eval(done.stdout))
    assert not loaded & {"torch", "numpy", "rich", "pydantic", "packaging", "typer", "yaml", "onnxruntime", "ray"}


def test_what_is_no_version_lies_in_no_range_and_breaks_no_check(install, by_subject):
    install("torch", "no version")
    installed = {"torch": "no version"} | PACKAGING
    assert known_bad.known_bad_pairs(installed) == []
    assert by_subject(packages._outside([["torch<3,>=2.13"]], installed))["torch"].state == "problem"

    class Older:
        """The range of an older packaging, which raises instead."""

        def contains(self, version, prereleases):
            raise InvalidVersion(version)

    assert packages.contains(Older(), "no version") is False
