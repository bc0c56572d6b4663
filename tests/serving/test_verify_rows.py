"""The proof of models over texts: what the directory says, and faults put into it one at a time, all to be seen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from serving import verify_rows
from serving.directory import DirectoryError, check_files, read_manifest
from serving.export import VerificationFailed, export_model
from serving.tasks import Classifier, Embedder, MaskFiller, Tagger
from serving.verify import verify
from serving.verify_rows import Reference, compare

CHECKS = ["manifest", "text", "rows", "logits_one_by_one", "logits_padded_batch", "answers"]


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
    lengths = [len(row.ids) for row in reference.rows]
    assert (min(lengths), max(lengths)) == (1, 256)
    assert len(set(lengths)) > 8
    assert reference.questions[0]["text"] == ""
    assert [case["is_cut"] for case in reference.questions] == [False] * (len(lengths) - 1) + [True]
    assert any(row.ids[-1] == 0 for row in reference.rows), "no text ends in the token that also pads"
    record = verify(spoilt("llama"))
    assert list(record["checks"]) == CHECKS
    for name in CHECKS[3:]:
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
    assert failures(folder)[:2] == CHECKS[3:5]


def test_another_pooled_token_is_seen(spoilt, change_graph, failures):
    def pool_the_first(graph):
        [node] = [node for node in graph.node if node.op_type == "ArgMax"]
        node.op_type = "ArgMin"

    change_graph(folder := spoilt("llama"), pool_the_first)
    assert failures(folder) == CHECKS[3:]


def test_another_padding_token_is_seen(spoilt, reseal, failures):
    reseal(folder := spoilt("llama"), pad_token_id=5)
    assert failures(folder) == ["manifest", "logits_padded_batch"]


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
    assert failures(folder) == ["manifest", "answers"]
    records = json.loads((folder / "verification.json").read_text())["records"]
    assert "the labels are ['good', 'so-so', 'bad'], not ['bad', 'so-so', 'good']" in records[-1]["reason"]


def test_another_cut_or_stand_in_is_seen(spoilt, reseal, failures):
    reseal(folder := spoilt("llama"), empty_text_ids=[7])
    assert failures(folder) == ["manifest", "rows", "answers"]
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncation_side": "left"}))
    reseal(folder, empty_text_ids=[2])
    assert failures(folder) == ["rows", "answers"]


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
    assert failures(folder) == CHECKS[3:]


def label_check(onnx_dir: Path, margin: float, dtype: str = "fp32", seen: float = 1e-6) -> dict:
    """Return the check of answers where the source gave one text another label, by `margin`."""
    reference = Reference.load(onnx_dir, dtype)
    case = reference.questions[3]
    case["answer"]["label"] = next(label for label in reference.labels if label != case["answer"]["label"])
    case["margin"] = margin
    return verify_rows.check_answers(Classifier.open(onnx_dir), reference, seen)


def test_a_wrong_label_is_excused_and_counted_where_the_source_has_a_near_tie(classifier):
    check = label_check(classifier("llama")[1], margin=5e-5)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (True, 1, 0)


def test_a_wrong_label_is_not_excused_elsewhere(classifier):
    check = label_check(classifier("llama")[1], margin=2e-4)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (False, 0, 1)
    assert "1 differences, first: 'The library reads the file': label is 'good', not 'bad'" in check["found"]


@pytest.mark.parametrize(("margin", "near_ties"), [(1.9e-3, 1), (2.1e-3, 0)])
def test_in_half_precision_a_near_tie_is_twice_the_difference_seen_and_not_what_is_accepted(
    classifier, margin, near_ties
):
    check = label_check(classifier("llama")[1], margin, "fp16", seen=1e-3)
    assert check["tolerance"] > 1e-2
    assert (check["passed"], check["near_ties"]) == (bool(near_ties), near_ties)


def test_the_margin_is_that_of_the_sources_two_best_logits(classifier, source_logits):
    model_dir, onnx_dir = classifier("llama")
    questions = Reference.load(onnx_dir).questions[:6]
    logits_NL = np.array(source_logits(model_dir, [case["text"] for case in questions], 256))
    second, first = np.sort(logits_NL)[:, -2:].T
    np.testing.assert_allclose([case["margin"] for case in questions], first - second, atol=1e-5)


@pytest.mark.parametrize(
    ("found", "expected", "difference", "place"),
    [
        ({"label": "a", "score": 0.5, "more": 1}, {"label": "a", "score": 0.25}, 0.25, ""),
        ({"words": [{"tag": "O"}, {"tag": "X"}]}, {"words": [{"tag": "O"}, {"tag": "O"}]}, 0.0, "words[1].tag is 'X'"),
        ({"words": [1]}, {"words": [1, 2]}, 0.0, "words is [1], not [1, 2]"),
        ({"label": "a"}, {"labels": ["a"]}, 0.0, "it is {'label': 'a'}"),
        ([1.0, float("nan")], [1.0, 0.5], float("inf"), ""),
    ],
)
def test_answers_are_compared_name_by_name_and_number_by_number(found, expected, difference, place):
    number, where = compare(found, expected)
    assert (number, where.startswith(place), bool(where)) == (difference, True, bool(place))


def spoilt_tags(text_model, tmp_path) -> Path:
    return Path(shutil.copytree(text_model("distilbert", "tags")[1], tmp_path / "onnx"))


def test_swapped_tags_are_seen(text_model, tmp_path, reseal, failed_checks):
    folder = spoilt_tags(text_model, tmp_path)
    reseal(folder, labels=["I-PER", "B-PER", "O"])
    assert failed_checks(folder, Tagger) == ["manifest", "answers"]


def test_a_tagger_whose_tokenizer_cuts_on_the_left_answers_as_its_source(text_model, tmp_path):
    source = Path(shutil.copytree(text_model("distilbert", "tags")[0], tmp_path / "source"))
    config = source / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncation_side": "left", "model_max_length": 24}))
    assert export_model(source, tmp_path / "onnx")["passed"]
    reference = Reference.load(tmp_path / "onnx")
    assert max(len(case["rows"]) for case in reference.questions) > 1, "no text has several rows"


def test_another_mask_token_is_seen(text_model, tmp_path, reseal, failed_checks):
    folder = Path(shutil.copytree(text_model("roberta", "masks")[1], tmp_path / "onnx"))
    reseal(folder, mask_token_id=7)
    assert failed_checks(folder, MaskFiller) == [
        "manifest",
        "rows",
        "logits_one_by_one",
        "logits_padded_batch",
        "answers",
    ]


def test_token_types_that_are_left_at_zero_are_seen(text_model, tmp_path, change_graph, failed_checks):
    import onnx

    def forget_types(graph):
        for node in graph.node:
            node.input[:] = ["no_types" if name == "token_type_ids" else name for name in node.input]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
        graph.node.insert(0, onnx.helper.make_node("Mul", ["token_type_ids", "zero"], ["no_types"]))

    folder = Path(shutil.copytree(text_model("bert", "label")[1], tmp_path / "onnx"))
    change_graph(folder, forget_types)
    assert failed_checks(folder, Classifier) == ["logits_one_by_one", "logits_padded_batch", "answers"]


def test_vectors_that_take_in_the_padding_are_seen(text_model, tmp_path, change_graph, failed_checks):
    import onnx

    def pool_all(graph):
        [cast] = [node for node in graph.node if node.op_type == "Cast" and pools(graph, node)]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one_seen"))
        source = cast.input[0]
        cast.input[0] = "all_seen"
        at = next(place for place, node in enumerate(graph.node) if node == cast)
        graph.node.insert(at, onnx.helper.make_node("Max", [source, "one_seen"], ["all_seen"]))

    def pools(graph, cast):
        users = [node for node in graph.node if cast.output[0] in node.input]
        return {node.op_type for node in users} == {"Mul", "ReduceSum"}

    folder = Path(shutil.copytree(text_model("bert", "vector")[1], tmp_path / "onnx"))
    change_graph(folder, pool_all)
    assert failed_checks(folder, Embedder) == ["logits_padded_batch"]


def test_a_reference_of_an_older_trivet_is_named(spoilt, reseal):
    from safetensors.numpy import save_file

    folder = spoilt("llama")
    save_file({"logits": np.zeros((1, 3), np.float32)}, folder / "reference.safetensors", {"labels": "[]"})
    reseal(folder)
    with pytest.raises(
        DirectoryError, match=r"reference\.safetensors: written by an older Trivet; export the model again"
    ):
        verify(folder)


@pytest.mark.slow
def test_an_export_that_pools_another_token_publishes_nothing(classifier, tmp_path, monkeypatch):
    from serving.export.rows import Rows

    def pool_the_first(self, input_ids, attention_mask):
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.model.score(hidden)[:, 0]

    monkeypatch.setattr(Rows, "forward", pool_the_first)
    with pytest.raises(VerificationFailed, match="nothing was published: logits_one_by_one: logits differ by"):
        export_model(classifier("llama")[0], tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
