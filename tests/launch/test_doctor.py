"""The doctor on made-up machines: distributions are written as real `.dist-info` folders in front of the path."""

import json
import subprocess
import sys
import types

import pytest

from launch import doctor

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
COMPLETE = {"trivet": "0.1.0", "accelerate": "1.15.0", "onnx": "1.23.2", "onnxruntime": "1.31.1", "fastapi": "0.165.0"}


def test_a_complete_extra_is_listed_with_the_versions_of_the_extras_it_names():
    findings = by_subject(doctor.extras(COMPLETE, REQUIREMENTS))
    assert findings["train (training)"].found == "accelerate 1.15.0, onnx 1.23.2"
    assert findings["serve-cpu (serving on CPUs)"].found == "onnxruntime 1.31.1, fastapi 0.165.0"


def test_a_missing_extra_is_a_note_with_the_command_that_installs_it():
    finding = by_subject(doctor.extras(COMPLETE, REQUIREMENTS))["sweep (sweeps)"]
    assert (finding.state, finding.fix) == ("note", "pip install 'trivet[sweep]'")
    assert "ray" in finding.found


def test_a_version_outside_the_range_is_a_problem_that_names_the_range():
    findings = doctor.extras({**COMPLETE, "onnx": "2.0.0"}, REQUIREMENTS)
    wrong = by_subject(findings)["onnx"]
    assert wrong.state == "problem"
    assert "2.0.0; Trivet needs onnx<2,>=1.23" in wrong.found


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
    subjects = [f.subject.split()[0] for f in doctor.extras(installed, REQUIREMENTS, gpu=gpu)]
    assert [name for name in subjects if name.startswith("serve")] == [advised]


def test_two_onnxruntime_wheels_are_a_problem_whose_fix_removes_both_and_installs_one():
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    [finding] = doctor.wheel_clash(both, gpu=True)
    assert finding.state == "problem"
    assert "uninstall -y onnxruntime onnxruntime-gpu" in finding.fix
    assert finding.fix.endswith("install --no-deps onnxruntime-gpu==1.31.1")
    [finding] = doctor.wheel_clash(both, gpu=False)
    assert finding.fix.endswith("install --no-deps onnxruntime==1.31.1")


def test_one_onnxruntime_wheel_is_no_clash():
    assert doctor.wheel_clash({"onnxruntime-gpu": "1.31.1"}, gpu=True) == []


def test_a_foreign_distribution_with_a_package_named_trainer_is_a_problem(tmp_path, monkeypatch):
    install(tmp_path, "coqui-trainer", "0.3.1", packages=["trainer"])
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = by_subject(doctor.shadows())["trainer"]
    assert finding.state == "problem"
    assert finding.fix.endswith("uninstall coqui-trainer")


def test_a_folder_named_serving_in_front_of_the_path_is_a_problem(tmp_path):
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").touch()
    script = (
        f"import sys, launch.doctor as d; sys.path.insert(0, {str(tmp_path)!r}); print([f.found for f in d.shadows()])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert f"imported from {tmp_path / 'serving'}" in done.stdout


def test_distribution_names_are_normalised(tmp_path, monkeypatch):
    install(tmp_path, "Some_Dotted.Name", "1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.installed_versions()["some-dotted-name"] == "1.0"


def test_cuda_that_is_offered_but_does_not_load_is_a_problem(monkeypatch):
    fake = fake_onnxruntime(offered=["CUDAExecutionProvider", "CPUExecutionProvider"], loads=["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    [finding] = doctor.onnxruntime_providers(gpus=["NVIDIA L4"])
    assert finding.state == "problem"
    assert "does not load" in finding.found


def test_an_onnxruntime_whose_files_were_removed_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    [finding] = doctor.onnxruntime_providers(gpus=[])
    assert finding.state == "problem"
    assert "--force-reinstall" in finding.fix


def test_the_identity_graph_runs_on_the_real_cpu_provider():
    onnxruntime = pytest.importorskip("onnxruntime")
    assert doctor._takes_a_session(onnxruntime, "CPUExecutionProvider")


def test_a_gpu_that_torch_cannot_use_is_a_problem():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this torch can use its GPU")
    [finding] = doctor.torch_devices(gpus=["NVIDIA L4"])
    assert finding.state == "problem"


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LITTLE_DISK_BYTES", 10**18)
    assert doctor.disk(tmp_path)[0].state == "problem"


def test_a_check_that_breaks_is_reported_and_the_others_still_run(monkeypatch):
    monkeypatch.setattr(doctor, "shadows", lambda: 1 / 0)
    findings = by_subject(doctor.examine())
    assert findings["this check"].found.startswith("ZeroDivisionError")
    assert "disk" in findings


@pytest.mark.parametrize(("state", "code"), [("problem", 1), ("note", 0), ("ok", 0)])
def test_the_exit_code_is_1_exactly_when_a_problem_was_found(monkeypatch, capsys, state, code):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("disk", "[no] space", state, "free some")])
    assert doctor.doctor(json_output=True) == code
    assert json.loads(capsys.readouterr().out)["healthy"] is (code == 0)
    assert doctor.doctor() == code
    assert "[no] space" in capsys.readouterr().out


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def install(folder, name, version, packages=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("\n".join(packages) + "\n")


def fake_onnxruntime(offered, loads):
    class Session:
        def __init__(self, model, options, providers):
            self.providers = providers

        def get_providers(self):
            return [name for name in self.providers if name in loads] or ["CPUExecutionProvider"]

    return types.SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=types.SimpleNamespace,
        InferenceSession=Session,
        get_available_providers=lambda: offered,
    )
