"""One label, several or a number for a text or a pair of texts."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

from trainer.config import Classification, FileData
from trainer.objectives import OBJECTIVES
from trainer.packing import Example
from trainer.sources import DataError, read_rows

COLUMNS = FileData(type="files", train="data.jsonl")
ROWS = [
    {"text": "a list of lines", "label": "noun"},
    {"text": "returns", "label": "verb"},
    {"text": "", "label": "noun"},
]
MULTI = [
    {"text": "a list of lines", "label": ["short", "noun"]},
    {"text": "returns", "label": "verb; short"},
    {"text": "the quick brown fox", "label": []},
    {"text": "lunch", "label": None},
]
NUMBERS = [{"text": "a list of lines", "label": 4}, {"text": "returns", "label": -1.5}, {"text": "fox", "label": "2e1"}]
OF_PROBLEM = {"single_label": ROWS, "multi_label": MULTI, "regression": NUMBERS}


def build(rows, data=COLUMNS, **settings):
    return OBJECTIVES["classification"](Classification(type="classification", **settings), data, rows)


@pytest.fixture
def objective():
    return build(ROWS)


@pytest.fixture
def classifier(base_model, tokenizer):
    """Return a function that makes a model as a run does: its config holds the labels and the problem."""
    from trainer.config import PretrainedModel
    from trainer.models import build_model

    def make(objective):
        torch.manual_seed(0)
        section = PretrainedModel(type="pretrained", path=base_model)
        wanted = {"problem_type": objective.problem_type}
        return build_model(section, tokenizer, objective.head, objective.labels, **wanted).eval()

    return make


def batch_of(objective, rows, tokenizer):
    examples = objective.encode(rows, tokenizer, 64)
    return objective.collate([[each] for each in examples], tokenizer.pad_token_id, [0] * len(examples))


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_sorted_and_numbers_become_text():
    rows = [{"text": "a", "label": 10}, {"text": "b", "label": 9}, {"text": "c", "label": 10}]
    assert build(rows).labels == ["10", "9"]


def test_labels_that_are_listed_keep_their_order_and_may_occur_nowhere():
    objective = build(ROWS, labels=["verb", "noun", "other"])
    assert objective.labels == ["verb", "noun", "other"]
    assert objective.problem.targets(ROWS[0], 0).tolist() == [1]


def test_examples_are_the_tokens_and_the_number_of_the_label(objective, tokenizer):
    examples = objective.encode(ROWS, tokenizer, 4)
    assert objective.labels == ["noun", "verb"]
    assert [example.targets.tolist() for example in examples] == [[0], [1], [0]]
    assert examples[0].input_ids.tolist() == tokenizer("a list of lines")["input_ids"][:4]
    assert examples[2].input_ids.tolist() == [tokenizer.eos_token_id]


def test_several_labels_are_a_list_or_a_text_with_separators_and_may_be_none(tokenizer):
    objective = build(MULTI, problem="multi_label")
    assert objective.labels == ["noun", "short", "verb"]
    assert [example.targets.tolist() for example in objective.encode(MULTI, tokenizer, 8)] == [
        [1, 1, 0],
        [0, 1, 1],
        [0, 0, 0],
        [0, 0, 0],
    ]
    commas = FileData(type="files", train="a.csv", label_separator=",")
    assert build([{"text": "a", "label": "x, y,"}], commas, problem="multi_label").labels == ["x", "y"]


def test_numbers_may_be_written_as_text(tokenizer):
    objective = build(NUMBERS, problem="regression")
    assert [example.targets.tolist() for example in objective.encode(NUMBERS, tokenizer, 8)] == [[4], [-1.5], [20]]
    assert objective.labels == ["label"]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_held_out_label_that_training_never_saw_is_refused(objective, tokenizer, tmp_path, write_rows):
    [row] = read_rows(write_rows(tmp_path / "a.jsonl", [{"text": "x", "label": "article"}]))
    with pytest.raises(
        DataError, match=rf"data\.label: {row.place}: 'article' is in no training row; known: noun, verb"
    ):
        objective.encode([row], tokenizer, 64)


@pytest.mark.parametrize("label", ["", ["noun"], {"a": 1}, 1.5, float("nan")])
def test_a_label_that_names_no_class_is_refused(label):
    with pytest.raises(DataError, match=r"data\.label: row 3: .* found; expected a name or a whole number"):
        build([*ROWS[:2], {"text": "x", "label": label}])


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (ROWS[:1], {}, "data.label: every training row has the label 'noun'; at least two are needed"),
        ([{"text": "a"}], {}, "data.label: row 1 has no 'label'; it has: text"),
        ([{"text": "a", "label": ["x"]}], {}, "data.label: row 1: ['x'] found; expected a name or a whole number; "
         "for lists: objective.problem multi_label"),
        ([{"text": "a", "label": 0.5}], {}, "0.5 found; expected a name or a whole number; for these: "
         "objective.problem regression"),
        ([*ROWS, {"text": "a", "label": 3}], {}, "data.label: row 4: the number 3 found, but row 1 has the name "
         "'noun'; expected one kind: mend the rows"),
        (ROWS, {"labels": ["noun", "other"]}, "data.label: row 2: 'verb' is not in objective.labels; known: "
         "noun, other"),
        (ROWS, {"class_weights": {"nuon": 2}}, "objective.class_weights: 'nuon' is no label of the training rows; "
         "known: noun, verb"),
        (ROWS, {"class_weights": "balanced", "labels": ["noun", "verb", "other"]}, "objective.class_weights: balanced "
         "found, but no training row has the label 'other'; give weights by name, or remove the label"),
        ([{"text": "a"}], {"problem": "multi_label"}, "data.label: row 1 has no 'label'; it has: text"),
        ([{"text": "a", "label": {"x": 1}}], {"problem": "multi_label"}, "data.label: row 1: {'x': 1} found; expected "
         "a list of names, or a text with ';' between"),
        ([{"text": "a", "label": ["x", float("nan")]}], {"problem": "multi_label"}, "['x', nan] found; expected a "),
        ([{"text": "a", "label": []}], {"problem": "multi_label"}, "data.label: no training row has a label"),
        ([{"text": "a", "label": "good"}], {"problem": "regression"}, "data.label: row 1: 'good' found; expected a "
         "number; for classes: objective.problem single_label"),
        ([{"text": "a", "label": float("nan")}], {"problem": "regression"}, "row 1: nan found; expected a number"),
        ([{"text": "a", "label": "inf"}], {"problem": "regression"}, "row 1: 'inf' found; expected a number"),
        ([{"text": "a", "label": 1e39}], {"problem": "regression"}, "row 1: 1e+39 found; expected a number"),
        # Its square is infinite in fp32, so the loss would be.
        ([{"text": "a", "label": 1e30}], {"problem": "regression"}, "1e+30 found; expected a number up to 1e+18"),
        ([{"text": "a", "label": True}], {"problem": "regression"}, "row 1: True found; expected a number"),
        ([{"text": "a", "label": [1]}], {"problem": "regression"}, "row 1: [1] found; expected a number"),
        ([{"text": "a", "label": ""}], {"problem": "regression"}, "row 1: '' found; expected a number"),
        ([{"text": "a", "label": None}], {"problem": "regression"}, "data.label: row 1 has nothing (null) in 'label'; "
         "mend the row, or set data.skip_bad_rows=true"),
        # As a csv file from pandas or json has it: the brackets and quotes would be parts of the names.
        ([{"text": "a", "label": "['x', 'y']"}], {"problem": "multi_label"}, "found, a list written as text; expected "
         "names with ';' between, or a list in .jsonl"),
        # What nobody means to be two classes, and an eye takes for one.
        ([{"text": "a", "label": label} for label in ("pos", "neg", "pos ")], {}, "data.label: 'pos' and 'pos ' look "
         "the same, but for white space or the encoding of letters; spell them alike, or name every label"),
        ([{"text": "a", "label": label} for label in ("caf\u00e9", "cafe\u0301", "bar")], {},
         "data.label: 'cafe\\u0301' and 'caf\\xe9' look the same"),
        ([{"text": "a", "label": ["x", " x"]}], {"problem": "multi_label"}, "data.label: ' x' and 'x' look the same"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_the_problem_are_refused_in_one_line(tokenizer, rows, settings, said):
    with pytest.raises(DataError) as caught:
        build(rows, **settings).encode(rows, tokenizer, 16)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_look_the_same_are_two_where_they_are_listed(tokenizer):
    rows = [{"text": "a", "label": label} for label in ("pos", "neg", "pos ")]
    objective = build(rows, labels=["pos", "neg", "pos "])
    assert [int(each.targets[0]) for each in objective.encode(rows, tokenizer, 16)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"problem": "regression", "class_weights": "balanced"}, "class_weights does not fit problem regression"),
        ({"problem": "regression", "labels": ["a", "b"]}, "labels does not fit problem regression"),
        ({"labels": ["a"]}, "labels: 1 found: name at least 2"),
        ({"labels": ["a", "b", "a"]}, "labels: 'a' is named twice"),
        ({"class_weights": {"a": 0}}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValidationError) as caught:
        Classification(type="classification", **settings)
    assert said in str(caught.value)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_loss_equals_transformers_own_and_padding_changes_no_logit(objective, tokenizer, classifier, strategy):
    from trainer.config import Full, Lora
    from trainer.strategies import STRATEGIES

    model = classifier(objective)
    model = STRATEGIES[strategy](model, {"full": Full, "lora": Lora}[strategy](type=strategy)).eval()
    objective.try_out(model, 64)
    examples = objective.encode(ROWS, tokenizer, 64)
    batch = batch_of(objective, ROWS, tokenizer)
    alone = [torch.from_numpy(example.input_ids.astype(np.int64))[None] for example in examples]
    with torch.no_grad():
        sums = objective.sums(model, batch)
        single = [model(ids, labels=torch.tensor(e.targets.tolist())) for ids, e in zip(alone, examples, strict=True)]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert sums["loss"].item() == pytest.approx(sum(output.loss.item() for output in single), rel=1e-5)
    torch.testing.assert_close(logits, torch.cat([output.logits for output in single]), rtol=1e-5, atol=1e-6)
    right = sum(output.logits.argmax().item() == e.targets[0] for output, e in zip(single, examples, strict=True))
    assert sums["labels"][0].sum() == right
    assert sums["count"] == sum(objective.count([example], 0) for example in examples) == 3


@pytest.mark.parametrize("problem", OF_PROBLEM)
def test_the_saved_config_makes_transformers_compute_the_same_mean_loss(tokenizer, classifier, tmp_path, problem):
    from transformers import AutoModelForSequenceClassification

    rows = OF_PROBLEM[problem]
    objective = build(rows, problem=problem)
    model = classifier(objective)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.problem_type == objective.problem_type
    assert list(theirs.config.id2label.values()) == objective.labels
    batch = batch_of(objective, rows, tokenizer)
    labels = batch["targets"].float() if problem == "multi_label" else batch["targets"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        sums, mean = objective.sums(model, batch), theirs(**inputs, labels=labels).loss
    assert (sums["loss"] / sums["count"]).item() == pytest.approx(mean.item(), rel=1e-5)
    examples = objective.encode(rows, tokenizer, 64)
    assert sums["count"] == sum(objective.count([example], 0) for example in examples)


def test_balanced_weights_are_scikit_learn_s_and_the_loss_torch_s_weighted_mean(tokenizer, classifier):
    rows = [{"text": f"lines {i}", "label": label} for i, label in enumerate("aaaabbc")]
    objective = build(rows, class_weights="balanced")
    labels = [row["label"] for row in rows]
    weights = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    assert objective.problem.weights.tolist() == pytest.approx(weights.tolist())
    _check_weighted(objective, rows, torch.tensor(weights, dtype=torch.float32), tokenizer, classifier)


def test_weights_by_name_are_one_for_labels_without(tokenizer, classifier):
    objective = build(ROWS, class_weights={"verb": 5})
    _check_weighted(objective, ROWS, torch.tensor([1.0, 5.0]), tokenizer, classifier)


def _check_weighted(objective, rows, weights, tokenizer, classifier):
    model, batch = classifier(objective), batch_of(objective, rows, tokenizer)
    with torch.no_grad():
        sums = objective.sums(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["targets"], weights, reduction="mean")
    assert (sums["loss"] / sums["count"]).item() == pytest.approx(expected.item(), rel=1e-5)
    examples = objective.encode(rows, tokenizer, 64)
    assert float(sums["count"]) == pytest.approx(sum(objective.count([example], 0) for example in examples), rel=1e-12)


def test_weights_of_several_labels_are_torch_s_pos_weight(tokenizer, classifier):
    objective = build(MULTI, problem="multi_label", class_weights="balanced")
    weights = torch.tensor([3 / 1, 2 / 2, 3 / 1])  # rows without the label / rows with it
    assert torch.equal(objective.problem.positive_weights, weights)
    model, batch = classifier(objective), batch_of(objective, MULTI, tokenizer)
    with torch.no_grad():
        sums = objective.sums(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    criterion = torch.nn.BCEWithLogitsLoss(pos_weight=weights)
    expected = criterion(logits, batch["targets"].float())
    assert (sums["loss"] / sums["count"]).item() == pytest.approx(expected.item(), rel=1e-5)


# --- pairs -----------------------------------------------------------------------------------------------------------

PAIRS = FileData(type="files", train="data.jsonl", text_pair="other")
PAIR_ROWS = [
    {"text": "the quick brown fox returns", "other": "a list", "label": "yes"},
    {"text": "lunch", "other": "every file that it has read before lunch", "label": "no"},
]


def test_pairs_are_tokenized_as_transformers_does_with_token_types(wordpiece):
    objective = build(PAIR_ROWS, PAIRS)
    examples = objective.encode(PAIR_ROWS, wordpiece, 9)
    texts = [[row[name] for row in PAIR_ROWS] for name in ("text", "other")]
    expected = wordpiece(*texts, truncation=True, max_length=9, padding=True, return_tensors="pt")
    batch = objective.collate([[example] for example in examples], wordpiece.pad_token_id, [0, 0])
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name])
    assert batch["token_type_ids"].sum() > 0


def test_where_the_tokenizer_puts_nothing_between_the_end_token_keeps_a_pair_apart(tokenizer):
    objective = build(PAIR_ROWS, PAIRS)
    first, second = ([tokenizer(row[name])["input_ids"] for row in PAIR_ROWS] for name in ("text", "other"))
    end = tokenizer.eos_token_id
    whole = objective.encode(PAIR_ROWS, tokenizer, 128)
    assert [e.input_ids.tolist() for e in whole] == [[*a, end, *b] for a, b in zip(first, second, strict=True)]
    for length in range(8, 20):
        for example, a, b in zip(objective.encode(PAIR_ROWS, tokenizer, length), first, second, strict=True):
            ids = example.input_ids.tolist()
            assert len(ids) == min(length, len(a) + 1 + len(b))
            at = ids.index(end)
            assert (ids[:at], ids[at + 1 :]) == (a[:at], b[: len(ids) - at - 1])
            cut = [(len(a), at), (len(b), len(ids) - at - 1)]
            assert all(kept == whole or kept >= (length - 1) // 2 for whole, kept in cut), "the longer one is cut"


def test_both_texts_of_a_pair_train_a_tokenizer_and_a_missing_one_is_refused():
    objective = build(PAIR_ROWS, PAIRS)
    assert list(objective.texts(PAIR_ROWS[:1])) == ["the quick brown fox returns", "a list"]
    with pytest.raises(DataError, match=r"data\.text_pair: row 1 has no 'other'; it has: text, label"):
        list(objective.texts(ROWS))


def test_a_second_text_is_refused_where_one_is_read(make_config):
    with pytest.raises(
        ValidationError, match=r"data\.text_pair does not fit objective\.type sft, which reads one text"
    ):
        make_config("sft", "full", data={"text_pair": "other"})
    assert make_config("classification", "full", data={"text_pair": "other"}).data.columns.text_pair == "other"


# --- metrics ---------------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A model whose logits are the embeddings of the first tokens."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = torch.tensor(table, dtype=torch.float32)

    def forward(self, input_ids, attention_mask):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


def evaluated(objective, rows, model, size: int = 7) -> tuple[dict[str, float], dict]:
    totals: dict[str, float] = {}
    for part in itertools.batched(rows, size) if hasattr(itertools, "batched") else _batched(rows, size):
        for name, value in objective.sums(model.eval(), objective.collate(list(part), 0, [0] * len(part))).items():
            totals[name] = totals.get(name, 0) + value.double().numpy()
    return objective.summarize(totals), objective.details(totals)


def _batched(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_metrics_over_batches_are_those_of_scikit_learn_on_all_rows():
    random = np.random.default_rng(0)
    objective = build([{"text": "", "label": label} for label in "abc"])
    gold, logits = random.integers(0, 3, 90), random.normal(size=(90, 3))
    rows = [[Example(np.array([i]), np.array([label]))] for i, label in enumerate(gold)]
    found, details = evaluated(objective, rows, Fixed(logits))
    answers = logits.argmax(-1)
    probabilities = torch.softmax(torch.tensor(logits), -1).numpy()
    assert found == pytest.approx(
        {
            "eval_loss": metrics.log_loss(gold, probabilities),
            "accuracy": metrics.accuracy_score(gold, answers),
            "macro_f1": metrics.f1_score(gold, answers, average="macro"),
            "roc_auc": metrics.roc_auc_score(gold, probabilities, multi_class="ovr"),
        },
        abs=1e-3,
    )
    assert details["labels"] == ["a", "b", "c"]
    assert details["confusion"] == metrics.confusion_matrix(gold, answers).tolist()
    assert details["f1"] == pytest.approx(metrics.f1_score(gold, answers, average=None).tolist())


def test_metrics_of_several_labels_are_those_of_scikit_learn_on_all_rows():
    random = np.random.default_rng(0)
    objective = build([{"text": "", "label": ["a", "b", "c"]}], problem="multi_label")
    gold, logits = random.integers(0, 2, (90, 3)), random.normal(size=(90, 3))
    rows = [[Example(np.array([i]), labels)] for i, labels in enumerate(gold)]
    found, details = evaluated(objective, rows, Fixed(logits))
    answers = (logits > 0).astype(int)
    assert found == pytest.approx(
        {
            "eval_loss": np.mean(np.logaddexp(0, np.where(gold, -logits, logits))),
            "accuracy": metrics.accuracy_score(gold, answers),
            "macro_f1": metrics.f1_score(gold, answers, average="macro"),
            "micro_f1": metrics.f1_score(gold, answers, average="micro"),
            "roc_auc": metrics.roc_auc_score(gold, logits),
        },
        abs=1e-3,
    )
    assert details["f1"] == pytest.approx(metrics.f1_score(gold, answers, average=None).tolist())


def test_metrics_of_numbers_are_those_of_scikit_learn_on_all_rows():
    random = np.random.default_rng(0)
    objective = build(NUMBERS, problem="regression")
    gold, answers = random.normal(size=90).astype(np.float32), random.normal(size=90).astype(np.float32)
    rows = [[Example(np.array([i]), np.array([number]))] for i, number in enumerate(gold)]
    found, _ = evaluated(objective, rows, Fixed(answers[:, None]))
    mse = metrics.mean_squared_error(gold, answers)
    assert found == pytest.approx(
        {
            "eval_loss": mse,
            "mse": mse,
            "mae": metrics.mean_absolute_error(gold, answers),
            "r2": metrics.r2_score(gold, answers),
            "pearson": np.corrcoef(gold, answers)[0, 1],
        },
        rel=1e-5,
    )


def test_while_learning_only_the_loss_is_summed(objective):
    rows = [[Example(np.array([i]), np.array([0]))] for i in range(3)]
    model = Fixed(np.zeros((3, 2))).train()
    assert objective.sums(model, objective.collate(rows, 0, [0] * 3)).keys() == {"loss", "count"}


def test_many_labels_have_no_confusion_matrix():
    objective = build([{"text": "", "label": f"label {i}"} for i in range(101)])
    found, details = evaluated(objective, [[Example(np.array([0]), np.array([7]))]], Fixed(np.zeros((1, 101))))
    assert "roc_auc" not in found
    assert details.keys() == {"labels", "f1"}


def test_the_baselines_worked_by_hand():
    def rows(*targets):
        return [[Example(np.array([1]), np.array(each))] for each in targets]

    assert build(ROWS).baseline(rows([0], [1], [1]), rows([1], [0], [1], [1]), 300) == {"majority_accuracy": 0.75}
    # Label 0 in 1 of 2 rows: precision 1/2, recall 1, F1 2/3; label 1 in both: 1; label 2 in none, said of 2: 0.
    several = build(MULTI, problem="multi_label")
    assert several.baseline(rows([0, 1, 0], [0, 1, 0], [1, 0, 1]), rows([0, 1, 0], [1, 1, 0]), 300) == pytest.approx(
        {"all_labels_macro_f1": (2 / 3 + 1 + 0) / 3, "majority_accuracy": 0.5}
    )
    numbers = build(NUMBERS, problem="regression")
    assert numbers.baseline(rows([1.0], [3.0]), rows([2.0], [6.0]), 300) == {"mean_mse": 8.0}
