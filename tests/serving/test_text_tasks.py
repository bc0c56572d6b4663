"""Every task over texts: what is served beside transformers' own forward on a padded batch, by other code than ours."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest

from serving.directory import BadInput, read_manifest
from serving.tasks import open_task

LONG = " ".join(["the quick brown fox returns the list of the lines"] * 40)
TEXTS = ["x", "the quick brown fox", "Grüße aus Köln 🙂", "the end <|im_end|>", "", LONG]
PAIRS = ["", "the lines of the file", "Köln", "x", "quick", LONG]
MASKED = ["the <mask> brown fox", "<mask>", "a <mask> of <mask>\n<mask> lines"]
ENCODERS = ("bert", "roberta", "distilbert", "electra")
DECODERS = ("gpt2", "llama")
FAST = {("electra", "labels"), ("gpt2", "number"), ("bert", "label"), ("llama", "pair"), ("roberta", "masks"),
        ("distilbert", "tags"), ("llama", "tags"), ("bert", "vector")}  # fmt: skip


def kinds(asked, *families):
    """Each kind of model for what is asked; one or two of them quick enough for every run."""
    each = [kind for family in families for kind in family]
    return [pytest.param(kind, marks=[] if (kind, asked) in FAST else pytest.mark.slow) for kind in each]


def source(folder, name, texts, pairs=None, max_length=130):
    """Return transformers' (tokenizer, encoded texts, output) for one right-padded batch."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer.pad_token_id = model.config.pad_token_id
    encoded = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
    )
    if pairs is None:
        encoded.pop("token_type_ids", None)
    with torch.no_grad():
        return tokenizer, encoded, model(**encoded)


@pytest.mark.parametrize("kind", kinds("labels", ENCODERS, DECODERS))
def test_several_labels_each_have_a_score_of_their_own(text_model, kind):
    model_dir, onnx_dir = text_model(kind, "labels")
    task, texts = open_task(onnx_dir), [text for text in TEXTS if text]
    _, _, output = source(
        model_dir, "AutoModelForSequenceClassification", texts, max_length=task.manifest["max_length"]
    )
    answers = [task.answer(task.encode(text)) for text in texts]
    names = ["bad", "so-so", "good"]
    for answer, scores in zip(answers, output.logits.sigmoid().tolist(), strict=True):
        assert answer["scores"] == pytest.approx(dict(zip(names, scores, strict=True)), abs=1e-5)
        assert answer["labels"] == [name for name, score in zip(names, scores, strict=True) if score > 0.5]
    assert len({len(answer["labels"]) for answer in answers}) > 1, "the model says the same to all"
    assert [answer["truncated"] for answer in answers] == [text == LONG for text in texts]


@pytest.mark.parametrize("kind", kinds("number", ENCODERS, DECODERS))
def test_a_number_is_answered_as_it_is(text_model, kind):
    model_dir, onnx_dir = text_model(kind, "number")
    task, texts = open_task(onnx_dir), [text for text in TEXTS if text]
    _, _, output = source(
        model_dir, "AutoModelForSequenceClassification", texts, max_length=task.manifest["max_length"]
    )
    answers = [task.answer(task.encode(text)) for text in texts]
    assert [answer["label"] for answer in answers] == ["stars"] * len(texts)
    np.testing.assert_allclose([answer["score"] for answer in answers], output.logits[:, 0], atol=1e-5)
    assert np.ptp([answer["score"] for answer in answers]) > 0.1


@pytest.mark.parametrize("kind", kinds("label", ENCODERS))
def test_a_plain_encoder_judges_pairs_and_single_texts(text_model, kind):
    model_dir, onnx_dir = text_model(kind, "label")
    task = open_task(onnx_dir)
    assert ("token_type_ids" in task.manifest["inputs"]) == (kind in ("bert", "electra"))
    for pairs in (PAIRS, None):
        _, _, output = source(
            model_dir, "AutoModelForSequenceClassification", TEXTS, pairs, task.manifest["max_length"]
        )
        answers = [task.answer(task.encode(*each)) for each in zip(TEXTS, pairs or [None] * 6, strict=True)]
        found = [list(answer["scores"].values()) for answer in answers]
        np.testing.assert_allclose(found, output.logits.softmax(-1), atol=1e-5)
        assert np.ptp(found, axis=0).max() > 0.05


@pytest.mark.parametrize("kind", kinds("pair", DECODERS))
def test_a_decoder_judges_pairs_as_the_trainer_joined_them(text_model, kind):
    """The expected rows come from the trainer's own code."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trainer.objectives.classification import _tokens

    model_dir, onnx_dir = text_model(kind, "pair")
    task = open_task(onnx_dir)
    assert task.manifest["max_length"] == 40
    rows = [ids for ids, _ in _tokens([*zip(TEXTS, PAIRS, strict=True)], AutoTokenizer.from_pretrained(model_dir), 40)]
    questions = [task.encode(*each) for each in zip(TEXTS, PAIRS, strict=True)]
    assert [question.rows[0].ids for question in questions] == [row.tolist() for row in rows]
    assert [question.rows[0].truncated for question in questions] == [False] * 5 + [True]
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    with torch.no_grad():
        expected = [model(torch.tensor(row)[None].long()).logits[0].softmax(-1).tolist() for row in rows]
    np.testing.assert_allclose([[*task.answer(each)["scores"].values()] for each in questions], expected, atol=1e-5)
    with pytest.raises(BadInput, match="text_pair: is missing; this model judges pairs of texts"):
        task.encode("alone")


@pytest.mark.parametrize("kind", kinds("tags", ENCODERS, DECODERS))
def test_every_words_tag_is_that_of_its_first_token_as_the_trainer_has_it(text_model, kind):
    """Words, also of a text of several rows, and which token answers for each: by the trainer's own code."""
    from trainer.config import TokenClassification
    from trainer.objectives.token_classification import TokenClassificationObjective

    model_dir, onnx_dir = text_model(kind, "tags")
    task = open_task(onnx_dir)
    max_length = task.manifest["max_length"]
    texts = [text for text in TEXTS if text]
    tokenizer, _, output = source(model_dir, "AutoModelForTokenClassification", texts[:-1], max_length=max_length)
    tags = ["B-PER", "I-PER", "O"]
    rows = [{"tokens": text.split(), "tags": ["O"] * len(text.split())} for text in texts]
    section = TokenClassification(type="token_classification", labels=tags, tag_all_pieces=False)
    columns = type("Columns", (), {"tokens": "tokens", "tags": "tags", "skip_bad_rows": False})()
    objective = TokenClassificationObjective(section, type("Data", (), {"columns": columns})(), rows)
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        answer = task.answer(task.encode(text))
        assert [word["text"] for word in answer["words"]] == text.split()
        assert all(text[word["start"] : word["end"]] == word["text"] for word in answer["words"])
        examples = objective.encode([row], tokenizer, max_length)
        assert [each.ids for each in task.encode(text).rows] == [each.input_ids.tolist() for each in examples]
        if text == LONG:
            assert len(examples) > 1
            continue
        asked = np.flatnonzero(examples[0].targets >= 0)
        logits = output.logits[index][asked]
        assert [word["tag"] for word in answer["words"]] == [tags[best] for best in logits.argmax(-1)]
        scores = [word["score"] for word in answer["words"]]
        np.testing.assert_allclose(scores, logits.softmax(-1).max(-1).values, atol=1e-5)
    assert task.answer(task.encode(""))["words"] == task.answer(task.encode(" \n"))["words"] == []
    with pytest.raises(BadInput, match="text_pair: found, but this model takes single texts"):
        task.encode("a", "b")


@pytest.mark.parametrize("kind", kinds("masks", ENCODERS))
def test_masks_are_filled_with_the_likeliest_tokens_of_transformers_pipeline(text_model, kind):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, FillMaskPipeline

    model_dir, onnx_dir = text_model(kind, "masks")
    task = open_task(onnx_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, model_input_names=["input_ids", "attention_mask"])
    pipeline = FillMaskPipeline(AutoModelForMaskedLM.from_pretrained(model_dir), tokenizer, top_k=5)
    for text in MASKED:
        expected = pipeline(text)
        expected = expected if text.count("<mask>") > 1 else [expected]
        answer = task.answer(task.encode(text))
        for mine, theirs in zip(answer["masks"], expected, strict=True):
            assert [each["token_id"] for each in mine] == [each["token"] for each in theirs]
            assert [each["token"].strip() for each in mine] == [each["token_str"].strip() for each in theirs]
            assert [each["score"] for each in mine] == pytest.approx([each["score"] for each in theirs], abs=1e-5)
        if len(expected) == 1:
            assert answer["text"] == expected[0][0]["sequence"]
    task.top_k = 2
    assert [len(mask) for mask in task.answer(task.encode(MASKED[2]))["masks"]] == [2, 2, 2]
    for text, message in (("no mask", "text: has no <mask>; put <mask> where"), (LONG + "<mask>", "longer than the 1")):
        with pytest.raises(BadInput, match=message):
            task.encode(text)


def test_the_head_of_a_masked_model_sees_no_more_than_the_places_that_are_asked(text_model):
    """The vocabulary's matrix is the largest of a small model: its product has as many rows as `keep` has places."""
    import onnx

    graph = onnx.load(text_model("roberta", "masks")[1] / "model.onnx").graph
    [output] = graph.output
    assert [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] == ["kept", 320]
    ops = [node.op_type for node in graph.node]
    assert "Gather" in ops[-12:], "the places are taken before the head"


@pytest.mark.parametrize("kind", kinds("vector", ENCODERS))
def test_a_vector_is_the_mean_over_its_tokens_of_length_1(text_model, kind):
    model_dir, onnx_dir = text_model(kind, "vector")
    task = open_task(onnx_dir)
    _, encoded, output = source(model_dir, "AutoModel", TEXTS, max_length=task.manifest["max_length"])
    hidden, mask = output.last_hidden_state.numpy(), encoded["attention_mask"].numpy()
    means = np.stack([row[seen == 1].mean(0) for row, seen in zip(hidden, mask, strict=True)])
    found = [task.answer(task.encode(text))["embedding"] for text in TEXTS]
    np.testing.assert_allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)


def test_a_vector_may_be_the_first_tokens_and_of_any_length(save_text_model, tmp_path):
    from serving.export import export_model

    folder = save_text_model(tmp_path / "model", "distilbert", "vector")
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (folder / "modules.json").write_text(json.dumps(json.loads((folder / "modules.json").read_text())[:2]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    export_model(folder, tmp_path / "onnx")
    task = open_task(tmp_path / "onnx")
    assert task.manifest["max_length"] == 24
    _, _, output = source(folder, "AutoModel", TEXTS, max_length=24)
    found = [task.answer(task.encode(text))["embedding"] for text in TEXTS]
    np.testing.assert_allclose(found, output.last_hidden_state[:, 0], atol=1e-5)


@pytest.mark.parametrize("says", [{"pooling_mode_lasttoken": True}, {"pooling_mode": "lasttoken"}])
def test_a_decoder_that_was_made_to_embed_answers_with_its_last_token(save_model, tmp_path, pool, says):
    """Its config keeps the language model's name; sentence-transformers' files beside it say what became of it."""
    from serving.export import export_model

    folder = save_model(tmp_path / "model", "llama")
    pool(folder, says)
    export_model(folder, tmp_path / "onnx")
    task, texts = open_task(tmp_path / "onnx"), [text for text in TEXTS if text]
    assert (task.manifest["task"], task.manifest["pooling"]) == ("embedding", "lasttoken")
    _, encoded, output = source(folder, "AutoModel", texts, max_length=task.manifest["max_length"])
    last = [row[seen == 1][-1] for row, seen in zip(output.last_hidden_state, encoded["attention_mask"], strict=True)]
    found = [task.answer(task.encode(text))["embedding"] for text in texts]
    np.testing.assert_allclose(found, [vector / vector.norm() for vector in last], atol=1e-6)


def test_spaces_around_a_text_are_no_part_of_its_vector(text_model):
    """As of sentence-transformers, which strips every text; this tokenizer has tokens for them."""
    task = open_task(text_model("bert", "vector")[1])
    bare, spaced = (task.answer(task.encode(text))["embedding"] for text in ("the fox", " \n the fox\t"))
    assert task.text.encode("the fox") != task.text.encode(" the fox")
    assert bare == spaced


MINILM = Path(__file__).parents[2] / "models" / "all-MiniLM-L6-v2"


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.is_dir(), reason="no models/all-MiniLM-L6-v2 (make models)")
def test_the_vectors_of_a_real_encoder_are_those_of_transformers(tmp_path):
    from serving.export import export_model

    assert export_model(MINILM, tmp_path / "onnx")["passed"]
    task = open_task(tmp_path / "onnx")
    assert (task.manifest["max_length"], task.manifest["pooling"], task.manifest["normalize"]) == (256, "mean", True)
    texts = ["A man eats bread.", "Someone is eating food.", "The stock market fell.", LONG]
    _, encoded, output = source(MINILM, "AutoModel", texts, max_length=256)
    mask = encoded["attention_mask"][..., None]
    means = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    found = np.array([task.answer(task.encode(text))["embedding"] for text in texts])
    np.testing.assert_allclose(found, means / means.norm(dim=1, keepdim=True), atol=1e-6)
    assert found[0] @ found[1] > 0.5 > 0.1 > found[0] @ found[2]


def test_the_manifest_says_what_a_server_must_know_of_each_task(text_model):
    bert, masks = (read_manifest(text_model(*each)[1], "onnx") for each in (("bert", "label"), ("roberta", "masks")))
    expected = {"problem_type": "single_label_classification", "text_pair": "either", "pair_separator_id": None}
    assert {key: bert[key] for key in expected} == expected
    assert bert["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert (masks["task"], masks["mask_token"], masks["labels"]) == ("masked_lm", "<mask>", None)
    assert masks["inputs"] == ["input_ids", "attention_mask", "keep"]
    vectors = read_manifest(text_model("bert", "vector")[1], "onnx")
    assert (vectors["pooling"], vectors["normalize"], vectors["outputs"]) == ("mean", True, ["embeddings"])


def test_entities_are_the_spans_that_the_trainer_counts():
    from random import Random

    from serving.tasks import entities as served
    from trainer import entities as trained

    random, marks = Random(3), ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC"))]
    for _ in range(500):
        tags = random.choices(marks, k=random.randint(0, 9))
        assert [*served.spans(tags)] == [*trained.spans(tags)], tags
    for labels in (marks, ["O"], ["O", "NOUN"], ["B-PER"], ["O", "B-"]):
        assert served.are_entity_tags(labels) == trained.are_entity_tags(labels)


def test_an_entity_has_its_place_in_the_text_and_the_score_of_its_least_sure_word(text_model):
    from serving.tasks import Question, Row

    task = open_task(text_model("distilbert", "tags")[1])
    question = Question("Ada  Lovelace wrote", [Row([5, 6, 7], False, offsets=[(0, 3), (4, 13), (13, 19)])])
    logits = np.log(np.array([[0.9, 0.05, 0.05], [0.1, 0.7, 0.2], [0.1, 0.1, 0.8]]))
    [entity] = task.answer_of(question, [logits])["entities"]
    expected = {"type": "PER", "text": "Ada  Lovelace", "start": 0, "end": 13}
    assert entity == {**expected, "score": pytest.approx(0.7)}
    assert math.isclose(task.answer_of(question, [logits])["words"][2]["score"], 0.8)


@pytest.mark.parametrize(
    ("kind", "asked", "named"),
    [
        ("distilbert", "tags", "its task is token_classification, which has no endpoint"),
        (
            "electra",
            "labels",
            r"its task is classification \(multi_label_classification of texts\), which has no endpoint",
        ),
        (
            "llama",
            "pair",
            r"its task is classification \(single_label_classification of pairs\), which has no endpoint",
        ),
    ],
)
def test_a_server_says_plainly_what_it_cannot_answer(text_model, trivet, kind, asked, named):
    import re

    folder = text_model(kind, asked)[1]
    code, _, err = trivet("serve", folder, "--port", "0")
    assert code == 2
    assert re.search(f"{named}; served are .*; use: trivet predict {folder}\n", err)


@pytest.mark.parametrize(
    ("kind", "asked", "options"),
    [
        ("llama", "pair", '--text "..." --text-pair "..."'),
        ("roberta", "masks", '--text "... <mask> ..."'),
        ("bert", "vector", '--text "..."'),
    ],
)
def test_the_command_that_is_named_after_an_export_answers_as_it_is_printed(text_model, trivet, kind, asked, options):
    from launch.export import _what_next

    _, onnx_dir = text_model(kind, asked)
    [record] = json.loads((onnx_dir / "verification.json").read_text())["records"]
    [line] = _what_next(onnx_dir, record)
    assert line == f"next: trivet predict {onnx_dir} {options}"
    code, out, err = trivet(*shlex.split(line.removeprefix("next: trivet ")))
    assert (code, err) == (0, "")
    json.loads(out)
