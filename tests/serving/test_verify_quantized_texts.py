"""The proof of quantised models over texts: accuracy as transformers and the served answers have it, and refusals."""

import json
import shutil
from random import Random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from serving import verify_quantized
from serving.export import ExportError, HeldOutRows, Options, VerificationFailed, export_model
from serving.tasks import Classifier, Row, open_task

WORDS = "the quick brown fox returns list of lines in file def value import self class 12 7".split()  # noqa: SIM905
LABELS = ["bad", "so-so", "good"]


def some_rows(count: int = 150, **more) -> HeldOutRows:
    random = Random(3)
    texts = [" ".join(random.choices(WORDS, k=random.randint(1, 12))) for _ in range(count)]
    return HeldOutRows([{"text": text, **{name: of(text) for name, of in more.items()}} for text in texts], "words")


@pytest.fixture(scope="module")
def quantized(save_classifier, source_logits, tmp_path_factory):
    """A classifier in int8, measured on texts of which it labels four in five right; model and rows are beside it."""
    folder = tmp_path_factory.mktemp("quantized")
    source = save_classifier(folder / "model", "bert", hidden_size=64, intermediate_size=160)
    texts = [row["text"] for row in some_rows().rows]
    says = [int(np.argmax(logits)) for logits in source_logits(source, texts, 130)]
    labels = [LABELS[(place + (number % 5 == 0)) % 3] for number, place in enumerate(says)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (folder / "rows.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("serving.quality.ACCURACY_DROP_LIMIT", 0.2)  # no weights were trained: all is nearly a tie
        export_model(source, folder / "onnx", Options(quantization="int8"), held_out=HeldOutRows(rows, "words"))
    return folder / "onnx"


def test_accuracy_is_that_of_transformers_and_of_the_answers_that_are_served(quantized, source_logits):
    rows = json.loads((quantized.parent / "rows.json").read_text())
    texts, right = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    task = open_task(quantized)
    served = np.array([task.answer(task.encode(text))["label"] for text in texts])
    logits = source_logits(quantized.parent / "model", texts, task.manifest["max_length"])
    theirs = np.array([LABELS[int(np.argmax(each))] for each in logits])
    [record] = json.loads((quantized / "verification.json").read_text())["records"]
    quality = record["checks"]["quality"]
    assert quality["accuracy"] == pytest.approx((served == right).mean())
    assert quality["source_accuracy"] == pytest.approx((theirs == right).mean()) == 0.8
    assert quality["same"] == pytest.approx((served == theirs).mean())
    assert quality["rows"] == 150
    checks = ["before_quantisation", "manifest", "text", "rows", "quality", "alone_and_in_a_batch"]
    assert list(record["checks"]) == checks
    assert record["checks"]["before_quantisation"]["checks"]["answers"]["passed"]


def test_tokens_that_are_taken_for_their_neighbours_show_in_the_accuracy(
    quantized, tmp_path, change_graph, failed_checks
):
    folder = shutil.copytree(quantized, tmp_path / "onnx")

    def shift_the_embedding(graph):
        import onnx

        [rows] = [each for each in graph.initializer if each.name.endswith("word_embeddings.weight.rows")]
        rows.CopyFrom(onnx.numpy_helper.from_array(np.roll(onnx.numpy_helper.to_array(rows), 1, axis=0), rows.name))

    change_graph(folder, shift_the_embedding)
    assert failed_checks(folder, Classifier) == ["quality"]


def test_accuracy_that_is_kept_by_other_decisions_is_refused(quantized, tmp_path, reseal, failed_checks):
    """One text in eight: decided wrongly by both, but otherwise by the source."""
    folder = shutil.copytree(quantized, tmp_path / "onnx")
    tensors, about = read_reference(folder)
    said, right = tensors["held_out.outputs"], tensors["held_out.labels"]
    for place in np.flatnonzero(said.argmax(-1) != right)[: len(right) // 8]:
        [other] = {0, 1, 2} - {int(right[place]), int(said[place].argmax())}
        said[place, other] = said[place].max() + 1
    save_file(tensors, folder / "reference.safetensors", about)
    reseal(folder)
    assert failed_checks(folder, Classifier) == ["quality"]
    [*_, newest] = json.loads((folder / "verification.json").read_text())["records"]
    quality = newest["checks"]["quality"]
    assert quality["drop"] <= quality["limit"]
    assert "accepted 95%" in quality["found"]


def read_reference(folder):
    """Return the tensors of reference.safetensors, and its metadata."""
    with safe_open(folder / "reference.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1 + number % 200 for number in range(872)], [(8, 1), (8, 51), (8, 101), (8, 151)]),
        ([7, 7, 5], [(3, 5), (2, 7)]),
    ],
)
def test_texts_are_batched_at_lengths_from_all_of_them(monkeypatch, lengths, expected):
    shapes = []

    def ones(session, manifest, rows):
        shapes.append((len(rows), *{len(row.ids) for row in rows}))
        return [np.ones(1)] * len(rows)

    monkeypatch.setattr(verify_quantized, "run_rows", ones)
    check = verify_quantized.check_batch(None, {}, [Row([0] * length, False) for length in lengths])
    assert [shape for shape in shapes if shape[0] > 1] == expected
    assert (check["passed"], check["rows"]) == (True, sum(count for count, _ in expected))


@pytest.mark.parametrize("names", [["bad", "so-so", "good"], ["bad"]])
def test_a_model_of_several_labels_is_not_held_to_one(save_text_model, tmp_path, monkeypatch, names):
    """What it should say of a text is not known from one label, so what is decided otherwise counts."""
    monkeypatch.setattr("serving.quality.ACCURACY_DROP_LIMIT", 0.2)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    source = save_text_model(tmp_path / "model", "bert", "labels", hidden_size=64, intermediate_size=160, **labels)
    rows = some_rows(label=lambda text: "bad")
    record = export_model(source, tmp_path / "onnx", Options(quantization="int8-weights"), held_out=rows)
    assert record["checks"]["quality"]["found"].startswith("decides otherwise than the source in ")


def test_without_labels_what_is_decided_otherwise_counts(save_classifier, tmp_path, monkeypatch):
    source = save_classifier(tmp_path / "model", "bert", hidden_size=64, intermediate_size=160)
    monkeypatch.setattr("serving.quality.ACCURACY_DROP_LIMIT", -0.01)
    with pytest.raises(
        VerificationFailed,
        match=r"it costs too much, so nothing .*: quality: decides otherwise than the source in \d+\.\d\d% of words",
    ):
        export_model(source, tmp_path / "onnx", Options(quantization="int8-weights"), held_out=some_rows())
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(("label", "named"), [("superb", "superb"), (3, "3"), (["good"], r"\['good'\]")])
def test_labels_that_the_model_does_not_know_are_refused_and_not_left_out(save_classifier, tmp_path, label, named):
    source = save_classifier(tmp_path / "model", "bert")
    rows = some_rows(label=lambda text: label if "quick" in text else "good")
    message = rf"--data: words has labels that the model does not know: {named}; accepted: bad, so-so, good, their num"
    with pytest.raises(ExportError, match=message):
        export_model(source, tmp_path / "onnx", Options(quantization="int8"), held_out=rows)


def test_too_few_texts_or_a_model_of_numbers_are_refused(save_classifier, save_text_model, tmp_path):
    source = save_classifier(tmp_path / "model", "bert")
    with pytest.raises(ExportError, match=r"--data: words has 20 texts .*, too few .* accepted: 100 or more"):
        export_model(source, tmp_path / "onnx", Options(quantization="int8"), held_out=some_rows(20))
    source = save_text_model(tmp_path / "number", "bert", "number")
    with pytest.raises(ExportError, match="the cost of quantising a model of numbers cannot be told yet"):
        export_model(source, tmp_path / "onnx", Options(quantization="int8"), held_out=some_rows())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "figure"),
    [("labels", "same"), ("tags", "same"), ("masks", "ratio"), ("vector", "cosine"), ("pair", "same")],
)
def test_every_task_over_texts_is_measured(save_text_model, tmp_path, monkeypatch, asked, figure):
    monkeypatch.setattr("serving.quality.ACCURACY_DROP_LIMIT", 0.2)
    source = save_text_model(tmp_path / "model", "bert", asked, hidden_size=64, intermediate_size=160)
    rows = some_rows(text_pair=lambda text: text[::-1]) if asked == "pair" else some_rows()
    record = export_model(source, tmp_path / "onnx", Options(quantization="int8-weights"), held_out=rows)
    quality = record["checks"]["quality"]
    assert 0.9 < quality[figure] < 1.03
    assert record["passed"]
