"""Checkpoints: bit for bit, never half-read, and the newest whole one wins."""

import errno
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open

from serving.directory import MANIFEST, DirectoryError
from trainer import build, checkpoint, distributed, shards
from trainer.checkpoint import Counters

NO_FINGERPRINTS: dict[str, str] = {}


@pytest.fixture
def world(make_config):
    return distributed.start(make_config())


@pytest.fixture
def stepped(world):
    """Return a function that makes a small model with weight decay groups and a buffer, after some AdamW steps."""

    def make(steps: int, *, width: int = 3):
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2)
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model, optimizer = world.accelerator.prepare(model, optimizer)
        for step in range(steps):
            take_step(model, optimizer, step)
        return model, optimizer

    return make


def take_step(model, optimizer, step: int) -> float:
    torch.manual_seed(step)
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(folder: Path, world, made, step: int, keep: int = 9, fingerprints=NO_FINGERPRINTS) -> Path:
    return checkpoint.save(
        folder, world, *made, Counters(step, 10 * step, 0.1 * step), keep=keep, fingerprints=fingerprints
    )


def everything(made) -> dict[str, torch.Tensor]:
    """All weights, buffers and optimizer state, copied."""
    model, optimizer = made
    states = optimizer.optimizer.state_dict()["state"]
    state = {f"{i} {key}": value for i, entries in states.items() for key, value in entries.items()}
    return {name: value.clone() for name, value in {**model.state_dict(), **state}.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_round_trip_gives_back_every_bit_and_the_same_next_steps(tmp_path, world, stepped):
    saved = stepped(3)
    path = save(tmp_path, world, saved, 3)
    fresh = stepped(0)
    assert checkpoint.load(path, world, *fresh, fingerprints=NO_FINGERPRINTS) == Counters(3, 30, 0.1 * 3)
    assert same(everything(fresh), everything(saved))
    assert [take_step(*fresh, step) for step in (3, 4)] == [take_step(*saved, step) for step in (3, 4)]
    assert same(everything(fresh), everything(saved))


@pytest.mark.parametrize(
    ("objective", "strategy"), [("causal_lm", "scratch"), ("sft", "lora"), ("classification", "full")]
)
def test_a_real_model_comes_back_bit_for_bit(make_config, parts_of, objective, strategy):
    config = make_config(objective, strategy, run={"steps": 2}, checkpoint={"every": 2})
    trained = parts_of(config)
    fresh = build.build(config)
    path, skipped = checkpoint.newest(config.run.folder / "checkpoints")
    assert (path.name, skipped) == ("step-00000002", [])
    checkpoint.load(path, fresh.world, fresh.model, fresh.optimizer, fingerprints=fresh.fingerprints)
    frozen = {name for name, parameter in fresh.model.named_parameters() if not parameter.requires_grad}
    if strategy == "lora":  # saving the model merged it: compare the optimizer's state, which holds what learned
        states = [part.optimizer.optimizer.state_dict()["state"] for part in (trained, fresh)]
        assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
        assert not frozen & json.loads((path / MANIFEST).read_text())["tensors"].keys(), "the base needs no copy"
    else:
        assert not frozen
        assert same(everything((fresh.model, fresh.optimizer)), everything((trained.model, trained.optimizer)))


def test_shared_weights_are_saved_once_and_stay_shared(make_config, parts_of):
    config = make_config(run={"steps": 2}, checkpoint={"every": 2})
    parts_of(config)
    fresh = build.build(config)
    path, _ = checkpoint.newest(config.run.folder / "checkpoints")
    names = json.loads((path / MANIFEST).read_text())["tensors"].keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    checkpoint.load(path, fresh.world, fresh.model, fresh.optimizer, fingerprints=fresh.fingerprints)
    model = fresh.world.accelerator.unwrap_model(fresh.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(tmp_path, world, stepped):
    path = save(tmp_path, world, stepped(1), 1)
    assert sorted(file.name for file in path.rglob("*")) == ["rank-00000.safetensors", MANIFEST]
    with safe_open(path / "rank-00000.safetensors", "pt") as tensors:
        assert {"0.weight::weight", "0.weight::exp_avg", "0.weight::exp_avg_sq"} <= set(tensors.keys())
        assert torch.equal(tensors.get_tensor("1.running_mean::buffer"), stepped(1)[0].state_dict()["1.running_mean"])
    json.loads((path / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: truncate(path / "rank-00000.safetensors"), "rank-00000.safetensors: altered"),
        (lambda path: (path / "rank-00000.safetensors").unlink(), "rank-00000.safetensors: missing"),
        (lambda path: (path / MANIFEST).unlink(), f"has no {MANIFEST}"),
        (lambda path: truncate(path / MANIFEST), f"{MANIFEST}: cannot be read"),
    ],
    ids=["truncated", "file missing", "manifest missing", "manifest truncated"],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, world, stepped, damage, reason):
    made = stepped(1)
    for step in (1, 2):
        save(tmp_path, world, made, step)
    damage(tmp_path / "step-00000002")
    path, [skipped] = checkpoint.newest(tmp_path)
    assert path.name == "step-00000001"
    assert "step-00000002" in skipped
    assert reason in skipped


def test_one_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, world, stepped):
    random = Random(0)
    path = save(tmp_path, world, stepped(1), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    for file in (path / MANIFEST, path / "rank-00000.safetensors"):
        whole = file.read_bytes()
        for position in random.sample(range(len(whole)), 150):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << random.randrange(8)
            file.write_bytes(flipped)
            if checkpoint.newest(tmp_path)[0] is not None:  # the flip turned one white space into another
                assert json.loads((path / MANIFEST).read_text()) == manifest
        file.write_bytes(whole)


def test_without_a_whole_checkpoint_there_is_none(tmp_path, world, stepped):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    truncate(save(tmp_path, world, stepped(1), 1) / MANIFEST)
    assert checkpoint.newest(tmp_path)[0] is None


def test_what_a_killed_save_left_behind_does_no_harm_and_is_cleared(tmp_path, world, stepped):
    made = stepped(1)
    first = save(tmp_path, world, made, 1)
    left = tmp_path / ".step-00000002.partial"
    shutil.copytree(first, left)
    truncate(left / MANIFEST)
    assert checkpoint.newest(tmp_path) == (first, [])
    assert checkpoint.newest(tmp_path)[0] == first
    save(tmp_path, world, made, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_only_the_newest_are_kept(tmp_path, world, stepped):
    made = stepped(1)
    for step in (1, 5, 10, 200):
        save(tmp_path, world, made, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000200"]


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning_and_not_the_run(
    tmp_path, world, stepped, monkeypatch, capfd
):
    """As a file that another machine holds open on a network file system, or a disk that cannot be read there."""
    made, remove = stepped(1), shutil.rmtree

    def fail(path, *args, **kwargs):
        if Path(path).name == "step-00000001":
            raise OSError(errno.EIO, "Input/output error", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", fail)
    for step in (1, 2, 3):
        save(tmp_path, world, made, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    said = f"warning: {tmp_path / 'step-00000001'}: cannot be removed (Input/output error); remove it yourself"
    assert capfd.readouterr().err.count(said) == 1


def test_what_only_looks_like_a_checkpoint_is_neither_loaded_nor_removed(tmp_path, world, stepped):
    made = stepped(1)
    first = save(tmp_path, world, made, 1)
    own = ["step-00000009.backup", "step-best", "step-9"]
    for name in own:
        shutil.copytree(first, tmp_path / name)
    assert checkpoint.newest(tmp_path) == (first, [])
    save(tmp_path, world, made, 2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["step-00000002", *own])


def test_a_damaged_later_checkpoint_never_costs_the_one_just_saved(tmp_path, world, stepped):
    made = stepped(1)
    for step in (10, 20):
        save(tmp_path, world, made, step)
    truncate(tmp_path / "step-00000020" / MANIFEST)
    saved = save(tmp_path, world, made, 12, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_saving_a_step_again_replaces_it(tmp_path, world, stepped):
    save(tmp_path, world, stepped(1), 4)
    made = stepped(2)
    path = save(tmp_path, world, made, 4)
    fresh = stepped(0)
    checkpoint.load(path, world, *fresh, fingerprints=NO_FINGERPRINTS)
    assert torch.equal(fresh[0].state_dict()["0.weight"], made[0].state_dict()["0.weight"])


def test_a_full_disk_costs_the_save_and_not_the_previous_checkpoint(tmp_path, world, stepped, monkeypatch):
    made = stepped(1)
    first = save(tmp_path, world, made, 1, keep=1)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("trainer.checkpoint.save_file", "serving.directory.write_json", "serving.directory.publish"):
        with monkeypatch.context() as patch:
            patch.setattr(place, no_space)
            with pytest.raises(OSError, match="No space"):
                save(tmp_path, world, made, 2, keep=1)
        assert checkpoint.newest(tmp_path) == (first, [])
        assert list(tmp_path.iterdir()) == [first], "the rest of a failed save takes the space that is missing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 5}, r"0\.weight has shape \[3, 4\], this run needs \[5, 4\]"),
        ({"extra": True}, r"only this run has 3\.bias \(2 differ\)"),
        ({"fewer": True}, r"only the checkpoint has 1\.bias"),
    ],
)
def test_other_shapes_and_other_tensors_are_refused_and_nothing_changes(tmp_path, world, stepped, change, said):
    path = save(tmp_path, world, stepped(1), 1)
    model, optimizer = stepped(0, width=change.get("width", 3))
    if "extra" in change or "fewer" in change:
        layers = [*model, torch.nn.Linear(2, 2)] if "extra" in change else [model[0]]
        model = torch.nn.Sequential(*layers)
        optimizer = world.accelerator.prepare(torch.optim.AdamW(model.parameters()))
    before = everything((model, optimizer))
    with pytest.raises(DirectoryError, match=said):
        checkpoint.load(path, world, model, optimizer, fingerprints=NO_FINGERPRINTS)
    assert all(torch.equal(value, everything((model, optimizer))[name]) for name, value in before.items())


def test_other_data_is_refused(tmp_path, world, stepped):
    made = stepped(1)
    path = save(tmp_path, world, made, 1, fingerprints={"data": "a", "tokenizer": "b"})
    checkpoint.load(path, world, *made, fingerprints={"data": "a", "tokenizer": "b"})
    with pytest.raises(DirectoryError, match="the data changed since it was saved"):
        checkpoint.load(path, world, *made, fingerprints={"data": "c", "tokenizer": "b"})


def test_a_changed_data_file_stops_a_resumed_run(make_config, train, tmp_path, write_rows):
    def config(steps: int):
        data = {"type": "files", "train": str(path), "validation": str(path)}
        return make_config(run={"steps": steps}, checkpoint={"every": 2}, data=data)

    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i} of the file"} for i in range(20)])
    assert train(config(2)) == 0
    write_rows(path, [{"text": f"line {i} of the file"} for i in range(20)])
    with pytest.raises(DirectoryError, match=r"the train data \(.*\) changed"):
        train(config(4))


def test_ranks_slices_are_read_back_across_their_borders(tmp_path, world, stepped, monkeypatch):
    """A checkpoint that three ranks wrote, each its share, loads into one process (here the ranks save in turn)."""
    made = stepped(2)
    whole = save(tmp_path / "one", world, made, 2)
    partial = tmp_path / "three" / "step-00000002"
    partial.mkdir(parents=True)
    held = shards.held_by_rank(world, *made)
    for rank in range(3):
        monkeypatch.setattr(world, "rank", rank)
        monkeypatch.setattr(world, "size", 3)
        checkpoint._write_slices(partial, world, held)
    monkeypatch.undo()
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["tensors"] = checkpoint._merge_indices(partial, 3)
    manifest["files"] = {path.name: "" for path in partial.iterdir()}
    (partial / MANIFEST).write_text(json.dumps(manifest))
    assert len(manifest["tensors"]["0.weight"]["slices"]) == 3
    fresh = stepped(0)
    checkpoint.load(partial, world, *fresh, fingerprints=NO_FINGERPRINTS)
    assert same(everything(fresh), everything(made))


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, child):
    """Forked copies save step 2 and end at a different line each; step 1 or step 2 must be whole every time."""
    code, output = child(f"""
import shutil, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from trainer import checkpoint
from trainer.checkpoint import Counters
from trainer.distributed import World

torch.set_num_threads(1)
world, folder = World(Accelerator(cpu=True)), Path({str(tmp_path / "checkpoints")!r})
model = torch.nn.Linear(3, 3)
model, optimizer = world.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

def save(step):
    checkpoint.save(folder, world, model, optimizer, Counters(step), keep=1, fingerprints={{}})

def killed_at(line):
    pid = os.fork()
    if pid == 0:
        lines = 0
        def trace(frame, event, argument):
            nonlocal lines
            name = frame.f_code.co_filename
            if not name.endswith(("checkpoint.py", "directory.py", "shards.py", "shutil.py")):
                return None
            lines += event == "line"
            if lines > line:
                os._exit(1)
            return trace
        sys.settrace(trace)
        save(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

line, seen = 0, []
while True:
    shutil.rmtree(folder, ignore_errors=True)
    save(1)
    if not killed_at(line):
        break
    path, skipped = checkpoint.newest(folder)
    assert path is not None, (line, skipped)
    assert checkpoint.load(path, world, model, optimizer, fingerprints={{}}).step == int(path.name[-1])
    seen.append(path.name[-1])
    save(3)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"], (line, list(folder.iterdir()))
    line += 5
print(line, "".join(seen))
""")
    assert code == 0, output
    seen = output.split()[-1]
    assert seen.startswith("1111111111")
    assert seen.endswith("2")  # the new one was whole before the old one was removed
    assert "21" not in seen


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
