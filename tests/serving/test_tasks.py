"""Classifiers: what is answered beside transformers' own forward, and that no text's answer depends on another."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from serving.directory import BadInput
from serving.engine import Engine
from serving.tasks import Classifier, Prediction

LONG = "the quick brown fox returns the list of the lines " * 40
TEXTS = [
    "",
    "x",
    "the quick brown fox",
    "padding inside <|endoftext|> and at the end <|endoftext|><|endoftext|>",
    "<|endoftext|>",
    "the end token <|im_end|>",
    "Grüße aus Köln 🙂",
    LONG,
]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_labels_and_scores_are_those_of_transformers_on_a_padded_batch(classifier, source_logits, kind):
    model_dir, onnx_dir = classifier(kind)
    opened = Classifier.open(onnx_dir)
    logits_NL = np.array(source_logits(model_dir, TEXTS, opened.manifest["max_length"]))
    expected_NL = np.exp(logits_NL) / np.exp(logits_NL).sum(1, keepdims=True)
    answers = opened.classify(TEXTS)
    found_NL = [[answer.scores[label] for label in ("bad", "so-so", "good")] for answer in answers]
    np.testing.assert_allclose(found_NL, expected_NL, atol=1e-5)
    assert [answer.label for answer in answers] == [["bad", "so-so", "good"][i] for i in logits_NL.argmax(1)]
    assert np.ptp(expected_NL, axis=0).max() > 0.05, "the model says the same to all: this compares nothing"
    assert [answer.truncated for answer in answers] == [text == LONG for text in TEXTS]


def test_a_texts_answer_is_the_same_bits_whatever_stands_beside_it(classifier):
    opened = Classifier.open(classifier("bert")[1])
    together = opened.classify(TEXTS)
    assert opened.classify(TEXTS[::-1])[::-1] == together
    assert [opened.classify([text])[0] for text in TEXTS] == together


def test_a_score_is_the_softmax_and_of_equal_labels_the_first_wins():
    prediction = Prediction.of(np.log(np.array([1, 2, 1], np.float32)), ["a", "b", "c"])
    assert (prediction.label, prediction.scores) == ("b", pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25}))
    assert Prediction.of(np.array([1000, 1000], np.float32), ["a", "b"]).scores == {"a": 0.5, "b": 0.5}
    assert Prediction.of(np.array([1000, 1000], np.float32), ["a", "b"]).label == "a"


def test_an_empty_text_is_refused_where_nothing_can_stand_for_it(classifier):
    opened = Classifier.open(classifier("llama")[1])
    opened.manifest["empty_text_ids"] = []
    with pytest.raises(BadInput, match="text: is empty"):
        opened.classify(["fine", ""])


def test_half_a_surrogate_pair_is_bad_input(classifier):
    with pytest.raises(BadInput, match="surrogate"):
        Classifier.open(classifier("llama")[1]).classify(["\ud800"])


def test_each_kind_of_directory_names_the_command_for_the_other(classifier, onnx_dir):
    folder = classifier("llama")[1]
    with pytest.raises(BadInput, match=f"task is causal_lm, not classification; use: trivet generate {onnx_dir}"):
        Classifier.open(onnx_dir)
    with pytest.raises(BadInput, match=f"task is classification, not causal_lm; use: trivet predict {folder}"):
        Engine.open(folder)


def test_an_unproven_or_altered_classifier_is_refused(classifier, tmp_path):
    folder = Path(shutil.copytree(classifier("llama")[1], tmp_path / "onnx"))
    (folder / "verification.json").unlink()
    with pytest.raises(BadInput, match="never verified"):
        Classifier.open(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: altered"):
        Classifier.open(folder)
