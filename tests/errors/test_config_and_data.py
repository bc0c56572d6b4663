"""What a user sees for a wrong config or wrong data: one line with setting, value, what is accepted and what to do."""

import re

import pytest

SFT = ["objective.type=sft", "model.type=pretrained", "model.path=model", "tokenizer.type=pretrained",
       "strategy.type=full", "data.train=chats.jsonl", "run.name=new"]  # fmt: skip
CLASSIFY = ["objective.type=classification", "data.train=rows.jsonl", "run.name=new"]


def test_an_unknown_key_names_the_nearest(refused):
    message = refused("train", "tiny.yaml", "optim.learning_rate=0.1")
    assert "optim.learning_rate: unknown key; did you mean optim.lr? accepted there: betas," in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.steps=many", "run.steps: 'many' found; accepted: integer"),
        ("run.steps=0", "run.steps: 0 found; accepted: greater than or equal to 1"),
        ("optim.lr=-1", "optim.lr: -1 found; accepted: greater than 0"),
        ("log.tensorboard=sometimes", "log.tensorboard: 'sometimes' found; accepted: boolean"),
        ("precision.type=fp8", "precision.type: 'fp8' found; accepted: 'fp32', 'bf16' or 'fp16'"),
        ("strategy.type=magic", "strategy.type: 'magic' found; accepted: 'scratch', 'full', 'linear_probe', 'partial'"),
        ("batch.micro_rows=3", "batch.micro_rows: 3 does not divide the 2 rows of a process; use a divisor"),
        ("batch.max_length=999", "batch.max_length 999 is longer than model.context_length 128: lower the first"),
    ],
)
def test_a_wrong_type_or_range_names_key_value_and_what_is_accepted(refused, override, said):
    assert said in refused("train", "tiny.yaml", "run.name=new", override)


def test_broken_yaml_names_the_line(refused, work):
    (work / "broken.yaml").write_text("run: {name: a, steps: 1\nmodel: {")
    assert refused("train", "broken.yaml").startswith("broken.yaml: broken YAML: line 2, column ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such config file; check the path"),
        (["train", "."], ".: is a folder; give a config file, such as config.yaml of a run"),
        (["sweep", "absent.yaml"], "absent.yaml: no such config file; check the path"),
        (["train", "tiny.yaml", "run.name=new", "data.train=absent.txt"], "absent.txt"),
        (["report", "absent"], "absent: no such folder"),
        (["export", "absent", "new"], "absent: no such folder"),
        (["verify", "absent"], "absent: no such folder; expected a Trivet onnx directory"),
        (["generate", "absent", "--prompt", "x"], "absent: no such folder; expected a Trivet onnx directory"),
        (["serve", "absent", "--port", "0"], "absent: no such folder; expected a Trivet onnx directory"),
        (["generate", "onnx", "--input", "absent.jsonl"], "--input: absent.jsonl cannot be read"),
        (["serve", "onnx", "--api-key-file", "absent"], "--api-key-file: absent cannot be read"),
    ],
)
def test_a_missing_file_or_folder_is_named(refused, arguments, said):
    assert said in refused(*arguments)


def test_a_base_model_that_is_not_there_is_named(refused):
    message = refused("train", "tiny.yaml", *SFT, "model.path=no/model", "data.train=text.txt")
    assert message.startswith("model.path: no/model: no such folder")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_data_is_named(refused, work, text):
    (work / "empty.txt").write_text(text)
    message = refused("train", "tiny.yaml", "run.name=new", "data.train=empty.txt")
    assert message == "data.train: no rows in empty.txt; at least one is needed"


def test_a_row_without_the_named_field_says_where_and_what_it_has(refused, work, write_rows):
    write_rows(work / "rows.jsonl", [{"text": "a"}] * 9 + [{"body": "b", "title": "c"}])
    held_out = "data.validation=text.txt"
    message = refused("train", "tiny.yaml", "run.name=new", "data.train=rows.jsonl", held_out)
    assert message.startswith("data.text: rows.jsonl, line 10 has no 'text'; it has: body, title")


def test_a_chat_without_an_assistant_turn_is_named(refused, work, write_rows):
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    write_rows(work / "chats.jsonl", [{"messages": chat}] * 9 + [{"messages": chat[:1]}])
    (work / "held_out.jsonl").write_text((work / "chats.jsonl").read_text().splitlines()[0])
    message = refused("train", "tiny.yaml", *SFT, "data.validation=held_out.jsonl")
    assert "chats.jsonl, line 10 has no assistant turn to learn from; remove it" in message


# --- labels that do not fit ------------------------------------------------------------------------------------------


def labelled(labels):
    return [{"text": f"a word and number {i}", "label": label} for i, label in enumerate(labels)]


def test_a_held_out_label_that_no_training_row_has_is_named(refused, work, write_rows):
    write_rows(work / "rows.jsonl", labelled(["noun", "verb"] * 5))
    write_rows(work / "held_out.jsonl", labelled(["noun", "adverb"]))
    message = refused("train", "tiny.yaml", *CLASSIFY, "data.validation=held_out.jsonl")
    assert "held_out.jsonl, line 2: 'adverb' is in no training row; known: noun, verb" in message


def test_one_label_only_is_refused(refused, work, write_rows):
    write_rows(work / "rows.jsonl", labelled(["noun"] * 40))
    message = refused("train", "tiny.yaml", *CLASSIFY)
    assert message.startswith("data.label: every training row has the label 'noun'; at least two are needed")


def test_a_number_with_a_fraction_is_no_class(refused, work, write_rows):
    write_rows(work / "rows.jsonl", labelled([1, 2] * 5 + [0.5]))
    (work / "held_out.jsonl").write_text((work / "rows.jsonl").read_text().splitlines()[0])
    message = refused("train", "tiny.yaml", *CLASSIFY, "data.validation=held_out.jsonl")
    assert message.startswith("data.label: rows.jsonl, line 11: 0.5 found; expected a name or a whole number")


def test_measurements_are_no_classes(refused, work):
    text = "".join(f"a word and number {i},{i + 0.25}\n" for i in range(60))
    (work / "rows.csv").write_text("text,label\n" + text)
    message = refused("train", "tiny.yaml", *CLASSIFY, "data.train=rows.csv")
    assert re.match(
        r"data.label: \d+ different numbers found, such as \d+\.25; expected names or whole numbers", message
    )


def test_half_stars_are_classes(trivet, work):
    text = "".join(f"a word and number {i},{i % 9 / 2 + 0.5}\n" for i in range(60))
    (work / "rows.csv").write_text("text,label\n" + text)
    code, out, err = trivet("train", "tiny.yaml", *CLASSIFY, "data.train=rows.csv", "--dry-run")
    assert code == 0, err
    assert "4 steps of 2 rows" in out


def test_a_classifier_with_other_labels_is_no_base(trivet, refused, work, write_rows):
    write_rows(work / "rows.jsonl", labelled(["noun", "verb", "other"] * 20))
    first = [*CLASSIFY, "run.name=three", "run.steps=1"]
    assert trivet("train", "tiny.yaml", *first)[0] == 0
    write_rows(work / "rows.jsonl", labelled(["good", "bad"] * 20))
    base = ["model.type=pretrained", "model.path=runs/three/model", "tokenizer.type=pretrained", "strategy.type=full"]
    message = refused("train", "tiny.yaml", *CLASSIFY, *base)
    assert message.startswith(
        "model.path: runs/three/model tells noun, other, verb apart, but data.label has bad, good;"
    )
