"""Which checkpoint a run goes on from: the newest, none, or the one that is named; another world's only if asked to."""

import shutil
from types import SimpleNamespace

import pytest

from serving.directory import DirectoryError
from trainer import resume

EVERY_2 = {"every": 2, "keep": 9}


@pytest.fixture
def finished(make_config, train):
    """A run of 6 steps with a checkpoint every 2."""
    config = make_config(checkpoint=EVERY_2)
    assert train(config) == 0
    return config


def checkpoint_of(config, step: int) -> str:
    return str(config.run.folder / "checkpoints" / f"step-{step:08}")


def test_never_starts_over_though_the_run_is_finished(finished, make_config, train, read_lines, capfd):
    before = read_lines(finished)
    assert train(finished) == 0
    assert "already finished" in capfd.readouterr().err
    assert train(make_config(checkpoint={**EVERY_2, "resume": "never"})) == 0
    said = capfd.readouterr().err
    assert "step 1/6" in said
    assert "going on from" not in said
    assert read_lines(finished) == before


def test_a_named_checkpoint_of_the_run_is_gone_back_to(finished, make_config, train, read_lines, capfd):
    before = read_lines(finished)
    shutil.rmtree(finished.run.folder / "model")
    assert train(make_config(checkpoint={**EVERY_2, "resume": checkpoint_of(finished, 2)})) == 0
    said = capfd.readouterr().err
    assert f"going on from {checkpoint_of(finished, 2)}" in said
    assert "step 3/6" in said
    assert read_lines(finished) == before


def test_a_checkpoint_of_another_run_is_where_a_run_starts_until_it_has_one_of_its_own(
    finished, make_config, train, read_lines, capfd
):
    other = make_config(run={"name": "other"}, checkpoint={**EVERY_2, "resume": checkpoint_of(finished, 2)})
    assert resume.find(other)[0] == finished.run.folder / "checkpoints" / "step-00000002"
    assert train(other) == 0
    losses = [[line["loss"] for line in read_lines(each) if line["kind"] == "train"] for each in (finished, other)]
    assert losses[1] == losses[0][2:]
    assert resume.find(other)[0] == other.run.folder / "checkpoints" / "step-00000006"


def test_a_process_that_was_started_again_goes_on_whatever_the_first_was_told(finished, make_config, monkeypatch):
    never = make_config(checkpoint={"resume": "never"})
    assert resume.find(never) == (None, [])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume.find(never)[0].name == "step-00000006"


def test_a_checkpoint_that_is_not_there_or_broken_is_no_reason_to_start_over(finished, make_config):
    with pytest.raises(DirectoryError, match=r"checkpoint\.resume: nowhere found; accepted: auto, never, or"):
        resume.find(make_config(checkpoint={"resume": "nowhere"}))
    path = checkpoint_of(finished, 4)
    with open(f"{path}/rank-00000.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DirectoryError, match=r"checkpoint\.resume: .*rank-00000\.safetensors: altered"):
        resume.find(make_config(checkpoint={"resume": path}))


@pytest.mark.parametrize(
    ("world", "here"),
    [
        ({"mode": "ddp", "zero_stage": 0, "size": 1}, "ddp on 1 process"),
        ({"mode": "deepspeed", "zero_stage": 3, "size": 4}, "zero3 on 4 processes"),
        ({"mode": "fsdp2", "zero_stage": 0, "size": 2}, "fsdp2 on 2 processes"),
    ],
)
def test_a_checkpoint_of_another_world_is_refused_naming_both(finished, world, here):
    path = finished.run.folder / "checkpoints" / "step-00000006"
    said = rf"step-00000006: was saved by single on 1 process, and this run is {here}; add --reshard"
    with pytest.raises(DirectoryError, match=said):
        resume.refuse_other_world(path, SimpleNamespace(**world))
    resume.refuse_other_world(path, SimpleNamespace(mode="single", zero_stage=0, size=1))


def test_the_command_line_says_resume_and_reshard_as_the_config_does(trivet, finished, tmp_path):
    from launch import config_file

    path = tmp_path / "run.yaml"
    path.write_text(config_file.to_yaml(finished))
    code, _, err = trivet("train", path, "--resume", "nowhere", "--reshard", "run.steps=7")
    assert code == 2
    assert "checkpoint.resume: nowhere found" in err
    assert trivet("train", path, "--resume", checkpoint_of(finished, 4), "run.steps=7")[0] == 0
