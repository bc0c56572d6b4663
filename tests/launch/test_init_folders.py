"""What `trivet init` makes of folders: splits, classes, texts, and what it says about all that it does not read."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from launch import config_file
from trainer.config import RunConfig
from trainer.sources import read_splits


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(folder: str, count: int, ending: str = ".txt") -> None:
    """Write so many texts, all different."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Path(folder, f"{i}{ending}").write_text(f"a story from {folder} with the number {i}")


def said(out: str) -> str:
    return " ".join(out.split())


def splits_of(path: str):
    config = config_file.load(Path(path), [], RunConfig)
    return config, read_splits(config.data, config.objective.type)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "test"), ("training", "validation"), ("Train", "val"), ("train", "dev"), ("train", "valid")],
)
def test_folders_named_like_splits_are_no_classes(trivet, train, held_out):
    put(f"tales/{train}", 30)
    put(f"tales/{held_out}", 5)
    code, out, _ = trivet("init", "x", "--from", "tales")
    assert code == 0
    assert f"the folder {train} is trained on, {held_out} held out" in said(out)
    config, splits = splits_of("x.yaml")
    assert config.objective.type == "causal_lm"
    assert (str(config.data.train), str(config.data.validation)) == (f"tales/{train}", f"tales/{held_out}")
    assert (len(splits.train), len(splits.held_out)) == (30, 5)


def test_classes_inside_of_splits_are_the_classes(trivet):
    for split, count in (("train", 20), ("test", 5)):
        put(f"acl/{split}/pos", count)
        put(f"acl/{split}/neg", count)
    Path("acl/README").write_text("reviews")
    Path("acl/imdbEr.txt").write_text("7.4\n")  # as beside the splits of the well-known data set
    code, out, _ = trivet("init", "x", "--from", "acl")
    assert code == 0
    assert "not used: imdbEr.txt" in said(out)
    config, splits = splits_of("x.yaml")
    assert config.objective.type == "classification"
    assert (len(splits.train), len(splits.held_out)) == (40, 10)
    assert {row["label"] for row in splits.train} == {"pos", "neg"}


def test_a_train_folder_alone_gives_held_out_rows_too(trivet):
    put("acl/train/pos", 30)
    put("acl/train/neg", 30)
    assert trivet("init", "x", "--from", "acl")[0] == 0
    config, splits = splits_of("x.yaml")
    assert (str(config.data.train), config.data.validation) == ("acl/train", None)
    assert len(splits.train) + len(splits.held_out) == 60


def test_a_class_may_be_called_train(trivet):
    for label in ("train", "bus", "plane"):
        put(f"vehicles/{label}", 20)
    assert trivet("init", "x", "--from", "vehicles")[0] == 0
    _, splits = splits_of("x.yaml")
    assert {row["label"] for row in splits.train} == {"train", "bus", "plane"}


def test_splits_without_a_train_folder_are_refused_and_no_test_data_is_advised(trivet):
    put("tales/test", 5)
    put("tales/val", 5)
    _, _, err = trivet("init", "x", "--from", "tales")
    assert "--from: tales has no train folder; it has: test, val; name one of them: --from tales/val\n" in err
    Path("my files").mkdir()
    for name in ("my_test.csv", "my_train.csv"):
        Path("my files", name).write_text("text\na b c\n")
    _, _, err = trivet("init", "x", "--from", "my files")
    assert "it has: my_test.csv, my_train.csv; name one of them: --from 'my files/my_train.csv'\n" in err


def test_a_folder_without_texts_is_an_error_of_the_option(trivet):
    Path("nothing").mkdir()
    assert trivet("init", "x", "--from", "nothing")[2].startswith("error: --from: nothing is a folder without texts")


def test_endings_in_capital_letters_are_read(trivet):
    put("animals/cats", 20)
    put("animals/dogs", 20, ".TXT")
    assert trivet("init", "x", "--from", "animals")[0] == 0
    _, splits = splits_of("x.yaml")
    assert len(splits.train) + len(splits.held_out) == 40
    Path("A.CSV").write_text("text\n" + "".join(f"a story number {i}\n" for i in range(60)))
    assert trivet("init", "y", "--from", "A.CSV")[0] == 0


def test_what_is_not_read_is_named(trivet):
    put("animals/cats", 20)
    put("animals/dogs", 20)
    put("animals/dogs/puppies", 3)
    put("animals/birds", 2, ".md")
    Path("animals/cows").mkdir()
    put("animals/.git", 4)
    out = said(trivet("init", "x", "--from", "animals")[1])
    assert "other files there, which are ignored: 5 (also in birds, dogs/puppies)" in out
    assert "folders without texts, which are ignored: birds, cows" in out


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
@pytest.mark.parametrize("comma", ["", ", too"], ids=["", "with commas in the texts"])
def test_another_separator_than_the_comma_is_refused_and_the_command_converts_it(trivet, mark, name, comma):
    rows = [[f"a text number {i}{comma}", "ab"[i % 2]] for i in range(60)]
    with Path("my data.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([["text", "label"], *rows])
    code, _, err = trivet("init", "x", "--from", "my data.csv")
    assert (code, err.count("\n"), list(Path().glob("*.yaml"))) == (2, 1, [])
    assert f"fields must be separated by commas, and here are {name}; convert it: python -c " in err
    command = err.rpartition("convert it: python")[2].strip()
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert trivet("init", "x", "--from", "my data.commas.csv")[0] == 0
    _, splits = splits_of("x.yaml")
    assert sorted(row["text"] for row in (*splits.train, *splits.held_out)) == sorted(text for text, _ in rows)


def test_a_column_that_is_asked_for_may_have_a_semicolon_in_its_name(trivet):
    Path("a.csv").write_text("to be; or not\n" + "".join(f"a line of text {i}\n" for i in range(60)))
    assert trivet("init", "x", "--from", "a.csv", "--text", "to be; or not")[0] == 0


def test_line_ends_of_old_are_told_in_plain_words(trivet):
    Path("a.csv").write_bytes(b"text,label\ra b c,x\rd e f,y\r")
    _, _, err = trivet("init", "x", "--from", "a.csv")
    assert "a carriage return without a line feed; convert the line ends" in err
    assert "newline=" not in err


def test_held_out_data_with_other_labels_can_be_left_out(trivet):
    Path("d").mkdir()
    for name, labels in (("train", "ab"), ("test", "yz")):
        rows = [f"a text number {i},{labels[i % 2]}\n" for i in range(60)]
        Path("d", f"{name}.csv").write_text("text,label\n" + "".join(rows))
    _, _, err = trivet("init", "x", "--from", "d")
    assert "whose label is in no training row" in err
    assert err.endswith("; without it: --from d/train.csv\n")
