"""A folder that holds something else, and Ctrl-C: nothing of the user's is lost, no process is left."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import process_marks

TRIVET = [sys.executable, "-m", "trivet"]


@pytest.fixture
def other_run(work, made_run):
    """A copy of the finished run in ./runs/tiny."""
    return shutil.copytree(made_run, work / "runs" / "tiny")


def test_a_folder_with_a_different_run_says_which_keys_differ_and_how(refused, other_run):
    message = refused("train", "tiny.yaml", "optim.lr=0.002", "run.seed=7")
    assert message == (
        "run.name: runs/tiny holds a different run (optim.lr 0.0003 there, 0.002 here; run.seed 0 there, 7 here); "
        "choose another run.name, or remove that folder; of a run that goes on may differ: run.steps, checkpoint.*, "
        "evaluation.*, log.*, batch.micro_rows, batch.activation_checkpointing, batch.compile, optim.on_non_finite, "
        "optim.max_skipped_steps, model.made_by, run.timeout_s"
    )


def test_of_many_differences_the_first_come_with_values(refused, other_run):
    sizes = ["model.hidden_size=64", "model.num_layers=1", "model.num_heads=2", "optim.lr=0.1", "run.seed=3"]
    message = refused("train", "tiny.yaml", *sizes)
    assert "model.hidden_size 32 there, 64 here" in message
    assert "; also run.seed)" in message


def test_a_folder_with_other_files_is_no_place_for_a_run(refused, work):
    (work / "runs" / "tiny" / "model").mkdir(parents=True)
    (work / "runs" / "tiny" / "notes.txt").write_text("mine")
    message = refused("train", "tiny.yaml")
    assert message == "run.name: runs/tiny holds other files (model, notes.txt) and no run; choose another run.name"


def test_a_file_in_the_place_of_the_run_folder_is_named(trivet, work, error_of):
    (work / "runs").write_text("a file")
    code, _, err = trivet("train", "tiny.yaml")
    assert code == 2
    assert error_of(err).startswith("run.dir: runs/tiny cannot be written (")
    assert (work / "runs").read_text() == "a file"


def test_export_does_not_replace_what_is_no_export(refused, work):
    (work / "mine").mkdir()
    (work / "mine" / "notes.txt").write_text("mine")
    assert "mine: " in refused("export", "model", "mine")


def start(*arguments: str, mark: str) -> subprocess.Popen:
    """Start trivet in a session of its own, as a terminal's foreground job."""
    name, _, value = mark.partition("=")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", name: value}
    return subprocess.Popen(
        [*TRIVET, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def interrupt(process: subprocess.Popen, mark: str, when: str) -> tuple[int, str]:
    """Press Ctrl-C once a line of stderr holds `when`; return the exit code and stderr, when nothing lives any more."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        if when in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    seen.append(process.stderr.read())
    code = process.wait(600)
    deadline = time.monotonic() + 10
    while process_marks.marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process_marks.marked(mark)
    return code, "".join(seen)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_saves_a_run_and_leaves_no_process(work, nproc):
    mark = f"TRIVET_TEST_MARK={work}"
    processes = [] if nproc == 1 else ["--nproc", "2"]
    process = start("train", "tiny.yaml", "run.steps=100000", *processes, mark=mark)
    code, err = interrupt(process, mark, when="step 1/")
    assert code == 75, err
    assert "start it again to go on" in err
    assert len(list((work / "runs" / "tiny" / "checkpoints").glob("step-*"))) >= 1
    assert not list((work / "runs" / "tiny").rglob("*.partial"))


@pytest.mark.slow
def test_ctrl_c_ends_a_server_and_leaves_no_process(work):
    mark = f"TRIVET_TEST_MARK={work}"
    code, err = interrupt(start("serve", "onnx", "--port", "0", mark=mark), mark, when="serving ")
    assert code == 0, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_an_export_with_nothing_half_written(work):
    mark = f"TRIVET_TEST_MARK={work}"
    process = start("export", "model", "new", mark=mark)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(600)
    assert not process_marks.marked(mark)
    names = {path.name for path in work.iterdir()}
    assert names - {"new"} == {"tiny.yaml", "text.txt", "onnx", "model"}
