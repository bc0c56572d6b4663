"""No space and no permission: one line, nothing half-written, and what was there is still there."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk (tmpfs) of so many KiB and returns its folder; `full` leaves no byte."""
    mounted = []

    def mount(size_kib: int, *, full: bool = False) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "trivet-test", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a file system")
        mounted.append(folder)
        if full:
            fill(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def read_only(small_disk):
    """A folder on a disk that is mounted read-only: root, too, may not write there."""
    folder = small_disk(1024)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    return folder


def fill(folder: Path, leave_bytes: int = 0) -> None:
    """Write zeros until nothing but `leave_bytes` is left."""
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while shutil.disk_usage(folder).free > leave_bytes:
            file.write(b"\0" * 4096)


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"ballast"}


WRITERS = {
    "train": (["train", "tiny.yaml", "run.name=new", "run.dir={}/runs"], "run.dir: {}/runs/new cannot be written"),
    "export": (["export", "model", "{}/onnx"], "{}/onnx: cannot be written"),
    "generate": (["generate", "onnx", "--prompt", "x", "--output", "{}/out.jsonl"], "--output: {}/out.jsonl cannot be"),
    "report": (["report", "run", "--output", "{}/page.html"], "{}/page.html: cannot be written"),
}


@needs_root
@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_is_read_only_is_named_before_any_work(trivet, work, made_run, read_only, error_of, name):
    (work / "run").symlink_to(made_run)
    arguments, said = WRITERS[name]
    code, _, err = trivet(*(text.format(read_only) for text in arguments))
    assert code == 2
    message = error_of(err)
    assert said.format(read_only) in message
    assert "Read-only file system" in message
    assert "choose another" in message


@needs_root
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_without_space_is_named_and_gets_nothing_half_written(
    trivet, work, made_run, small_disk, error_of, name
):
    disk = small_disk(64, full=True)
    (work / "run").symlink_to(made_run)
    arguments, _ = WRITERS[name]
    code, _, err = trivet(*(text.format(disk) for text in arguments))
    assert code in (1, 2)
    message = error_of(err)
    assert str(disk) in message
    assert "No space left on device" in message or "0 KiB is free there" in message
    assert "choose another" in message or "free some space" in message
    assert entries(disk) <= {"runs"}


@needs_root
def test_an_older_answer_survives_a_disk_that_is_full(trivet, work, small_disk, error_of):
    disk = small_disk(16)
    (disk / "out.jsonl").write_text("the older answers\n")
    fill(disk)
    code, _, err = trivet("generate", "onnx", "--prompt", "x", "--output", disk / "out.jsonl")
    assert code in (1, 2)
    assert "No space left on device" in error_of(err)
    assert (disk / "out.jsonl").read_text() == "the older answers\n"
    assert entries(disk) == {"out.jsonl"}


@needs_root
def test_an_older_export_survives_a_disk_that_is_full(trivet, work, small_disk, error_of, contents):
    disk = small_disk(2048)
    shutil.copytree((work / "onnx").resolve(), disk / "onnx")
    fill(disk, leave_bytes=32 * 1024)
    before = contents(disk)
    code, _, err = trivet("export", "model", disk / "onnx")
    assert code == 1
    assert "No space left on device" in error_of(err)
    assert contents(disk) == before


@needs_root
@pytest.mark.parametrize("what", ["metrics.jsonl", "tensorboard", "checkpoint", "model", "result.json"])
def test_a_disk_that_fills_up_midway_fails_the_run_in_one_line_and_costs_no_checkpoint(
    trivet, work, small_disk, error_of, monkeypatch, what
):
    from trainer import checkpoint, loop, model_dir, run_folder

    disk = small_disk(4096)
    run, last_step = disk / "runs" / "new", {"checkpoint": 60, "model": 60, "result.json": 60}.get(what, 89)
    fill_before = {"checkpoint": 60, "model": 0, "result.json": 0}.get(what, 31)
    settings = ["run.name=new", f"run.dir={disk}/runs", f"run.steps={last_step}", "checkpoint.every=30"]
    settings += ["checkpoint.keep=1", f"log.tensorboard={str(what == 'tensorboard').lower()}"]

    def filling(function, *, when=lambda step: True):
        def wrapped(*args, **kwargs):
            step = next((value for value in args if isinstance(value, int)), getattr(args[-1], "step", 0))
            if when(step):
                fill(disk)
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if what == "model":
            patch.setattr(model_dir, "save_model", filling(model_dir.save_model))
        elif what == "result.json":
            patch.setattr(run_folder, "write_result", filling(run_folder.write_result))
        elif what == "checkpoint":
            patch.setattr(loop, "save", filling(loop.save, when=lambda step: step == fill_before))
        else:
            patch.setattr(loop.RunLog, "train", filling(loop.RunLog.train, when=lambda step: step == fill_before))
        code, _, err = trivet("train", "tiny.yaml", *settings)
    assert code == 1
    message = error_of(err)
    assert str(run) in message
    assert "cannot be written" in message
    assert "No space left on device" in message
    newest, skipped = checkpoint.newest(run / "checkpoints")
    assert (newest.name, skipped) == (f"step-{30 if fill_before else 60:08d}", [])
    assert not (run / "result.json").exists()
    assert (run / "model").exists() == (what == "result.json")
    going_on = (run / "status.json").read_text()
    assert message.endswith(f"started again, the run goes on from step {int(newest.name[-8:])}")
    assert f'"step": {int(newest.name[-8:])},' in going_on
    (disk / "ballast").unlink()
    os.chdir(work)
    code, _, err = trivet("train", "tiny.yaml", *settings)
    assert code == 0, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, last_step + 1))


@needs_root
def test_without_checkpoints_a_disk_that_is_full_at_the_end_costs_no_step(
    trivet, work, small_disk, error_of, monkeypatch
):
    from trainer import model_dir

    disk = small_disk(4096)
    run, save_model = disk / "runs" / "new", model_dir.save_model
    settings = ["run.name=new", f"run.dir={disk}/runs", "checkpoint.every=null"]
    with monkeypatch.context() as patch:
        patch.setattr(model_dir, "save_model", lambda *args, **named: (fill(disk), save_model(*args, **named)))
        code, _, err = trivet("train", "tiny.yaml", *settings)
    assert code == 1
    message = error_of(err)
    assert message.startswith(f"{run}/model: the model cannot be written (")
    assert message.endswith("mend that; started again, the run goes on from step 4")
    assert json.loads((run / "status.json").read_text())["step"] == 4
    (disk / "ballast").unlink()
    code, _, err = trivet("train", "tiny.yaml", *settings)
    assert code == 0, err
    assert "going on from" in err
    assert "step-00000004" in err
    assert {path.name for path in run.iterdir() if path.is_dir() and list(path.iterdir())} == {"model"}


@needs_root
def test_a_disk_too_small_for_the_model_is_refused_before_step_0_and_for_checkpoints_a_warning(
    trivet, work, small_disk, error_of
):
    disk = small_disk(100)
    code, out, err = trivet("train", "tiny.yaml", "run.name=new", f"run.dir={disk}/runs")
    assert (code, out, entries(disk)) == (2, "", set())
    assert error_of(err) == (
        f"run.dir: {disk}/runs/new has no room for the model, which needs 113 KiB; 100 KiB is free there; "
        "free some space or choose another run.dir"
    )
    disk = small_disk(300)
    code, _, err = trivet("train", "tiny.yaml", "run.name=new", f"run.dir={disk}/runs", "checkpoint.every=null")
    assert code == 0, err
    assert (
        "may have no room for the last checkpoint and the model, which need 450 KiB; 300 KiB is free there" in err
    )  # 28,832 * 16 B


@needs_root
@pytest.mark.parametrize(("minor", "code"), [(3, 0), (7, 1)], ids=["null", "full"])
def test_a_device_is_written_to_and_not_replaced(trivet, work, error_of, minor, code):
    """Copies of /dev/null and /dev/full: root could rename a file over the real ones."""
    device = work / "device"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    found, _, err = trivet("generate", "onnx", "--prompt", "x", "--output", device)
    assert found == code, err
    assert device.is_char_device()
    assert not code or "device: cannot be written (No space left on device)" in error_of(err)


WITHOUT_ROOTS_RIGHT = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_without_write_permission_is_named(work, made_run, error_of, name):
    """In a process that gave up root's right to write everywhere."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    (work / "run").symlink_to(made_run)
    locked = work / "locked"
    locked.mkdir(mode=0o555)
    arguments, said = WRITERS[name]
    done = subprocess.run(
        [*WITHOUT_ROOTS_RIGHT, sys.executable, "-m", "trivet", *(text.format(locked) for text in arguments)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    message = error_of(done.stderr)
    assert said.format(locked) in message
    assert "Permission denied" in message
    assert not list(locked.iterdir())
