"""`trivet predict`: rows in, labels out, and one line for what cannot be done."""

import json
import shlex

import numpy as np
import pytest

from serving.tasks import Classifier

TEXTS = ["the quick brown fox", "", "the list of the lines", "x"]


@pytest.fixture(scope="module")
def onnx_dir(tmp_path_factory):
    """A small random classifier, exported."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    from serving.export import export_model

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, initializer_range=0.5,
        id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder / "model")
    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder / "model"
    )
    export_model(folder / "model", folder / "onnx")
    return folder / "onnx"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def test_a_file_of_rows_is_labelled_in_order_with_its_ids(onnx_dir, rows, tmp_path, trivet):
    code, out, err = trivet("predict", onnx_dir, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert (code, out) == (0, ""), err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"row {i}" for i in range(len(TEXTS))]
    expected = Classifier.open(onnx_dir).classify(TEXTS)
    assert [(answer["label"], answer["score"], answer["scores"]) for answer in answers] == [
        (prediction.label, prediction.score, prediction.scores) for prediction in expected
    ]
    code, out, _ = trivet("predict", onnx_dir, "--text", TEXTS[0])
    assert json.loads(out) == {key: value for key, value in answers[0].items() if key != "id"}


def test_a_row_that_the_model_fails_on_has_an_error_and_the_others_their_label(
    onnx_dir, rows, tmp_path, trivet, monkeypatch
):
    from serving.tasks import task

    real = task.run_rows

    def broken(session, manifest, rows):
        return [logits * (np.nan if len(rows[0].ids) == 1 else 1) for logits in real(session, manifest, rows)]

    monkeypatch.setattr(task, "run_rows", broken)
    code, _, err = trivet("predict", onnx_dir, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert code == 1
    assert "error: 2 of 4 rows failed: the model's logits are not finite" in err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text, --input: give exactly one of them"),
        (["--text", "x", "--input", "in.jsonl"], "--text, --input: give exactly one of them"),
        (["--input", "nowhere.jsonl"], "--input: nowhere.jsonl cannot be read"),
        (["--input", "bad.jsonl"], "bad.jsonl, line 2: has no `text`; expected the text to answer about in it"),
        (["--input", "number.jsonl"], "number.jsonl, line 1: `text` is a int; expected the text"),
        (["--input", "list.jsonl"], "list.jsonl, line 1: is a list; expected an object"),
        (["--text", "x", "--provider", "cuda"], "cuda"),
        (["--text", "x", "--text-pair", "y"], "text_pair: found, but this model takes single texts; leave it out"),
        (["--input", "pair.jsonl"], "pair.jsonl, line 1: `text_pair` is a int; expected the text that is judged"),
        (["--input", "bad.jsonl", "--text-pair", "y"], "--text-pair: goes with --text; in a file it is each row's"),
        (["--text", "x", "--top-k", "3"], "--top-k: 3 found, but the task of "),
        (["--text", "x", "--output", "."], "--output: . is a folder"),
        (
            ["--text", "x", "--output", "{onnx_dir}/answers.txt"],
            "onnx, which allows no other files; choose another place",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(onnx_dir, tmp_path, monkeypatch, trivet, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"prompt": "x"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "list.jsonl").write_text("[]\n")
    (tmp_path / "pair.jsonl").write_text('{"text": "x", "text_pair": 5}\n')
    before = sorted(tmp_path.iterdir())
    code, out, err = trivet("predict", onnx_dir, *(each.format(onnx_dir=onnx_dir) for each in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_row_that_cannot_be_encoded_is_named_and_no_output_is_left(onnx_dir, tmp_path, trivet):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    code, _, err = trivet("predict", onnx_dir, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "row 2: text: holds half of a surrogate pair" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_generate_names_predict_for_a_classifier(onnx_dir, trivet):
    code, _, err = trivet("generate", onnx_dir, "--prompt", "x")
    assert (code, err) == (
        2,
        f"error: {onnx_dir}: its task is classification, not causal_lm; use: trivet predict {onnx_dir}\n",
    )


@pytest.mark.parametrize("command", ["predict", "generate"])
def test_the_answers_never_replace_the_rows_they_answer(command, onnx_dir, rows, trivet, tmp_path):
    link = tmp_path / "the same.jsonl"
    link.symlink_to(rows)
    if command == "generate":
        rows.write_text('{"id": "a", "prompt": "x"}\n')
    before = rows.read_bytes()
    for output in (rows, link):
        code, _, err = trivet(command, onnx_dir, "--input", rows, "--output", output)
        assert code == 2
        assert err == f"error: --output: {output} is the file of --input, which would be lost; give another file\n"
    assert rows.read_bytes() == before


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A small random masked model, and its ONNX directory's place."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(3)
    words = ["[PAD]", "[UNK]", "[MASK]", "the", "quick", "brown", "fox", "reads", "lines"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **sizes)
    BertForMaskedLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "model")
    return folder


def test_masks_are_filled_from_export_to_answer_and_serving_them_is_refused(masked, trivet):
    onnx_dir = masked / "words filled in"
    code, _, err = trivet("export", masked / "model", onnx_dir)
    assert code == 0, err
    _, _, command = err.splitlines()[-1].partition("next: trivet ")
    assert command == f"predict '{onnx_dir}' --text \"... [MASK] ...\""
    code, _, err = trivet(*shlex.split(command))
    assert code == 0, err
    code, out, err = trivet("predict", onnx_dir, "--text", "the [MASK] brown [MASK]", "--top-k", "2")
    assert code == 0, err
    answer = json.loads(out)
    assert [len(mask) for mask in answer["masks"]] == [2, 2]
    filled = [mask[0]["token"] for mask in answer["masks"]]
    assert answer["text"] == f"the {filled[0]} brown {filled[1]}"
    code, _, err = trivet("predict", onnx_dir, "--text", "no mask")
    assert (code, err) == (2, "error: row 1: text: has no [MASK]; put [MASK] where a word is wanted\n")
    code, _, err = trivet("serve", onnx_dir, "--port", "0")
    assert (code, "its task is masked_lm, which has no endpoint" in err) == (2, True)
    code, _, err = trivet("generate", onnx_dir, "--prompt", "x")
    assert (code, f"its task is masked_lm, not causal_lm; use: trivet predict '{onnx_dir}'" in err) == (2, True)
