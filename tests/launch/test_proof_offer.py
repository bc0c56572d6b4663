"""`trivet serve` on a directory without a valid proof: it offers to verify on a terminal, and refuses elsewhere."""

import io
import json
import sys

import pytest

import launch.export
from launch.export import offer_verification
from serving.directory import identity, write_json
from serving.proofs import Unproven
from serving.session import onnxruntime_version


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def onnx_dir(tmp_path):
    """A sealed directory that nothing was proven of."""
    write_json(tmp_path / "trivet.json", {"format_version": 2, "kind": "onnx", "files": {}})
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Return a function that sits at a terminal and answers; it returns the directories that were then verified."""

    def answer(text: str) -> list:
        verified: list = []
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(launch.export, "verify_again", lambda folder, provider: verified.append((folder, provider)))
        return verified

    return answer


def test_yes_verifies_for_the_provider_that_will_serve(onnx_dir, asked):
    verified = asked("\n")
    offer_verification(onnx_dir, "cpu")
    assert verified == [(onnx_dir, "cpu")]
    shown = sys.stderr.getvalue()
    assert f"{onnx_dir}: never verified; run: trivet verify {onnx_dir} --provider cpu\nVerify it now?" in shown


def test_no_is_the_error_with_the_command(onnx_dir, asked):
    verified = asked("n\n")
    with pytest.raises(Unproven, match="run: trivet verify"):
        offer_verification(onnx_dir, "cpu")
    assert verified == []


def test_a_folder_without_a_manifest_is_asked_about_and_no_crash(onnx_dir, asked):
    (onnx_dir / "trivet.json").unlink()
    asked("n\n")
    with pytest.raises(Unproven, match="never verified"):
        offer_verification(onnx_dir, "cpu")


def test_a_failed_proof_is_not_offered_again(onnx_dir, asked):
    verified = asked("y\n")
    record = {"provider": "cpu", "onnxruntime": onnxruntime_version(), "identity": identity(onnx_dir), "passed": False}
    write_json(onnx_dir / "verification.json", {"format_version": 2, "records": [record]})
    offer_verification(onnx_dir, "cpu")
    assert verified == []


def test_a_proof_that_no_cpu_can_give_is_not_offered(onnx_dir, asked):
    write_json(onnx_dir / "trivet.json", {"format_version": 2, "kind": "onnx", "files": {}, "dtype": "bf16"})
    write_json(onnx_dir / "verification.json", {"format_version": 2, "records": [{"provider": None}]})
    verified = asked("y\n")
    offer_verification(onnx_dir, "cpu")
    assert verified == []


def test_what_is_stale_is_offered(onnx_dir, asked):
    verified = asked("y\n")
    record = {"provider": "cpu", "onnxruntime": "0.1", "identity": identity(onnx_dir), "passed": True}
    write_json(onnx_dir / "verification.json", {"format_version": 2, "records": [record]})
    offer_verification(onnx_dir, "cpu")
    assert len(verified) == 1
    record["onnxruntime"] = onnxruntime_version()
    write_json(onnx_dir / "verification.json", {"format_version": 2, "records": [record]})
    offer_verification(onnx_dir, "cpu")
    assert len(verified) == 1, "what is proven is not asked about"


def test_nobody_is_asked_where_nobody_sits(onnx_dir, asked, monkeypatch):
    verified = asked("y\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    offer_verification(onnx_dir, "cpu")
    assert (verified, sys.stderr.getvalue()) == ([], "")
    assert json.loads((onnx_dir / "trivet.json").read_text())["kind"] == "onnx"


def test_a_proof_that_fails_ends_the_command(onnx_dir, asked, monkeypatch):
    import typer

    asked("y\n")
    monkeypatch.setattr(launch.export, "verify_again", lambda folder, provider: 1)
    with pytest.raises(typer.Exit) as ended:
        offer_verification(onnx_dir, "cpu")
    assert ended.value.exit_code == 1
