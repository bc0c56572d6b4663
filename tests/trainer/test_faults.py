"""Faults, caused: kills at every touch of the disk while something is saved, and checkpoints made to harm."""

import hashlib
import json
import os
import pickle
import re
import shutil

import pytest
import torch

from launch import config_file
from serving import directory
from serving.directory import MANIFEST, BadInput
from trainer import checkpoint

# In a process of its own: trains up to a save, does that save in copies of itself, each killed at another touch of the
# disk, keeps the run folder that each leaves, and goes on from each with a copy of its own.
KILL_AT_EVERY_TOUCH = """
import builtins, json, os, shutil, signal, sys
from pathlib import Path
import torch
from launch import config_file
from launch.train import train
from trainer import checkpoint, model_dir
from trainer.config import RunConfig
import safetensors.torch

torch.set_num_threads(1)
config_path, place, first, stride, stage = sys.argv[1:]
stride, stage = int(stride), Path(stage)
config = config_file.load(Path(config_path), [], RunConfig)
folder = config.run.folder
touches, kill_at, armed = 0, 0, False
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def touch(torn=None):
    global touches
    if not armed:
        return
    touches += 1
    if touches == kill_at:
        if torn:
            torn()
        os.kill(os.getpid(), signal.SIGKILL)

def on_event(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        touch()
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING:
        if str(folder) in os.fsdecode(arguments[0]):
            touch()

def wrapped(module, name, torn=None):
    real = getattr(module, name)
    def call(*args, **kwargs):
        touch()
        result = real(*args, **kwargs)
        touch(torn and (lambda: torn(*args)))
        return result
    setattr(module, name, call)

def half(tensors, path, *rest):
    os.truncate(path, os.path.getsize(path) // 2)

def in_a_copy(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

module, name = {"checkpoint": (checkpoint, "save"), "model": (model_dir, "save_model")}[place]
save = getattr(module, name)
calls = 0

def saves_and_dies(*args, **kwargs):
    global calls, kill_at, armed
    calls += 1
    if calls < int(first):
        return save(*args, **kwargs)
    sys.addaudithook(on_event)
    wrapped(os, "fsync")
    wrapped(checkpoint, "save_file", half)
    before = stage / "before"
    shutil.copytree(folder, before)
    kill_at = 1
    while True:
        armed = True
        died = in_a_copy(lambda: save(*args, **kwargs) and None)
        armed = False
        (stage / str(kill_at)).mkdir()
        shutil.copytree(folder, stage / str(kill_at) / folder.name)
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        if died != -signal.SIGKILL:
            assert died == 0, died
            break
        kill_at += stride
    os._exit(in_a_copy(go_on_from_each))

def go_on_from_each():
    setattr(module, name, save)
    from safetensors.torch import load_file
    for path in sorted((path for path in stage.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        left = path / folder.name
        newest, skipped = checkpoint.newest(left / "checkpoints")
        said = {"touch": int(path.name), "newest": newest and newest.name, "skipped": skipped}
        code = in_a_copy(lambda: train(config.model_copy(update={"run": config.run.model_copy(update={"dir": path})})))
        print("LEFT", json.dumps({**said, "code": code}), flush=True)

setattr(module, name, saves_and_dies)
train(config)
"""


@pytest.fixture
def killed_at_every_touch(child, tmp_path):
    """Return a function that saves a config's run in copies that die, and returns what each left and came to."""

    def run(config, place: str, *, first: int, stride: int) -> list[dict]:
        (tmp_path / "config.yaml").write_text(config_file.to_yaml(config))
        (tmp_path / "stage").mkdir()
        arguments = ["", str(tmp_path / "config.yaml"), place, str(first), str(stride), str(tmp_path / "stage")]
        code, output = child(f"import sys\nsys.argv = {arguments!r}\n{KILL_AT_EVERY_TOUCH}", timeout_s=500)
        assert code == 0, output[-3000:]
        return [json.loads(line.removeprefix("LEFT ")) for line in output.splitlines() if line.startswith("LEFT ")]

    return run


def lines(folder) -> list[dict]:
    clocked = {"tokens_per_s", "flops_per_s", "data_wait_s", "memory_bytes", "elapsed_s"}
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in text.splitlines()]


def is_as_undisturbed(folder, undisturbed) -> None:
    assert lines(folder) == lines(undisturbed)
    models = [(each / "model" / "model.safetensors").read_bytes() for each in (folder, undisturbed)]
    assert models[0] == models[1]


STRIDES = [pytest.param(1, marks=pytest.mark.slow, id="every"), pytest.param(7, id="every seventh")]


@pytest.mark.parametrize("stride", STRIDES)
def test_a_kill_at_any_touch_of_the_disk_in_a_save_costs_no_whole_checkpoint(
    make_config, train, killed_at_every_touch, tmp_path, stride
):
    settings = {"checkpoint": {"every": 2, "keep": 1}, "evaluation": {"max_rows": 2}}
    undisturbed, killed = (make_config(run={"name": name, "steps": 5}, **settings) for name in ("whole", "killed"))
    assert train(undisturbed) == 0
    found = killed_at_every_touch(killed, "checkpoint", first=2, stride=stride)  # that of step 4
    assert len(found) >= 20 // stride
    assert {each["code"] for each in found} == {0}
    newest = [each["newest"] for each in found]
    assert newest == sorted(newest)
    assert set(newest) == {"step-00000002", "step-00000004"}
    assert all(not each["skipped"] for each in found), "half of one never has the name of one"
    for each in found:
        is_as_undisturbed(tmp_path / "stage" / str(each["touch"]) / "killed", undisturbed.run.folder)


@pytest.mark.parametrize("stride", STRIDES)
def test_a_kill_at_any_touch_of_the_disk_while_the_model_is_saved_leaves_none_or_a_whole_one(
    make_config, train, killed_at_every_touch, tmp_path, stride
):
    undisturbed, killed = (
        make_config("sft", "lora", run={"name": name, "steps": 2}, evaluation={"max_rows": 2})
        for name in ("whole", "killed")
    )
    assert train(undisturbed) == 0
    found = killed_at_every_touch(killed, "model", first=1, stride=stride)
    assert len(found) >= 20 // stride
    assert {each["code"] for each in found} == {0}
    for each in found:
        folder = tmp_path / "stage" / str(each["touch"]) / "killed"
        is_as_undisturbed(folder, undisturbed.run.folder)
        directory.check_files(folder / "model", directory.read_manifest(folder / "model", "model"))
        names = {path.name for path in folder.iterdir()}
        assert not [name for name in names if name.endswith(".partial")], "what the kill left is cleared"


# --- checkpoints made to harm ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_config, train):
    """A config with two checkpoints in its folder, as after a kill at step 5."""
    config = make_config(checkpoint={"every": 2, "keep": 3})
    assert train(config) == 0
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000006")
    shutil.rmtree(config.run.folder / "model")
    (config.run.folder / "result.json").unlink()
    directory.write_json(
        config.run.folder / "status.json",
        {**directory.stamp(), "state": "running", "code": None, "step": 4, "reason": ""},
    )
    return config


class Canary:
    """Leaves a mark when it is read as a pickle."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def reseal(folder) -> None:
    """What somebody does who wants the checkpoint to be taken for whole: every hash is right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    about_itself = ("format_version", "trivet", "kind", "files", "digest")
    fields = {name: value for name, value in manifest.items() if name not in about_itself}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    files.pop(MANIFEST)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files, "digest": digest}))


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with its hash"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rank-00000.safetensors", "rng_state.pth", "trivet.pkl"])
def test_a_pickle_in_a_checkpoint_is_never_read(saved, train, tmp_path, capfd, name, sealed):
    folder, mark = saved.run.folder / "checkpoints" / "step-00000004", tmp_path / "mark"
    hostile = pickle.dumps(Canary(mark))
    assert pickle.loads(hostile) is None
    mark.rmdir()  # it works
    (folder / name).write_bytes(hostile)
    if sealed:
        reseal(folder)
    if sealed and name.endswith(".safetensors"):
        with pytest.raises(BadInput, match=r"rank-00000\.safetensors: cannot be read \(.*\); remove the folder step-0"):
            train(saved)
    else:
        assert train(saved) == 0
        said = capfd.readouterr().err
        assert ("checkpoint skipped" in said) != sealed
        assert f"going on from {saved.run.folder / 'checkpoints'}/step-0000000{4 if sealed else 2}" in said
    assert not mark.exists()


def test_a_checkpoint_that_points_out_of_its_folder_is_refused(saved, train, tmp_path):
    folder = saved.run.folder / "checkpoints" / "step-00000004"
    shutil.copy(folder / "rank-00000.safetensors", tmp_path / "elsewhere.safetensors")
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["tensors"].values():
        entry["slices"][0][0] = str(tmp_path / "elsewhere.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reseal(folder)
    with pytest.raises(BadInput, match=r"points at .*elsewhere\.safetensors, which is no file of it; refused"):
        train(saved)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", MANIFEST])
def test_one_flipped_byte_costs_the_checkpoint_and_the_run_says_which_and_why(saved, train, capfd, make_config, name):
    folder = saved.run.folder / "checkpoints" / "step-00000004"
    whole = make_config(run={"name": "undisturbed"}, checkpoint={"every": 2})
    assert train(whole) == 0
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    capfd.readouterr()
    assert train(saved) == 0
    said = capfd.readouterr().err
    assert re.search(
        rf"checkpoint skipped: {re.escape(str(folder))}.*(altered since it was written|cannot be read)", said
    )
    assert f"going on from {saved.run.folder / 'checkpoints' / 'step-00000002'}" in said
    is_as_undisturbed(saved.run.folder, whole.run.folder)


def test_where_every_checkpoint_is_damaged_the_run_begins_anew_and_says_so(saved, train, capfd):
    for folder in (saved.run.folder / "checkpoints").iterdir():
        (folder / MANIFEST).unlink()
    capfd.readouterr()
    assert train(saved) == 0
    said = capfd.readouterr().err
    assert said.count("checkpoint skipped: ") == 2
    assert "going on from" not in said
    assert [line["step"] for line in lines(saved.run.folder) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_model_is_refused_by_its_tensors(saved, train, make_config):
    other = make_config(run={"name": "other"}, checkpoint={"every": 2}, model={"hidden_size": 16})
    assert train(other) == 0
    checkpoints = other.run.folder / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(saved.run.folder / "checkpoints", checkpoints)
    (other.run.folder / "result.json").unlink()
    with pytest.raises(
        BadInput, match=r"step-00000004: .* has shape \[.*\], this run needs \[.*\]; start a new run\.name"
    ):
        train(other)


def test_a_resume_reads_only_what_the_manifest_lists(saved, monkeypatch, train):
    opened = []

    def spy(path, framework):
        opened.append(str(path))
        return open_for_real(path, framework=framework)

    open_for_real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", spy)
    monkeypatch.setattr(torch, "load", lambda *args, **named: pytest.fail("a pickle was read"))
    assert train(saved) == 0
    folder = saved.run.folder / "checkpoints" / "step-00000004"
    assert set(opened) == {str(folder / "rank-00000.safetensors")}
