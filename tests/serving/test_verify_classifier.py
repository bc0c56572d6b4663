"""A classifier's proof: what the directory says, and faults put into it one at a time, each of which must be seen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from serving import verify_classifier
from serving.directory import check_files, read_manifest
from serving.export import VerificationFailed, export_model
from serving.tasks import Classifier
from serving.verify import verify
from serving.verify_classifier import Reference

CHECKS = ["text", "logits_one_by_one", "logits_padded_batch", "labels"]


@pytest.fixture
def spoilt(classifier, tmp_path):
    """Return a function from a kind of classifier to a copy of its ONNX directory that a test may spoil."""
    return lambda kind: Path(shutil.copytree(classifier(kind)[1], tmp_path / "onnx"))


@pytest.fixture
def failures(failed_checks):
    """The function that names the failed checks of a spoilt classifier."""
    return lambda folder: failed_checks(folder, Classifier)


def test_the_directory_says_what_a_server_must_know(classifier):
    model_dir, onnx_dir = classifier("llama")
    manifest = read_manifest(onnx_dir, "onnx")
    check_files(onnx_dir, manifest)
    expected = {
        "task": "classification",
        "architecture": "LlamaForSequenceClassification",
        "dtype": "fp32",
        "labels": ["bad", "so-so", "good"],
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["logits"],
        "context_length": 256,
        "max_length": 256,
        "pad_token_id": 0,
        "empty_text_ids": [2],
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["source"]["path"] == str(model_dir)
    assert "generation_config.json" not in manifest["files"]


def test_a_sound_directory_passes_and_the_reference_holds_ragged_texts(classifier, spoilt):
    reference = Reference.load(classifier("llama")[1])
    lengths = [len(row) for row in reference.rows]
    assert (min(lengths), max(lengths)) == (1, 256)
    assert len(set(lengths)) > 8
    assert reference.texts[0] == ""
    assert [case["is_cut"] for case in reference.cases["cut"]] == [False] * (len(lengths) - 1) + [True]
    assert any(row[-1] == 0 for row in reference.rows), "no text ends in the token that also pads"
    record = verify(spoilt("llama"))
    assert list(record["checks"]) == CHECKS
    for name in CHECKS[1:]:
        assert 0 < record["checks"][name]["max_abs_diff"] < record["checks"][name]["tolerance"] / 50


def test_a_context_counted_from_past_the_padding_is_not_overrun(classifier):
    manifest = read_manifest(classifier("bert")[1], "onnx")
    assert manifest["context_length"] == manifest["max_length"] == 130


@pytest.mark.slow
def test_robertas_context_is_shorter_than_its_table(classifier):
    assert read_manifest(classifier("roberta")[1], "onnx")["context_length"] == 128


def test_a_matrix_that_is_one_per_cent_too_large_is_seen(spoilt, change_graph, failures):
    import onnx

    def scale_one(graph):
        tensor = next(each for each in graph.initializer if sorted(each.dims) == [32, 64])
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name)
        )

    change_graph(folder := spoilt("llama"), scale_one)
    assert failures(folder)[:2] == ["logits_one_by_one", "logits_padded_batch"]


def test_another_pooled_token_is_seen(spoilt, change_graph, failures):
    def pool_the_first(graph):
        [node] = [node for node in graph.node if node.op_type == "ArgMax"]
        node.op_type = "ArgMin"

    change_graph(folder := spoilt("llama"), pool_the_first)
    assert failures(folder) == CHECKS[1:]


def test_another_padding_token_is_seen(spoilt, reseal, failures):
    reseal(folder := spoilt("llama"), pad_token_id=5)
    assert failures(folder) == ["logits_padded_batch"]


def test_an_ignored_attention_mask_is_seen(spoilt, change_graph, failures):
    import onnx

    def see_all(graph):
        for node in graph.node:
            node.input[:] = ["all_seen" if name == "attention_mask" else name for name in node.input]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one_seen"))
        graph.node.insert(0, onnx.helper.make_node("Max", ["attention_mask", "one_seen"], ["all_seen"]))

    change_graph(folder := spoilt("bert"), see_all)
    assert failures(folder) == ["logits_padded_batch"]


def test_swapped_labels_are_seen(spoilt, reseal, failures):
    reseal(folder := spoilt("llama"), labels=["good", "so-so", "bad"])
    assert failures(folder) == ["labels"]
    records = json.loads((folder / "verification.json").read_text())["records"]
    assert "the labels are ['good', 'so-so', 'bad'], not ['bad', 'so-so', 'good']" in records[-1]["reason"]


def test_another_cut_or_stand_in_is_seen(spoilt, reseal, failures):
    reseal(folder := spoilt("llama"), empty_text_ids=[7])
    assert failures(folder) == ["labels"]
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncation_side": "left"}))
    reseal(folder, empty_text_ids=[2])
    assert failures(folder) == ["text", "labels"]


def test_another_tokenizer_is_seen(spoilt, reseal, failures, make_tokenizer):
    make_tokenizer(300, "entirely other words, learned from another text about weather and ships").save_pretrained(
        folder := spoilt("llama")
    )
    reseal(folder)
    assert failures(folder)[0] == "text"


def test_a_weight_that_is_no_number_is_a_failed_proof(spoilt, change_graph, failures):
    import onnx

    def poison(graph):
        tensor = next(each for each in graph.initializer if sorted(each.dims) == [32, 64])
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[3, 3] = np.nan
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    change_graph(folder := spoilt("llama"), poison)
    assert failures(folder) == CHECKS[1:]


def label_check(monkeypatch, onnx_dir: Path, margin: float) -> dict:
    """Return the check of labels where the source's label of one text lies `margin` below another one."""
    reference = Reference.load(onnx_dir)
    row_L = reference.logits_NL[3]
    found, runner_up = np.argsort(row_L)[::-1][:2]
    row_L[found], row_L[runner_up] = row_L[runner_up], row_L[runner_up] + np.float32(margin)
    monkeypatch.setattr(Reference, "tolerance", 1e9)  # labels alone
    return verify_classifier.check_labels(Classifier.open(onnx_dir), reference)


def test_a_wrong_label_is_excused_and_counted_where_the_source_has_a_near_tie(monkeypatch, classifier):
    check = label_check(monkeypatch, classifier("llama")[1], margin=5e-5)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (True, 1, 0)


def test_a_wrong_label_is_not_excused_elsewhere(monkeypatch, classifier):
    check = label_check(monkeypatch, classifier("llama")[1], margin=2e-4)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (False, 0, 1)


@pytest.mark.slow
def test_an_export_that_pools_another_token_publishes_nothing(classifier, tmp_path, monkeypatch):
    from serving.export.classifier import Logits

    def pool_the_first(self, input_ids, attention_mask):
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.model.score(hidden)[:, 0]

    monkeypatch.setattr(Logits, "forward", pool_the_first)
    with pytest.raises(VerificationFailed, match="nothing was published: logits_one_by_one: logits differ by"):
        export_model(classifier("llama")[0], tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
