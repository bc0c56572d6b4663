"""Room on the disk: what a run will write against what is free, before it starts."""

import pytest
from safetensors import safe_open

from serving.directory import BadInput
from trainer import build, checkpoint, disk_space


@pytest.fixture
def check(make_config, monkeypatch):
    """Return a function that checks a config against so many models and checkpoints of free space, less `less`."""

    def run(models: int, checkpoints: int, less: int = 0, *args, **changes) -> str:
        config = make_config(*args, **changes)
        model = build.build(config).model
        free = (
            models * disk_space.model_bytes(model)
            + checkpoints * disk_space.checkpoint_bytes(model, config.optim)
            - less
        )
        monkeypatch.setattr(disk_space, "free_bytes", lambda folder: free)
        return disk_space.check(config, model)

    return run


def tensor_bytes(path) -> int:
    with safe_open(path, "pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("objective", "strategy", "optimizer"),
    [("causal_lm", "scratch", "adamw"), ("sft", "lora", "sgd"), ("classification", "full", "adafactor")],
)
def test_the_sizes_are_those_of_the_files(make_config, parts_of, objective, strategy, optimizer):
    config = make_config(objective, strategy, checkpoint={"every": 6}, optim={"type": optimizer})
    sizes = []
    parts_of(
        config,
        lambda parts: sizes.extend(
            [disk_space.model_bytes(parts.model), disk_space.checkpoint_bytes(parts.model, config.optim)]
        ),
    )
    folder = config.run.folder
    assert sizes[0] == sum(map(tensor_bytes, (folder / "model").rglob("*.safetensors")))
    newest, _ = checkpoint.newest(folder / "checkpoints")
    assert sizes[1] == tensor_bytes(newest / "rank-00000.safetensors")


def test_a_model_that_has_no_room_is_refused_in_one_line(check):
    with pytest.raises(BadInput) as refused:
        check(1, 0, less=1)
    message = str(refused.value)
    assert message.startswith("run.dir: ")
    assert "has no room for the model, which needs 1" in message
    assert message.endswith(" KiB is free there; free some space or choose another run.dir")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [({}, 1, "the last checkpoint"), ({"every": 2, "keep": 3}, 4, "4 checkpoints at a time")],
)
def test_checkpoints_that_may_have_no_room_are_a_warning(check, settings, count, said):
    assert check(1, count, checkpoint=settings) == ""
    warning = check(1, count, 1, checkpoint=settings)
    assert warning.startswith("warning: run.dir: ")
    assert said in warning
    assert ("lower checkpoint.keep" in warning) == bool(settings)


def test_checkpoints_that_are_there_already_need_no_room_again(check, make_config):
    there = make_config().run.folder / "checkpoints" / "step-00000002"
    there.mkdir(parents=True)
    settings = {"every": 2, "keep": 1}
    assert check(1, 1, 0, checkpoint=settings)
    size = disk_space.checkpoint_bytes(build.build(make_config()).model, make_config().optim)
    (there / "rank-00000.safetensors").write_bytes(bytes(size))
    assert check(1, 1, 0, checkpoint=settings) == ""


def test_a_folder_that_is_not_there_yet_lies_where_its_parents_do(tmp_path):
    assert disk_space.free_bytes(tmp_path / "not" / "yet") == pytest.approx(disk_space.free_bytes(tmp_path), rel=0.1)
