"""Out of memory: refused before a step where it is certain, explained where it happens, with values that really run."""

import errno
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import process_marks, processes
from trainer import loop, out_of_memory
from trainer.guards import RunFailed

GIB = 2**30


@pytest.fixture
def few_recorded(monkeypatch):
    """Of a batch that is too large to record as a whole anyway, eight rows are: seconds instead of half a minute."""
    monkeypatch.setattr("trainer.plan.recordings._MOST_TOKENS", 512)


def test_a_batch_that_can_never_fit_is_refused_before_it_is_tried(trivet, work, error_of, monkeypatch, few_recorded):
    """100,000,000 rows: the loss alone needs terabytes."""
    code, out, err = trivet("train", "tiny.yaml", "run.name=new", "batch.rows=100000000")
    assert (code, out) == (2, "")
    message = error_of(err)
    assert re.match(r"batch\.micro_rows: out of memory: 100000000 rows of 64 tokens need about [\d,.]+ GiB \(", message)
    for part in ("weights", "gradients", "optimizer", "batch", "logits", "activations, estimated"):
        assert re.search(rf"{part} [\d.]+ [GMK]iB", message), part
    advised = re.search(r" can be had; use batch\.micro_rows=(\d+) \(the result stays the same\)$", message)[1]
    assert 100000000 % int(advised) == 0
    assert not (work / "runs").exists()
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda *args, **kwargs: GIB // 16)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new", "batch.rows=64000")
    advised = re.search(r"use (batch\.micro_rows=\d+) \(the result stays the same\)$", error_of(err))[1]
    code, out, err = trivet("train", "tiny.yaml", "run.name=new", "--dry-run", "batch.rows=64000", advised)
    assert (code, "warning" in err) == (0, False), err


def test_a_dry_run_says_the_memory_and_refuses_what_cannot_fit(trivet, work, error_of, few_recorded):
    code, out, _ = trivet("train", "tiny.yaml", "run.name=new", "--dry-run")
    assert code == 0
    assert re.search(r"about \d+ [KM]iB of memory for each process and about 0.5 GiB more for the program itself", out)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new", "--dry-run", "batch.rows=100000000")
    assert code == 2
    assert "out of memory" in error_of(err)


def test_a_dry_run_for_several_processes_divides_the_memory_among_them(trivet, work, monkeypatch):
    asked = []
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda device, *, world_size: asked.append(world_size))
    words = ["train", "tiny.yaml", "run.name=new", "batch.rows=4", "--dry-run", "--nproc", "2"]
    assert trivet(*words)[0] == 0
    assert trivet(*words, "--nodes", "2")[0] == 0
    assert asked == [2, 2], "those of another machine take nothing of this one's"


def test_a_dry_run_needs_what_its_mode_needs(trivet, work, monkeypatch):
    checked, plans = loop.check_memory, []
    monkeypatch.setattr(loop, "check_memory", lambda *args, **named: plans.append(checked(*args, **named)) or plans[-1])
    for mode in ("ddp", "fsdp2"):
        words = ["--nproc", "2", "--parallel", mode]
        assert trivet("train", "tiny.yaml", "run.name=new", "--dry-run", *words)[0] == 0
    whole, divided = plans
    assert (whole.mode, divided.mode) == ("ddp", "fsdp2")
    assert divided.optimizer_bytes == pytest.approx(whole.optimizer_bytes / 2, rel=0.1)


def test_a_run_that_may_not_fit_is_told_so_and_tried(trivet, work, monkeypatch):
    planned, plans = loop.planned, []
    monkeypatch.setattr(loop, "planned", lambda *args, **named: plans.append(planned(*args, **named)) or plans[-1])

    def free_bytes(device, **_):
        return (plans[-1].total_bytes + plans[-1].certain_bytes) // 2 - plans[-1].weights_bytes

    monkeypatch.setattr(out_of_memory, "free_bytes", free_bytes)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new")
    assert code == 0
    assert re.search(r"^warning: this may not fit: batch\.micro_rows: out of memory: 2 rows of 64 tokens", err, re.M)


@pytest.mark.parametrize("place", ["rehearse", "resume"])
def test_memory_that_runs_out_before_step_0_refuses_the_run(trivet, work, error_of, monkeypatch, place):
    def fail(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loop, place, fail)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new")
    assert code == 2
    assert error_of(err).startswith("batch.micro_rows: out of memory: 2 rows of 64 tokens need about")
    assert not (work / "runs" / "new").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OSError(errno.ENOMEM, "mmap failed"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RunFailed("x cannot be written (Cannot allocate memory)", step=1), False),
    ],
    ids=str,
)
def test_what_says_that_memory_ran_out_is_told_from_what_does_not(error, expected):
    assert out_of_memory.is_out_of_memory(error) == expected


def test_a_file_that_finds_no_memory_is_not_blamed_on_the_disk(trivet, work, error_of, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("trainer.checkpoint.save_file", fail)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new")
    assert code == 1
    assert error_of(err).startswith("batch.micro_rows: out of memory")
    assert "cannot be written" not in err


@pytest.mark.slow
def test_an_allocator_that_has_no_more_ends_the_run_before_step_0_and_its_advice_runs(command, work, error_of):
    """The address space is limited, so that malloc itself says no: in the rehearsal of the longest batch."""
    batch = ["batch.rows=6144", "batch.max_length=128", "run.steps=1"]
    limits = [(resource.RLIMIT_AS, 4 * GIB)]
    done = command("train", "tiny.yaml", "run.name=new", *batch, limits=limits)
    assert done.returncode == 2, done.stderr
    message = error_of(done.stderr)
    assert "batch.micro_rows: out of memory: 6144 rows of " in message
    assert not (work / "runs" / "new").exists()
    advice = re.search(r"use (batch\.micro_rows=\d+) \(the result stays the same\)", message)[1]
    done = command("train", "tiny.yaml", "run.name=new", *batch, advice, limits=limits)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", ["torch", "numpy", "cuda"])
def test_memory_that_runs_out_between_two_steps_fails_the_run_and_keeps_its_checkpoint(
    trivet, work, error_of, monkeypatch, error
):
    import numpy as np
    import torch

    from trainer.feed import Feed

    def fail():
        match error:
            case "torch":
                torch.empty(2**60, dtype=torch.uint8)
            case "numpy":
                np.empty(2**60, np.uint8)
            case "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    take = Feed.micro_batches
    monkeypatch.setattr(Feed, "micro_batches", lambda feed, step: fail() if step == 3 else take(feed, step))
    code, _, err = trivet("train", "tiny.yaml", "run.name=new")
    assert code == 1
    message = error_of(err)
    assert "batch.micro_rows: out of memory: 2 rows of 64 tokens need about" in message
    assert message.endswith(
        "use batch.micro_rows=1 (the result stays the same); started again, the run goes on from step 2"
    )
    monkeypatch.setattr(Feed, "micro_batches", take)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new", "batch.micro_rows=1")
    assert code == 0, err
    assert "going on from" in err


def test_a_model_that_cannot_be_built_is_named(trivet, work, error_of):
    code, out, err = trivet("train", "tiny.yaml", "run.name=new", f"model.hidden_size={2**36}")
    assert (code, out) == (2, "")
    message = error_of(err)
    assert message.startswith("model: out of memory while the data and the model were loaded (")
    assert message.endswith("lower model.hidden_size, model.num_layers or tokenizer.vocab_size")
    assert not (work / "runs").exists()


RANKS = """
import os, signal, subprocess, sys
from trainer.status import report_exit, report_start
if "RANK" in os.environ:
    report_start()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory ran out
    report_exit(1, "error: connection closed by peer")
    sys.exit(1)
ranks = [subprocess.Popen([sys.executable, __file__], env={**os.environ, "RANK": str(r)}) for r in range(2)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


def test_a_rank_that_was_killed_is_named_by_the_process_above(tmp_path, capfd, error_of):
    (tmp_path / "ranks.py").write_text(RANKS)
    assert processes.run_group([sys.executable, str(tmp_path / "ranks.py")], {}) == 1
    message = error_of(capfd.readouterr().err)
    assert message.startswith("rank 1 was killed from outside (kill -9), or the machine's memory ran out;")
    assert "lower batch.micro_rows (the result stays the same)" in message


def test_where_the_kernel_killed_for_memory_it_is_said(tmp_path, capfd, monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(process_marks, "oom_kills", lambda: next(counts, 4))
    (tmp_path / "ranks.py").write_text(RANKS)
    assert processes.run_group([sys.executable, str(tmp_path / "ranks.py")], {}) == 1
    assert (
        "error: rank 1 was killed probably by the kernel, for want of memory (it killed a process at that time);"
    ) in capfd.readouterr().err


@pytest.mark.slow
def test_a_kill_by_the_kernel_for_memory_is_counted(tmp_path):
    """A real control group of 1.2 GiB (version 1, as root)."""
    group = Path("/sys/fs/cgroup/memory") / f"trivet-test-{tmp_path.name}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(1.2 * GIB)))
    except OSError:
        pytest.skip("needs root and control groups of version 1")
    try:
        before = process_marks.oom_kills()
        code = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); x = bytearray(2 * 2**30)"
        done = subprocess.run([sys.executable, "-c", code], timeout=600)
        assert done.returncode == -signal.SIGKILL
        assert process_marks.oom_kills() > before
    finally:
        group.rmdir()
