"""`trivet init`: small files with counted contents; what it says, what it writes, what it refuses."""

import csv
import json
from pathlib import Path

import pytest

from launch import config_file, pretrained, shipped
from launch.init import config_text
from trainer.config import RunConfig
from trainer.sources import read_splits

EXAMPLE_LABELS = ["late", "late", "late", "lost", "thanks"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Where no base model was fetched or trained."""
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict]) -> Path:
    """Write rows as .csv or .jsonl, by the ending."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def tweets(count: int = 100) -> list[dict]:
    """Five labels' worth of rows in turn: 3/5 late, 1/5 lost, 1/5 thanks."""
    return [
        {"id": i, "airline": f"line {i % 7}", "text": f"my bag number {i} did not come", "mood": EXAMPLE_LABELS[i % 5]}
        for i in range(count)
    ]


def load(path: str | Path) -> RunConfig:
    return config_file.load(Path(path), [], RunConfig)


def said(out: str) -> str:
    """The output without line breaks and padding."""
    return " ".join(out.split())


def test_it_says_what_is_there_and_writes_a_config_that_loads(trivet):
    write("bags/train.csv", [{**row, "sentiment": row.pop("mood")} for row in tweets()])
    write("bags/test.csv", [{"id": 1, "airline": "x", "text": "where is my bag", "sentiment": "lost"}])
    code, out, err = trivet("init", "bags", "--from", "bags")
    assert (code, err) == (0, "")
    assert "100 to train on, 1 held out (in test.csv)" in said(out)
    assert "`sentiment` names 3 classes, `text` is the text; not used: `id`, `airline`" in said(out)
    assert "late 60 (60%), lost 20 (20%), thanks 20 (20%); always saying the first is right 60%" in said(out)
    assert "repeated nothing" in said(out)
    assert "sentiment text 100% 3 late" in said(out)
    assert "trivet train bags.yaml" in out
    assert "trivet report runs/bags" in out
    config = load("bags.yaml")
    assert (config.run.name, config.objective.type) == ("bags", "classification")
    assert (config.data.text, config.data.label, config.data.skip_bad_rows) == ("text", "sentiment", False)
    assert (str(config.data.train), str(config.data.validation)) == ("bags/train.csv", "bags/test.csv")
    assert config.model.made_by == Path("pretrain_tiny.yaml").resolve()
    assert load("pretrain_tiny.yaml").run.name == "pretrain_tiny"
    splits = read_splits(config.data, "classification")
    assert (len(splits.train), len(splits.held_out)) == (100, 1)


def test_with_a_configs_folder_the_config_goes_there_and_names_the_example_beside_it(trivet):
    assert trivet("init")[0] == 0
    write("data/a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)])
    code, out, _ = trivet("init", "tales", "--from", "data/a.jsonl")
    assert code == 0
    assert "trivet train configs/tales.yaml" in out
    config = load("configs/tales.yaml")
    assert config.model.made_by == Path("configs/pretrain_tiny.yaml").resolve()
    assert str(config.data.train) == "data/a.jsonl"
    assert not Path("pretrain_tiny.yaml").exists()


def test_data_elsewhere_is_named_by_its_absolute_path(trivet, tmp_path, monkeypatch):
    path = write("a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)]).resolve()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert trivet("init", "tales", "--from", "../a.jsonl")[0] == 0
    assert load("tales.yaml").data.train == path


def test_rows_that_cannot_be_learned_from_are_counted_and_left_out(trivet):
    rows = tweets(50)
    del rows[2]["mood"]
    rows[4]["text"] = " "
    rows[9]["text"] = ""
    rows[11]["mood"] = 0.5
    write("a.jsonl", rows)
    code, out, _ = trivet("init", "bags", "--from", "a.jsonl", "--label", "mood")
    assert code == 0
    assert "left out rows with an empty 'text': 2 (a.jsonl, line 5; a.jsonl, line 10)" in said(out)
    assert "left out rows without 'mood': 1 (a.jsonl, line 3)" in said(out)
    assert "left out rows whose 'mood' is no name or whole number: 1 (a.jsonl, line 12)" in said(out)
    config = load("bags.yaml")
    assert config.data.skip_bad_rows
    text = said(Path("bags.yaml").read_text().replace("#", " "))
    assert "left out 4 of 50 rows: 2 with an empty 'text' (first: a.jsonl, line 5), 1 without 'mood'" in text
    splits = read_splits(config.data, "classification")
    assert len(splits.train) + len(splits.held_out) == 46


def test_repeated_rows_are_counted(trivet):
    rows = [{"text": f"text number {i} of many", "label": "ab"[i % 2]} for i in range(40)]
    again = [rows[0], rows[1], rows[1], {"text": rows[2]["text"], "label": "b"}]
    write("d/train.jsonl", [*rows, *again])
    write(
        "d/valid.jsonl", [rows[5], {"text": "quite another one", "label": "a"}, {"text": rows[6]["text"], "label": "b"}]
    )
    _, out, _ = trivet("init", "x", "--from", "d")
    assert (
        "training rows that say the same as an earlier one: 3; training texts that have several labels: 1; "
        "held-out rows that are trained on too, which flatters the score: 2" in said(out)
    )


@pytest.mark.parametrize(("count", "note"), [(1, "1 row"), (19, "19 rows"), (20, "")])
def test_too_few_rows_for_a_run_to_show_anything_are_told(trivet, count, note):
    write("bags/train.csv", tweets(count))
    write("bags/test.csv", tweets(40))
    code, _, err = trivet("init", "bags", "--from", "bags", "--text", "text", "--objective", "causal_lm")
    said = f"--from: {note} to train on, fewer than 20: a run tries the config out and shows nothing about a model"
    assert (code, err) == (0, f"note: {said}; give more rows\n" if note else "")
    assert Path("bags.yaml").is_file()


def test_one_long_text_is_many_rows(trivet):
    write("books/train.jsonl", [{"text": f"chapter {i}: " + "once upon a time " * 5000} for i in range(2)])
    write("books/test.jsonl", [{"text": "the end"}])
    code, _, err = trivet("init", "books", "--from", "books")
    assert (code, err) == (0, "")


def test_lengths_are_estimated_and_said_to_be_where_there_is_no_tokenizer_yet(trivet):
    # 24 bytes, ten tokens at 2.4 bytes each; four of 100 texts have 240 bytes, so 95% have up to ten.
    rows = [{"text": f"{i:<12}{'':-<11}."} for i in range(96)] + [{"text": f"{i} " * 120} for i in range(4)]
    write("d/train.jsonl", rows)
    write("d/dev.jsonl", [{"text": "held out"}])
    _, out, _ = trivet("init", "x", "--from", "d", "--text", "text")
    assert (
        "half of the training rows have up to 10, 95% up to 10, the longest 100 (by an estimate, 2.4 bytes to a token"
        in said(out)
    )


def test_lengths_are_counted_by_the_tokenizer_of_the_base_model(trivet, small_base):
    write("a.jsonl", [{"text": " ".join(["file"] * n)} for n in range(1, 101)])
    code, out, _ = trivet("init", "x", "--from", "a.jsonl", "--base", small_base)
    assert code == 0
    assert f"by the tokenizer of {small_base}" in said(out)
    assert "95% up to 9" in said(out)  # one token a word; the held-out rows are missing from a hundred
    config = load("x.yaml")
    assert (config.model.path, config.model.made_by) == (str(small_base), None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reply": "we are sorry to hear that", "label": "late"}, ["`reply` is a text too", "data.text_pair"]),
        ({"stars": 2.5}, ["`stars` holds numbers", "objective.problem=regression"]),
        ({"topics": ["bags", "delay"]}, ["`topics` holds lists", "objective.problem=multi_label"]),
    ],
    ids=["pairs", "numbers", "lists"],
)
def test_a_column_that_only_a_config_by_hand_can_use_is_told_with_its_setting(trivet, more, words):
    rows = [{"text": f"my bag number {n} did not come", **more} for n in range(60)]
    if "label" in more:
        rows = [{**row, "label": EXAMPLE_LABELS[n % 5]} for n, row in enumerate(rows)]
    write("a.jsonl", rows)
    code, out, err = trivet("init", "x", "--from", "a.jsonl")
    assert code == 0, err
    assert all(word in said(out) for word in words)


def test_a_parquet_file_is_read_as_a_table(trivet):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(tweets()), "bags.parquet")
    code, out, err = trivet("init", "bags", "--from", "bags.parquet", "--label", "mood")
    assert code == 0, err
    assert "late" in said(out)
    config = config_file.load(Path("bags.yaml"), [], RunConfig)
    assert (config.objective.type, str(config.data.train)) == ("classification", "bags.parquet")


@pytest.fixture
def small_base(tmp_path):
    """A model folder as far as `init` looks: a tokenizer of whole words, a size and a longest context."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"file": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    (folder / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [5_000, 5_000], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return Path("base")


def test_a_big_model_gets_lora_and_rows_within_its_context(trivet, small_base):
    write("a.jsonl", [{"text": "file " * 300 + str(n)} for n in range(60)])
    assert trivet("init", "x", "--from", "a.jsonl", "--base", small_base)[0] == 0
    config = load("x.yaml")
    assert (config.strategy.type, config.batch.max_length) == ("lora", 64)
    assert "25.0M weights" in Path("x.yaml").read_text()


def test_the_model_that_was_fetched_is_the_default(trivet, small_base):
    pretrained.FOLDER.parent.mkdir(parents=True)
    small_base.rename(pretrained.FOLDER)
    write("a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)])
    _, out, _ = trivet("init", "x", "--from", "a.jsonl")
    assert f"Wrote x.yaml: {pretrained.FOLDER.name}. Next:" in out
    assert load("x.yaml").model.path == str(pretrained.FOLDER)


def test_a_base_without_a_chat_template_is_refused_for_chats(trivet, small_base):
    write("a.jsonl", [{"prompt": f"what is {n}", "completion": f"a number: {n}"} for n in range(60)])
    code, _, err = trivet("init", "x", "--from", "a.jsonl", "--base", small_base)
    assert (code, Path("x.yaml").exists()) == (2, False)
    assert "base has no chat template, which sft needs" in err


@pytest.mark.parametrize(
    ("rows", "split"),
    [
        (["ab"] * 400, 512),  # sorted or not, nothing is missing: a part is enough
        (["a" * 1] * 900 + ["b"] * 100, 1000),  # the first 512 lack a class
    ],
    ids=["mixed", "sorted"],
)
def test_a_sorted_held_out_file_is_evaluated_whole(trivet, rows, split):
    labels = [label for each in rows for label in each]
    write("d/train.csv", [{"text": f"a text number {i}", "label": "ab"[i % 2]} for i in range(40)])
    write("d/test.csv", [{"text": f"another text {i}", "label": label} for i, label in enumerate(labels)])
    assert trivet("init", "x", "--from", "d")[0] == 0
    assert load("x.yaml").evaluation.max_rows == split


def test_a_folder_of_classes_and_a_folder_of_texts(trivet):
    for label in ("cats", "dogs"):
        for i in range(20):
            path = Path("animals", label, f"{i}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"a story about {label} number {i}")
    Path("animals", "cats", "LICENSE").write_text("free")
    _, out, _ = trivet("init", "animals", "--from", "animals")
    assert "`label` names 2 classes, `text` is the text" in said(out)
    assert "other files there, which are ignored: 1" in said(out)
    config = load("animals.yaml")
    assert (config.objective.type, str(config.data.train)) == ("classification", "animals")
    _, out, _ = trivet("init", "cats", "--from", "animals/cats")
    assert load("cats.yaml").objective.type == "causal_lm"
    splits = read_splits(load("cats.yaml").data, "causal_lm")
    assert len(splits.train) + len(splits.held_out) == 20


def test_verses_are_read_in_blocks_and_plain_lines_are_not(trivet):
    Path("verses.txt").write_text("\n".join(f"roses are red {i}\nviolets are blue\n" for i in range(30)))
    Path("lines.txt").write_text("\n".join(f"a line that stands for itself {i}" for i in range(60)))
    for name, unit, count in (("verses", "blocks", 30), ("lines", "lines", 60)):
        assert trivet("init", name, "--from", f"{name}.txt")[0] == 0
        config = load(f"{name}.yaml")
        splits = read_splits(config.data, "causal_lm")
        assert (config.data.split_txt, len(splits.train) + len(splits.held_out)) == (unit, count)


def test_a_held_out_file_without_the_needed_column_is_not_used(trivet):
    write("d/train.jsonl", [{"dialogue": f"A: hi {i}. B: hello", "summary": f"they meet {i}"} for i in range(60)])
    write("d/test.jsonl", [{"dialogue": "A: hi. B: hello", "summaries": ["they meet"]}])
    _, out, _ = trivet("init", "x", "--from", "d")
    assert "test.jsonl is not used: none of its rows has `summary`" in said(out)
    assert load("x.yaml").data.validation is None


def test_names_and_values_that_yaml_would_misread_survive(trivet):
    column = 'what: "is" #this\\\n\x85yes\x1b[31m'
    rows = [{column: f"a text number {i}\x1b[31m", "on": "ab"[i % 2]} for i in range(40)]
    path = write("a b.jsonl", rows)
    code, out, _ = trivet("init", "no", "--from", path, "--text", column, "--label", "on")
    assert code == 0
    assert "\x1b[31m" not in out
    config = load("no.yaml")
    assert (config.run.name, config.data.text, config.data.label) == ("no", column, "on")
    assert str(config.data.train) == "a b.jsonl"


def test_the_yaml_holds_what_was_chosen_value_by_value(tmp_path):
    sections = {"run": {"name": "1e3", "a": True, "b": 0.001, "c": "2024-01-01", "d": None, "e": "", "f": "null"}}
    (tmp_path / "a.yaml").write_text(config_text.render(sections, {"run.b": "why\nnot"}, ["head\nline"]))
    assert config_file.read_yaml(tmp_path / "a.yaml") == sections


def test_an_existing_config_is_kept_unless_forced(trivet):
    write("a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)])
    Path("x.yaml").write_text("mine")
    code, _, err = trivet("init", "x", "--from", "a.jsonl")
    assert (code, Path("x.yaml").read_text()) == (2, "mine")
    assert err == "error: x.yaml: is there already; choose another NAME, or replace it with --force\n"
    assert trivet("init", "x", "--from", "a.jsonl", "--force")[0] == 0
    assert load("x.yaml").run.name == "x"


@pytest.fixture
def chat_model(tmp_path) -> str:
    """A folder with a random Llama, 16 wide, and a tokenizer with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(["my bag did not come"], 300, 128)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return "model"


@pytest.mark.slow
def test_what_it_writes_trains_for_every_objective(trivet, chat_model):
    pairs = [
        {"instruction": f"where is bag {i}", "input": "now" * (i % 2), "output": f"in hall {i}"} for i in range(60)
    ]
    write("bags.csv", tweets(60))
    write("pairs.jsonl", [*pairs, {"instruction": "where is my bag"}])
    Path("tales").mkdir()
    for i in range(40):
        Path("tales", f"{i}.txt").write_text(f"once upon a time there was bag number {i}\n\nand it was lost")
    for name, data, objective in (
        ("bags", "bags.csv", "classification"),
        ("pairs", "pairs.jsonl", "sft"),
        ("tales", "tales", "causal_lm"),
    ):
        options = ["--label", "mood"] if name == "bags" else []
        assert trivet("init", name, "--from", data, "--base", chat_model, *options)[0] == 0
        assert load(f"{name}.yaml").objective.type == objective
        assert trivet("train", f"{name}.yaml", "--dry-run")[0] == 0
        code, _, err = trivet("train", f"{name}.yaml", "run.steps=2", "optim.warmup_steps=0", "log.tensorboard=false")
        assert (code, Path("runs", name, "result.json").is_file()) == (0, True)
        left_out = "left out 1 of 61 rows: 1 without 'output' (first: pairs.jsonl, line 61)"
        assert (left_out in err) == (name == "pairs")


def test_the_run_that_makes_the_base_model_cannot_be_the_task(trivet):
    write("a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)])
    code, _, err = trivet("init", "pretrain_tiny", "--from", "a.jsonl")
    assert (code, list(Path().glob("*.yaml"))) == (2, [])
    assert "NAME: 'pretrain_tiny' is the run that makes the base model; choose another" in err


def test_an_earlier_run_of_the_name_is_pointed_out(trivet):
    write("a.jsonl", [{"text": f"once upon a time {i}"} for i in range(60)])
    assert "holds an earlier run" not in trivet("init", "x", "--from", "a.jsonl")[1]
    Path("runs/x").mkdir(parents=True)
    assert "runs/x holds an earlier run" in trivet("init", "x", "--from", "a.jsonl", "--force")[1]


def test_alone_it_copies_the_examples_and_never_overwrites_a_changed_one(trivet):
    source = shipped.example_configs()
    names = sorted(path.relative_to(source) for path in source.rglob("*.yaml"))
    code, out, _ = trivet("init")
    assert code == 0
    assert f"{len(names)} example configs written" in out
    assert all((Path("configs") / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert load("configs/sft_lora.yaml").model.made_by == Path("configs/pretrain_tiny.yaml").resolve()
    Path("configs/classify.yaml").write_text("mine")
    Path("configs/sft_lora.yaml").unlink()
    code, _, err = trivet("init")
    assert (code, Path("configs/classify.yaml").read_text()) == (2, "mine")
    assert "configs/classify.yaml: is there and differs" in err
    assert not Path("configs/sft_lora.yaml").exists()  # all or none
    assert trivet("init", "--force")[0] == 0
    assert Path("configs/classify.yaml").read_bytes() == (source / "classify.yaml").read_bytes()
