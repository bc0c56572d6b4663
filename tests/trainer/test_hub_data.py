"""Data sets of the hub, in folders as the hub holds them: their splits, classes by name, no code of theirs."""

import json
import shutil

import pytest

from trainer.config import HubData, RunConfig
from trainer.data_files import DataError
from trainer.sources import read_splits

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(400)]


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder as the hub holds them: two splits, with classes by number."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "moods"
    folder.mkdir(parents=True)
    names = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "X"])),
        }
    )
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        columns = {
            "text": [row["text"] for row in rows],
            "label": [i % 2 for i in range(len(rows))],
            "tags": [[i % 2, 0] for i in range(len(rows))],
        }
        datasets.Dataset.from_dict(columns, names).to_parquet(folder / f"{split}-00000.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_in_a_folder_gives_its_splits_with_names_for_classes(hub_folder, streaming):
    data = HubData(type="hub", path=str(hub_folder), test_split="test", streaming=streaming)
    splits = read_splits(data, "classification")
    assert len(splits.train) + len(splits.held_out) == 400
    assert splits.test[1] == {"text": "row 1", "label": "good", "tags": ["X", "O"]}
    assert splits.test[1].place == f"{hub_folder}, split test, row 2"
    assert splits.train.num_rows == (None if streaming else len(splits.train))
    positions = [position for position, _ in splits.train.from_position()]
    later = [row for _, row in splits.train.from_position(positions[50])]
    assert later == splits.train[51:]


def test_what_a_pass_over_a_large_data_set_found_is_known_the_next_time(hub_folder, monkeypatch, tmp_path):
    from trainer import sources, splits

    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "trivet"))
    monkeypatch.setattr(sources, "_WORTH_KEEPING_BYTES", 0)
    data = HubData(type="hub", path=str(hub_folder))
    first = read_splits(data, "classification")
    monkeypatch.setattr(splits, "_read", None)  # nothing is read to be counted
    second = read_splits(data, "classification")
    assert (second.parts(), second.fingerprint) == (first.parts(), first.fingerprint)


def test_the_code_of_a_data_set_is_never_run_nor_its_pickles_read(hub_folder, tmp_path):
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "trap.py").write_text(trap)
    (folder / "data.pkl").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "sprung").encode() + b"'\ntR.")
    with pytest.raises(DataError, match=r"data\.path: .*trap, split train: cannot be loaded \(.*trap\.py"):
        read_splits(HubData(type="hub", path=str(folder)), "causal_lm")
    (folder / "trap.py").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        read_splits(HubData(type="hub", path=str(folder)), "causal_lm")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_split": "trian"}, r'split trian: cannot be loaded \(Unknown split "trian"'),
        ({"subset": "large"}, r"\(large\), split train: cannot be loaded"),
        ({"path": "no/such/folder/here"}, r"data\.path: no/such/folder/here: no such folder"),
        ({"path": "FILE"}, r"is a file; use data\.type: files"),
        ({"path": "nobody/moods"}, r"data\.path: nobody/moods: no such folder, .* while HF_HUB_OFFLINE is set"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_refused_in_one_line(hub_folder, monkeypatch, settings, said):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if settings.get("path") == "FILE":
        settings = {"path": str(hub_folder / "test-00000.parquet")}
    with pytest.raises(DataError, match=said) as caught:
        read_splits(HubData(**{"type": "hub", "path": str(hub_folder), **settings}), "classification")
    assert "\n" not in str(caught.value)


def test_broken_files_of_a_data_set_are_refused_in_one_line(hub_folder):
    shutil.copy(hub_folder / "test-00000.parquet", hub_folder / "train-00001.parquet")
    whole = (hub_folder / "train-00001.parquet").read_bytes()
    (hub_folder / "train-00001.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"split train: cannot be loaded \(") as caught:
        read_splits(HubData(type="hub", path=str(hub_folder)), "classification")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["stream", "hub", "hub stream"])
def test_a_classifier_learns_from_streams_and_the_hub_with_a_pass_for_its_labels(
    hub_folder, tmp_path, write_rows, make_config, train, data
):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    streaming = {"streaming": "stream" in data, "window_rows": 100}
    section = {"type": "files", "train": str(rows), "test_fraction": 0.1, **streaming}
    if "hub" in data:
        section = {"type": "hub", "path": str(hub_folder), "test_split": "test", **streaming}
    config = make_config("classification", "full", run={"steps": 2}, objective={"class_weights": "balanced"})
    config = RunConfig.model_validate({**config.model_dump(mode="json"), "data": section})
    assert train(config) == 0
    result = json.loads((config.run.folder / "result.json").read_text())
    assert 0 <= result["test_metrics"]["accuracy"] <= 1
    assert json.loads((config.run.folder / "model" / "config.json").read_text())["id2label"] == (
        {"0": "bad", "1": "good"} if "hub" in data else {"0": "a", "1": "b"}
    )
