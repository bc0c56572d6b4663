"""From the data section to batches: through the cache or as a stream, from one source or several, and on resume."""

import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from serving.directory import BadInput
from trainer import audit, build, encoding
from trainer.dataset import make_feed, prepare_data
from trainer.objectives.causal_lm import CausalLMObjective
from trainer.packing import Encoded, Example
from trainer.rows import KeptRows

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded_parts(monkeypatch):
    """The number of rows in each part that causal_lm encoded."""
    parts = []
    encode = CausalLMObjective.encode
    monkeypatch.setattr(
        CausalLMObjective,
        "encode",
        lambda self, rows, *rest: (parts.append(len(rows)), encode(self, rows, *rest))[1],
    )
    return parts


def contents(feed, steps=range(4)) -> list:
    """Everything that the steps read."""
    return [
        {name: tensor.tolist() for name, tensor in batch.items()}
        for step in steps
        for batch in feed.micro_batches(step)
    ]


def test_a_second_run_on_the_same_data_encodes_nothing_and_reads_the_same(make_config, own_cache, encoded_parts):
    first = build.build(make_config())
    assert sum(encoded_parts) == 49  # 40 training rows and 9 held out
    second = build.build(make_config(run={"name": "other"}, optim={"lr": 1.0}, batch={"rows": 4}))
    assert sum(encoded_parts) == 49
    assert contents(second.feed) == contents(first.feed)
    assert second.fingerprints == first.fingerprints
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()


def test_the_cache_is_keyed_by_content_and_not_by_names_or_times(
    make_config, own_cache, encoded_parts, data_files, tmp_path
):
    section = data_files["causal_lm"]
    copy = {name: tmp_path / f"copy-{name}.jsonl" for name in ("train", "validation")}
    for name, path in copy.items():
        shutil.copyfile(section[name], path)
    build.build(make_config())
    build.build(make_config(data={name: str(path) for name, path in copy.items()}))
    assert sum(encoded_parts) == 49
    copy["train"].write_text(copy["train"].read_text().replace("fox", "ox", 1))
    build.build(make_config(data={name: str(path) for name, path in copy.items()}))
    assert encoded_parts[2] == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": {"max_length": 32}},
        {"tokenizer": {"vocab_size": 310}},
        {"data": {"text": "other"}},
        {"data": {"type": "files", "skip_bad_rows": True}},
    ],
    ids=["max_length", "tokenizer", "column", "skip_bad_rows"],
)
def test_whatever_shapes_the_examples_is_part_of_the_key(
    make_config, own_cache, encoded_parts, data_files, tmp_path, write_rows, changes
):
    rows = [{"text": f"the quick brown fox {i}", "other": f"a list of lines {i}"} for i in range(30)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    files = {"train": path, "validation": path}
    build.build(make_config(data=files))
    assert sum(encoded_parts) == 30  # the same rows twice are one entry
    build.build(make_config(**{**changes, "data": {**files, **changes.get("data", {})}}))
    assert sum(encoded_parts) == 60


def test_another_version_of_the_code_encodes_again(make_config, own_cache, encoded_parts, monkeypatch):
    build.build(make_config())
    monkeypatch.setattr(encoding, "_code_version", lambda: "newer")
    build.build(make_config())
    assert sum(encoded_parts) == 2 * 49


def test_examples_that_were_altered_are_encoded_again(make_config, own_cache, encoded_parts):
    first = contents(build.build(make_config()).feed)
    for path in own_cache.rglob("input_ids.values"):
        path.write_bytes(bytes(len(path.read_bytes())))
    assert contents(build.build(make_config()).feed) == first
    assert sum(encoded_parts) == 2 * 49


def test_a_trained_tokenizer_is_the_same_from_the_cache(make_config, own_cache):
    config = make_config()
    trained = prepare_data(config)
    found = prepare_data(config)
    assert len(list((own_cache / "tokenizers").glob("*/tokenizer.json"))) == 1
    shutil.rmtree(own_cache)
    again = prepare_data(config)
    for data in (found, again):
        assert data.fingerprints(config) == trained.fingerprints(config)
        for name in ("eos_token_id", "pad_token_id", "padding_side", "model_max_length", "chat_template"):
            assert getattr(data.tokenizer, name) == getattr(trained.tokenizer, name)


def test_a_tokenizer_from_the_cache_is_the_one_that_was_trained(make_config, own_cache):
    from trainer.dataset import train_for

    config = make_config()
    data = prepare_data(config)
    trained = train_for(config.tokenizer, config.model, data.objective.texts(data.splits.train))
    assert trained.backend_tokenizer.to_str() == data.tokenizer.backend_tokenizer.to_str()
    assert trained.special_tokens_map == data.tokenizer.special_tokens_map


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, write_rows):
    """A data section of two sources whose rows say where they are from; the second has another column."""
    first = write_rows(tmp_path / "first.jsonl", [{"text": f"the fox {i}"} for i in range(40)])
    second = write_rows(tmp_path / "second.jsonl", [{"body": f"a list {i}"} for i in range(20)])
    held_out = write_rows(tmp_path / "held-out.jsonl", [{"text": "the list", "body": "a fox"}] * 3)
    files = {"type": "files", "validation": str(held_out)}
    return {
        "type": "mixture",
        "sources": [
            {"weight": 3, "data": {**files, "train": str(first)}},
            {"weight": 1, "data": {**files, "train": str(second), "text": "body"}},
        ],
    }


def mixture_config(make_config, mixture, **changes):
    """Rows of one text each, so that a row tells its source."""
    config = make_config("masked_lm", "scratch", **changes) if "masked_lm" in changes else make_config(**changes)
    values = config.model_dump(mode="json")
    values["data"] = mixture
    return type(config).model_validate(values)


def texts_of_step(parts, step: int) -> list[str]:
    return [
        parts.tokenizer.decode(example.input_ids)
        for drawn in parts.feed.reading.between(step * 4, step * 4 + 4)
        for example in drawn.row
    ]


def test_a_mixture_is_drawn_from_by_weight(make_config, mixture, own_cache):
    mixture["sources"][0]["weight"] = 0.5
    mixture["sources"][1]["weight"] = 0.5
    parts = build.build(mixture_config(make_config, mixture, batch={"max_length": 8}))
    sizes = [len(source) for source in parts.feed.train.sources]
    drawn = [each.place for step in range(2048) for each in parts.feed.reading.between(step * 4, step * 4 + 4)]
    from_first = sum(place < sizes[0] for place in drawn)
    assert (from_first, len(drawn) - from_first) == (4096, 4096)
    read = Counter(drawn)
    for part in (range(sizes[0]), range(sizes[0], sum(sizes))):
        assert max(read[row] for row in part) - min(read[row] for row in part) <= 1  # each epoch holds each row once
    first, second = (4096 / len(part) for part in (range(sizes[0]), range(sizes[1])))
    assert parts.feed.outlook(2048).endswith(f" {first:.2f} to {second:.2f} epochs")
    assert {"the fox", "a list"} <= {
        " ".join(text.split()[:2]) for text in texts_of_step(parts, 0) + texts_of_step(parts, 1)
    }


def test_other_weights_encode_nothing_again(make_config, mixture, own_cache, encoded_parts):
    build.build(mixture_config(make_config, mixture))
    before = sum(encoded_parts)
    mixture["sources"][0]["weight"] = 30
    build.build(mixture_config(make_config, mixture))
    assert sum(encoded_parts) == before


def test_a_killed_mixture_goes_on_bit_for_bit(make_config, mixture, train, train_child, read_lines):
    settings = {"checkpoint": {"every": 3}, "evaluation": {"every": 2, "max_rows": 4}}
    runs = [
        mixture_config(make_config, mixture, run={"name": name, "steps": 7}, **settings) for name in ("whole", "killed")
    ]
    assert train(runs[0]) == 0
    code, output = train_child(runs[1], step=5, act=KILL)
    assert code == -signal.SIGKILL, output
    assert train(runs[1]) == 0
    assert read_lines(runs[1]) == read_lines(runs[0])
    weights = [(run.run.folder / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


# --- streams ----------------------------------------------------------------------------------------------------------

STREAM = {"streaming": True, "window_rows": 7}


@pytest.mark.parametrize("objective", ["causal_lm", "classification"])
def test_a_killed_stream_goes_on_bit_for_bit(make_config, train, train_child, read_lines, objective):
    strategy = "scratch" if objective == "causal_lm" else "full"
    settings = {"checkpoint": {"every": 3}, "evaluation": {"every": 2, "max_rows": 4}, "data": STREAM}
    runs = [
        make_config(objective, strategy, run={"name": name, "steps": 14}, **settings) for name in ("whole", "killed")
    ]
    assert train(runs[0]) == 0
    code, output = train_child(runs[1], step=11, act=KILL)  # in the second epoch
    assert code == -signal.SIGKILL, output
    assert train(runs[1]) == 0
    assert read_lines(runs[1]) == read_lines(runs[0])
    weights = [(run.run.folder / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_a_stream_holds_a_window_and_reads_every_row_of_the_file_once_an_epoch(make_config, data_files):
    parts = build.build(make_config("classification", "full", data=STREAM, batch={"rows": 4}))
    rows = [
        tuple(drawn.row[0].input_ids.tolist())
        for step in range(20)
        for drawn in parts.feed.reading.between(step * 4, step * 4 + 4)
    ]
    whole = build.build(make_config("classification", "full"))
    expected = Counter(tuple(row[0].input_ids.tolist()) for row in whole.feed.train)
    assert Counter(rows[:40]) == Counter(rows[40:]) == expected
    assert len(parts.feed.train) == 7


def test_a_stream_encodes_window_by_window_and_not_the_whole_before_the_run(make_config, encoded_parts):
    parts = build.build(make_config(data=STREAM, evaluation={"max_rows": 2}))
    assert encoded_parts[0] == 7
    assert sum(encoded_parts) < 40
    before = len(encoded_parts)
    list(parts.feed.micro_batches(0))
    assert len(encoded_parts) <= before + 2
    assert len(parts.feed.held_out) == 2


def test_ranks_read_a_stream_together_as_one_process_does(make_config, data_files):
    config = make_config("sft", "full", data=STREAM, batch={"rows": 4, "micro_rows": 1, "max_length": 48})
    data = prepare_data(config)

    def feed_of(rank: int, size: int):
        return make_feed(config, data, SimpleNamespace(rank=rank, size=size))

    alone, ranks = feed_of(0, 1), [feed_of(rank, 2) for rank in range(2)]
    for step in range(12):  # more than an epoch
        dealt = zip(*(feed.micro_batches(step) for feed in ranks), strict=True)
        together = [batch["input_ids"].tolist() for of_all in dealt for batch in of_all]
        assert together == [batch["input_ids"].tolist() for batch in alone.micro_batches(step)]


def test_a_run_on_a_stream_says_once_what_it_left_out_of_it(make_config, train, tmp_path, write_rows, capfd):
    answered = [{"prompt": f"list {n}", "completion": "lines"} if n % 4 else {"prompt": "no answer"} for n in range(40)]
    silent = {"prompt": "long " * 60, "completion": "lines"}
    path = write_rows(tmp_path / "rows.jsonl", [*answered, silent])
    data = {**STREAM, "train": str(path), "validation": str(path), "skip_bad_rows": True}
    config = make_config("sft", "full", run={"name": "stream", "steps": 30}, data=data)  # several epochs
    assert train(config) == 0
    said = capfd.readouterr().err.splitlines()
    end = said[-3:]
    assert f"left out 10 rows of the stream: 10 without 'completion' (first: {path}, line 1)" in end
    # One of the stream, however many epochs were read, and one of the held-out rows.
    assert any(line.startswith("left out 2 rows: the assistant says nothing") for line in end)


def test_a_dry_run_reads_no_stream_to_its_end(make_config, encoded_parts, capsys):
    from launch.train import dry_run

    dry_run(make_config(data=STREAM, run={"steps": 1000}, evaluation={"max_rows": 2}))
    assert "of a stream, which is not read to count its tokens" in capsys.readouterr().out
    assert sum(encoded_parts) < 40


# --- what a resume checks ---------------------------------------------------------------------------------------------


def test_a_data_file_that_changed_since_the_checkpoint_is_named(make_config, train, data_files, tmp_path):
    path = tmp_path / "rows.jsonl"
    shutil.copyfile(data_files["causal_lm"]["train"], path)
    config = make_config(run={"steps": 4}, data={"train": str(path)}, checkpoint={"every": 2, "keep": 5})
    assert train(config) == 0
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000004")
    (config.run.folder / "result.json").unlink()
    path.write_text(path.read_text().replace("fox", "ox", 1))
    with pytest.raises(BadInput, match=f"the train data \\({path}\\) changed since it was saved; restore it"):
        build_and_resume(config)


def build_and_resume(config):
    from trainer import loop

    loop.resume(config, build.build(config))


def test_a_test_part_is_there_for_the_end_of_the_run_and_not_before(make_config, data_files):
    held_out = data_files["causal_lm"]["validation"]
    parts = build.build(make_config(data={"test": held_out}))
    assert sum(len(example.input_ids) for row in parts.feed.test for example in row) > 0
    batches = [batch for batch, counts in parts.feed.evaluation(parts.feed.test) if counts]
    assert sum(batch["input_ids"].numel() for batch in batches) >= sum(
        len(example.input_ids) for row in parts.feed.test for example in row
    )
    assert len(build.build(make_config()).feed.test) == 0


def test_ranks_wait_in_a_lock_while_one_of_them_prepares_the_data(own_cache, make_config, child, tmp_path):
    """Not in a collective, which would run into its time limit."""
    from launch import config_file

    (tmp_path / "run.yaml").write_text(config_file.to_yaml(make_config()))
    code = f"""
import os, sys
from pathlib import Path
from launch import config_file
from trainer.config import RunConfig
from trainer.encoding import stored_examples
from trainer import audit, build, encoding
os.environ["TRIVET_CACHE"] = {str(own_cache)!r}
encoded = encoding.encoded
encoding.encoded = lambda *args: (print("encoding"), encoded(*args))[1]
pids = [os.fork() for _ in range(1)]
build.build(config_file.load(Path({str(tmp_path / "run.yaml")!r}), [], RunConfig))
if pids[0] == 0:
    os._exit(0)
assert os.waitpid(pids[0], 0)[1] == 0
"""
    exit_code, output = child(code)
    assert exit_code == 0, output
    assert output.count("encoding") == 2  # the training rows and the held-out ones, each by one of the two


class Letters:
    """A tokenizer that makes a token of each letter."""

    eos_token_id = 0


class ByLetters:
    """An objective whose examples are texts, cut at the longest length."""

    section, labels = SimpleNamespace(type="classification"), None

    def encode(self, rows, tokenizer, max_length, first=0):
        ids = [np.ones(min(len(row["text"]), max_length), np.int32) for row in rows]
        return Encoded(Example(each, each) for each in ids)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        # By hand: 10 + 10 + 30 tokens, of which 10 are lost.
        ([10, 10, 30], "cut: 1 examples of 3 training rows are longer than batch.max_length 20: 20.0% of all tokens"),
        ([20, 20], None),
        ([20] * 98 + [21], None),  # 1 of 1,981 tokens
        ([30] * 1001, "cut: 1,000 examples of the first 1,000 training rows are longer"),
    ],
)
def test_what_is_cut_is_told_where_it_is_more_than_a_hundredth(own_cache, lengths, said):
    rows = KeptRows([{"text": "a" * length} for length in lengths])
    told = audit.tell_cut(ByLetters(), rows, Letters(), 20, {})
    assert [said in line for line in told] == ([True] if said else [])


def test_a_run_says_rows_where_rows_are_and_what_is_cut_of_chats(make_config, own_cache, write_rows, tmp_path, capsys):
    chat = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "so " * 300}]
    silent = [{"role": "user", "content": "Say " * 300}, {"role": "assistant", "content": "so"}]
    train = write_rows(tmp_path / "t.jsonl", [{"messages": chat}] * 5 + [{"messages": silent}] * 2)
    held_out = write_rows(tmp_path / "h.jsonl", [{"messages": chat}])
    data = {"type": "files", "train": str(train), "validation": str(held_out), "leaks": "off"}
    build.build(make_config("sft", "lora", data=data))
    said = capsys.readouterr().err
    assert "7 training and 1 held-out rows; training on 5 examples in 5 rows of a batch" in said
    assert "cut: 7 examples of 7 training rows are longer than batch.max_length" in said
