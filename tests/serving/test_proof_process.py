"""The proof in a process of its own says and refuses what the proof in this one does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving import proof_process
from serving.directory import BadInput
from serving.export import VerificationFailed, export_model
from serving.proof_process import prove_apart
from serving.verify import prove

ROOT = Path(__file__).parents[2]


def test_the_record_and_the_stages_are_those_of_a_proof_in_this_process(onnx_dir):
    stages, stages_apart = [], []
    here, apart = prove(onnx_dir, progress=stages.append), prove_apart(onnx_dir, "cpu", progress=stages_apart.append)
    assert apart["checks"] == here["checks"]
    assert (apart["passed"], apart["identity"], apart["onnxruntime"]) == (True, here["identity"], here["onnxruntime"])
    assert stages_apart == stages


def test_what_the_proof_refuses_is_refused_here(onnx_copy):
    with (onnx_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadInput, match=r"model\.onnx: altered since it was written"):
        prove_apart(onnx_copy, "cpu", progress=print)


def test_a_proof_that_is_killed_is_told_and_publishes_nothing(model_dir, tmp_path, monkeypatch):
    from serving.export import proof

    class Killed(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.send_signal(signal.SIGKILL)

    monkeypatch.setattr(proof_process.subprocess, "Popen", Killed)
    monkeypatch.setattr(proof, "LARGE_BYTES", 0)
    with pytest.raises(BadInput, match="ended with -9, so nothing was published; is there too little memory"):
        export_model(model_dir("gpt2"), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_a_proof_that_ends_otherwise_is_told_without_a_guess(onnx_dir, monkeypatch):
    monkeypatch.setattr(proof_process.sys, "executable", shutil.which("false"))
    told = "the process of the proof ended with 1, so nothing was published; what it said stands above"
    with pytest.raises(BadInput, match=f"^{told}$"):
        prove_apart(onnx_dir, "cpu", progress=print)


def test_a_large_model_is_proven_apart_and_published_or_not(model_dir, onnx_dir, tmp_path, monkeypatch):
    from serving.export import decoder, proof

    monkeypatch.setattr(proof, "LARGE_BYTES", 0)
    monkeypatch.setattr(proof, "prove", None)
    assert export_model(model_dir("llama"), tmp_path / "onnx")["passed"]

    def another_graph(model, source, options, path):
        names = write_graph(model, source, options, path)
        shutil.copyfile(onnx_dir / "model.onnx.data", path.with_name("model.onnx.data"))
        return names

    write_graph = decoder.write_graph
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    monkeypatch.setattr(decoder, "write_graph", another_graph)
    spoil(model)
    with pytest.raises(VerificationFailed, match="nothing was published: logits_one_by_one"):
        export_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def spoil(model) -> None:
    """Make the model another than the one whose weights lie in the shared ONNX directory."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_what_lies_in_the_users_folder_is_not_imported(onnx_dir, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('the file of the user')")
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("raise SystemExit('the package of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert prove_apart(onnx_dir, "cpu", progress=print)["passed"]


def test_the_proof_ends_with_an_exporter_that_is_killed(onnx_dir, tmp_path):
    script = f"""
import os, sys
from pathlib import Path
from serving import proof_process
real = proof_process.subprocess.Popen
def started(*args, **kwargs):
    process = real(*args, **kwargs)
    Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
    os.kill(os.getpid(), 9)
proof_process.subprocess.Popen = started
proof_process.prove_apart(Path({str(onnx_dir)!r}), "cpu", progress=print)
"""
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
