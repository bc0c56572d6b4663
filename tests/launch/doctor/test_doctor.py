"""The whole of `trivet doctor`: exit code, table, JSON, secrets, checks that break, hang or die."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launch import doctor
from launch.doctor import accelerators, apart, findings, packages, repair
from launch.doctor.findings import Finding

CANARY = "canary-Zq7w"
SECRETS = {
    "HF_TOKEN": CANARY,
    "OPENAI_API_KEY": CANARY,
    "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:1",
    "http_proxy": f"http://user:{CANARY}@127.0.0.1:1",
    "PIP_INDEX_URL": f"https://user:{CANARY}@packages.example/simple",
    "HF_ENDPOINT": f"http://user:{CANARY}@127.0.0.1:1",
    "RAY_ADDRESS": f"ray://user:{CANARY}@10.0.0.1:10001",
    "GLOO_SOCKET_IFNAME": CANARY,
}


@pytest.fixture
def quick(monkeypatch):
    """Leave out the two children that import torch and onnxruntime."""
    monkeypatch.setattr(apart, "in_child", lambda *arguments, **named: [])


@pytest.mark.parametrize(("state", "code"), [("problem", 1), ("note", 0), ("ok", 0)])
def test_the_exit_code_is_1_exactly_when_a_problem_was_found(monkeypatch, capsys, state, code):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("disk", "[no] space", state, "cd /tmp")])
    assert doctor.doctor(json_output=True) == code
    assert json.loads(capsys.readouterr().out)["healthy"] is (code == 0)
    assert doctor.doctor() == code
    assert "[no] space" in capsys.readouterr().out


def test_the_command_line_prints_json_and_nothing_else(trivet, quick):
    code, out, err = trivet("doctor", "--json")
    report = json.loads(out)
    assert code == (0 if report["healthy"] else 1)
    assert (report["format_version"], err) == (1, "")
    assert {"healthy", "format_version", "trivet", "findings"} == report.keys()
    for finding in report["findings"]:
        assert finding.keys() == {"area", "subject", "found", "state", "fix", "value", "unit"}
        assert finding["state"] in ("ok", "note", "problem")
        assert (finding["value"] is None) == (finding["unit"] == "")
    assert [*dict.fromkeys(f["area"] for f in report["findings"])] == ["machine", "packages", "disk", "network", "ray"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_secret_of_the_environment_is_ever_printed(trivet, quick, monkeypatch, options):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    code, out, err = trivet("doctor", *options)
    assert code == 1  # GLOO_SOCKET_IFNAME is a problem; it and RAY_ADDRESS are shown
    assert "10.0.0.1:10001" in out
    assert CANARY not in out + err


def test_a_password_is_hidden_in_a_url_and_wherever_else_it_stands(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "user:p%40ssword@proxy:3128")
    said = Finding("x", "https://me:other@host/path; p%40ssword; p@ssword; me", fix="export A=p@ssword")
    hidden = findings.without_secrets(said)
    assert hidden.found == "https://***@host/path; ***; ***; me"
    assert hidden.fix == "export A=***"


def test_short_values_of_secret_variables_do_not_blank_out_words(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "disk")
    assert findings.without_secrets(Finding("disk", "disk")).found == "disk"


def test_a_check_that_breaks_is_reported_and_the_others_still_run(monkeypatch, quick):
    monkeypatch.setattr(doctor, "shadows", lambda: 1 / 0)
    found = {finding.subject: finding for finding in doctor.examine()}
    assert found["this check"].found.startswith("ZeroDivisionError")
    assert found["this check"].state == "problem"
    assert "disk" in found


def test_a_check_that_hangs_is_left_behind_and_reported():
    def dead_drive():
        time.sleep(60)
        return []

    started = time.monotonic()
    [finding] = apart.bounded(functools.partial(dead_drive), 0.2)
    assert time.monotonic() - started < 30
    assert (finding.subject, finding.state) == ("dead drive", "problem")
    assert "0.2 s" in finding.found


@pytest.mark.parametrize(
    ("area", "module", "name"),
    [
        ("machine", accelerators, "nvidia_gpus"),
        ("packages", packages, "installed_and_own"),
        ("disk", doctor, "_disk_checks"),
    ],
)
@pytest.mark.parametrize("hangs", [True, False])
def test_what_is_asked_before_the_checks_may_hang_or_break_too(monkeypatch, area, module, name, hangs):
    def question():
        time.sleep(60 if hangs else 0)
        raise RuntimeError("no driver")

    question.__name__ = name
    monkeypatch.setattr(module, name, question)
    monkeypatch.setattr(doctor, "LIMIT_S", 0.2 if hangs else 15.0)
    started = time.monotonic()
    areas = {name: checks for name, checks, _ in doctor._areas()}
    assert time.monotonic() - started < 50
    found = {finding.subject: finding for check in areas[area] for finding in check()}
    finding = found[name.strip("_").replace("_", " ")]
    assert finding.state == "problem"
    assert ("no answer within 0.2 s" if hangs else "RuntimeError: no driver") in finding.found


def test_a_driver_that_hangs_is_a_problem_that_pip_does_not_mend(monkeypatch, program):
    program("nvidia-smi", "exec sleep 60")
    monkeypatch.setattr(accelerators, "DRIVER_LIMIT_S", 0.2)
    [(_, checks, _), *_] = doctor._areas()
    [finding] = [finding for check in checks for finding in check() if finding.subject == "nvidia gpus"]
    assert (finding.state, finding.fix) == ("problem", accelerators.HANGING_DRIVER)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Return a function that saves a module and asks its function `look` in a child process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def ask(body: str, limit_s: float = 60.0):
        (tmp_path / "made_up_check.py").write_text(
            f"import os, signal, sys, time\nfrom launch.doctor.findings import Finding\n\ndef look(word):\n    {body}\n"
        )
        return apart.in_child("made_up_check", "look", limit_s, word="said")

    return ask


def test_a_child_answers_whatever_its_libraries_print(child):
    body = "print('noise'); os.write(1, b'more'); return [Finding(word, 'ok', value=1.5, unit='s')]"
    assert child(body) == [Finding("said", "ok", value=1.5, unit="s")]


def test_a_child_that_is_killed_by_its_libraries_is_a_problem(child):
    [finding] = child("os.kill(os.getpid(), signal.SIGSEGV)")
    assert finding.state == "problem"
    assert signal.SIGSEGV.name in finding.found


def test_a_child_that_breaks_is_a_problem_with_the_reason(child):
    [finding] = child("raise ImportError('libcublas.so.13: cannot open shared object file')")
    assert finding.found == "ImportError: libcublas.so.13: cannot open shared object file"
    assert finding.fix == repair.reinstall()


def test_a_child_that_hangs_is_ended(child):
    [finding] = child("time.sleep(100)", limit_s=2.0)
    assert "no answer within 2 s" in finding.found


def test_a_child_does_not_import_a_package_from_where_the_user_stands(child, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "__init__.py").write_text("raise SystemExit('wrong trainer')")
    monkeypatch.chdir(folder)
    assert child("import trainer; return [Finding(word, trainer.__name__)]")[0].found == "trainer"


def test_a_folder_that_was_removed_under_the_user_is_a_problem(tmp_path, monkeypatch, quick):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    found = {finding.subject: finding for finding in doctor.examine()}
    assert (found["disk"].state, found["disk"].fix) == ("problem", "cd")


def test_problems_come_again_at_the_end_each_with_its_command_on_one_line(monkeypatch, capsys):
    command = f"{sys.executable} -m pip install " + " ".join(f"some-long-package-{i}" for i in range(9))
    said = [
        Finding("onnx", "too old " * 20, "problem", command, area="packages"),
        Finding("disk", "slow", "note", "cd /tmp", area="disk"),
        Finding("memory", "enough", area="machine"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: said)
    monkeypatch.setenv("COLUMNS", "80")
    doctor.doctor()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "pip install" in line] == [f"  $ {command}"]
    assert lines.index(f"  $ {command}") > lines.index("1 problem:") > lines.index("          $ cd /tmp")
    assert {"packages", "disk", "machine"} <= set(lines)
    table = lines[: lines.index("1 problem:")]
    assert max(len(line) for line in table) <= 80


@pytest.mark.slow
def test_the_whole_doctor_runs_the_kernels_of_this_machine_and_shows_no_secret(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "launch.cli", "doctor", "--json"]
    environ = {**os.environ, **SECRETS, "PYTHONPATH": str(repair.HOME), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["attention float32"]["state"] == "ok"
    assert found["collectives (gloo)"]["state"] == "ok"
    assert found["decoding on cpu"]["state"] == "ok"
    assert found["Ray cluster"]["state"] == "note"
    assert CANARY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
