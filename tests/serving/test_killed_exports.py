"""An export that ends early, killed or on a full disk, leaves the older one whole and nothing that stays."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.directory import check_files, read_manifest, staged
from serving.engine import Engine

ROOT = Path(__file__).parents[2]

# When, as the stage that begins or the file that is opened, and what is exported.
MOMENTS = {
    "reading": ("stage", "reading the model", "fp32"),
    "answering": ("file", "reference.safetensors", "fp32"),
    "tracing": ("stage", "writing the graph", "fp32"),
    "writing the weights": ("file", "model.onnx.data", "fp32"),
    "sealing": ("file", ".trivet.json.", "fp32"),
    "verifying": ("stage", "verifying tokens", "fp32"),
    "rounding": ("file", "model.onnx.data", "fp16"),
    "quantising": ("stage", "quantising the graph to int8-weights", "int8-weights"),
}

# Loads torch once and exports in a child for each moment, which kills itself there.
SCRIPT = f"""
import os, shutil, signal, sys
from pathlib import Path
from serving.export import HeldOutRows, Options, export_model

def export(when, what, format, model, target):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    def stage(name):
        if when == "stage" and name == what:
            die()
        if format == "fp16" and name == "writing the graph in fp16":
            armed.append(True)
    armed = [True] * (when == "file" and format == "fp32")
    def opened(event, arguments):
        if armed and event == "open" and what in str(arguments[0]) and str(target.parent) in str(arguments[0]):
            die()
    sys.addaudithook(opened)
    options = Options(quantization=format) if format.startswith("int8") else Options(dtype=format)
    rows = HeldOutRows([{{"text": "the quick brown fox " * 200}}], "a fox")
    export_model(model, target, options, held_out=rows if options.quantization else None, progress=stage)

for name, (when, what, format) in {MOMENTS!r}.items():
    target = Path(sys.argv[2]) / name / "onnx"
    if (child := os.fork()) == 0:
        try:
            export(when, what, format, Path(sys.argv[1]), target)
        finally:
            os._exit(1)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ", flush=True)
"""


@pytest.fixture(scope="module")
def killed(model_dir, onnx_dir, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """The folder with one folder for each moment, in which an export over an older one was killed; how each ended."""
    folder = tmp_path_factory.mktemp("killed")
    for name in MOMENTS:
        shutil.copytree(onnx_dir, folder / name / "onnx")
    (folder / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary")}
    command = [sys.executable, "-c", SCRIPT, str(model_dir("gpt2")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    ended = [line.split(": ") for line in done.stdout.splitlines() if ": " in line]
    return folder, {name: int(code) for name, code in ended if name in MOMENTS}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_export_leaves_the_older_one_and_nothing_that_the_next_does_not_remove(killed, onnx_dir, moment):
    folder, ended = killed
    assert ended[moment] == -signal.SIGKILL
    target = folder / moment / "onnx"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in onnx_dir.iterdir()
    }
    check_files(target, read_manifest(target, "onnx"))
    Engine.open(target)
    left_behind = [path.name for path in target.parent.iterdir() if path != target]
    assert len(left_behind) == (moment != "reading")
    with contextlib.suppress(KeyboardInterrupt), staged(target):  # as the next export does first
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_in_the_folder_for_temporary_files(killed):
    folder, _ = killed
    assert list((folder / "temporary").iterdir()) == []


def test_a_disk_that_is_full_when_the_weights_are_written_keeps_the_older_export(
    model_dir, onnx_dir, tmp_path, trivet, monkeypatch
):
    import resource

    from serving.export import decoder

    def on_a_full_disk(model, source, options, path):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            return write_graph(model, source, options, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    write_graph = decoder.write_graph
    monkeypatch.setattr(decoder, "write_graph", on_a_full_disk)
    target = Path(shutil.copytree(onnx_dir, tmp_path / "onnx"))
    code, _, err = trivet("export", model_dir("gpt2"), target)
    assert (code, "Traceback" in err) == (1, False), err
    assert "cannot be written (File too large); nothing half-written was left; free some space" in err
    assert list(tmp_path.iterdir()) == [target]
    check_files(target, read_manifest(target, "onnx"))
    Engine.open(target)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_says_so_and_keeps_the_older_one(
    model_dir, onnx_dir, tmp_path, trivet, monkeypatch, number
):
    from serving.export import decoder

    monkeypatch.setattr(decoder, "write_graph", lambda *_: os.kill(os.getpid(), number))
    target = Path(shutil.copytree(onnx_dir, tmp_path / "onnx"))
    code, _, err = trivet("export", model_dir("gpt2"), target)
    assert (code, err.splitlines()[-1]) == (130, f"export: stopped; nothing was written to {target}")
    assert list(tmp_path.iterdir()) == [target]
    check_files(target, read_manifest(target, "onnx"))
