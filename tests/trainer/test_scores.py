"""Metrics from sums: what scikit-learn says of the whole set, however it was cut into batches and ranks."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from trainer import scores

NUM_ROWS, NUM_LABELS = 500, 5


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def answered(random):
    """Logits [N, C] that are often right, and the gold labels [N]: label 3 is never gold, label 4 is rare."""
    gold = random.choice([0, 1, 2, 4], NUM_ROWS, p=[0.5, 0.3, 0.19, 0.01])
    logits = random.normal(size=(NUM_ROWS, NUM_LABELS)) + 1.5 * np.eye(NUM_LABELS)[gold]
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(gold)


def summed(make, *tensors, size: int = 37) -> np.ndarray:
    """Sum what `make` returns over batches, as ranks do: every third batch is another rank's."""
    ranks = [0, 0, 0]
    for i, parts in enumerate(zip(*(tensor.split(size) for tensor in tensors), strict=True)):
        ranks[i % 3] = ranks[i % 3] + make(*parts).double().numpy()
    return ranks[0] + ranks[1] + ranks[2]


def test_macro_f1_and_f1_by_label_are_scikit_learn_s(answered):
    logits, gold = answered
    predicted = logits.argmax(-1)
    counts = summed(lambda p, g: scores.label_counts(p, g, NUM_LABELS), predicted, gold)
    for average in ("macro", "micro", "weighted"):
        ours = scores.precision_recall_f1(counts, average)
        expected = metrics.precision_recall_fscore_support(gold, predicted, average=average, zero_division=0)
        assert ours == pytest.approx(expected[:3])
    by_label = metrics.f1_score(gold, predicted, labels=range(NUM_LABELS), average=None, zero_division=0)
    assert scores.precision_recall_f1(counts, None)[2] == pytest.approx(by_label)


def test_a_label_that_is_neither_gold_nor_predicted_takes_no_part_in_the_mean(answered):
    logits, gold = answered
    predicted = logits.argmax(-1)
    counts = scores.label_counts(predicted, gold, NUM_LABELS + 3).numpy()
    assert scores.precision_recall_f1(counts, "macro")[2] == metrics.f1_score(gold, predicted, average="macro")
    assert scores.precision_recall_f1(counts, None)[2][NUM_LABELS:].tolist() == [0, 0, 0]


def test_log_odds_keep_apart_what_is_nearly_certain():
    found = scores.log_odds(torch.tensor([[50.0, 0.0, 0.0], [0.5, 0.5, 0.5], [90.0, 30.0, -5.0]]))
    expected = [[50 - np.log(2), -50, -50], [-np.log(2)] * 3, [60, -60, -95]]
    assert found.numpy() == pytest.approx(np.array(expected))


def test_f1_of_nothing_at_all_is_zero():
    nothing = np.zeros((3, 4))
    assert list(scores.precision_recall_f1(nothing, "micro")) == [0, 0, 0]
    assert scores.precision_recall_f1(nothing, None)[2].tolist() == [0] * 4


def test_the_confusion_matrix_is_scikit_learn_s(answered):
    logits, gold = answered
    predicted = logits.argmax(-1)
    ours = summed(lambda p, g: scores.confusion(p, g, NUM_LABELS), predicted, gold)
    assert np.array_equal(ours, metrics.confusion_matrix(gold, predicted, labels=range(NUM_LABELS)))


def histogram_of(logits: torch.Tensor, gold: torch.Tensor, num_labels: int) -> np.ndarray:
    return summed(
        lambda z, g: scores.score_histogram(scores.log_odds(z), torch.nn.functional.one_hot(g, num_labels)),
        logits,
        gold,
    )


def share_of_ties(histogram: np.ndarray) -> float:
    """The largest error that bins can make: half of the pairs, of a row with and one without a label, in one bin."""
    pairs = histogram[:, 0].sum(-1) * histogram[:, 1].sum(-1)
    together = (histogram[:, 0] * histogram[:, 1]).sum(-1)
    return max(0.5 * t / p for t, p in zip(together, pairs, strict=True) if p)


def test_roc_auc_of_one_label_against_the_rest_is_scikit_learn_s_within_the_stated_error(answered):
    logits, gold = answered
    histogram = histogram_of(logits, gold, NUM_LABELS)
    probabilities = torch.softmax(logits, -1).numpy()
    present = sorted(set(gold.tolist()))
    expected = np.mean([metrics.roc_auc_score(gold == label, probabilities[:, label]) for label in present])
    error = abs(scores.roc_auc(histogram) - expected)
    assert error <= share_of_ties(histogram) < 0.001


@pytest.mark.parametrize("spread", [1e-2, 1.0, 30.0])
def test_roc_auc_of_two_labels_is_scikit_learn_s_within_the_stated_error(random, spread):
    gold = torch.tensor(random.integers(0, 2, NUM_ROWS))
    logits = torch.tensor(random.normal(size=(NUM_ROWS, 2)) * spread) + 0.3 * spread * torch.eye(2)[gold]
    histogram = histogram_of(logits, gold, 2)
    expected = metrics.roc_auc_score(gold, (logits[:, 1] - logits[:, 0]).numpy())
    assert abs(scores.roc_auc(histogram) - expected) <= share_of_ties(histogram) + 1e-12
    assert scores.roc_auc(histogram) == pytest.approx(
        expected, abs=0.02 if spread < 1 else 0.001 if spread < 10 else 0.1
    )


def test_roc_auc_of_several_labels_a_row_is_scikit_learn_s(random):
    gold = torch.tensor(random.integers(0, 2, (NUM_ROWS, 3)))
    logits = torch.tensor(random.normal(size=(NUM_ROWS, 3))) + gold
    histogram = summed(scores.score_histogram, logits, gold)
    expected = metrics.roc_auc_score(gold, logits, average="macro")
    assert abs(scores.roc_auc(histogram) - expected) <= share_of_ties(histogram) < 0.001


def test_there_is_no_roc_auc_where_every_row_has_one_label():
    logits, gold = torch.randn(6, 2), torch.zeros(6, dtype=torch.long)
    assert scores.roc_auc(histogram_of(logits, gold, 2)) is None


def test_logits_that_are_not_finite_are_no_error_here():
    logits = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [-1e30, 1e30]])
    assert scores.score_histogram(scores.log_odds(logits), torch.tensor([[0, 1]] * 3)).sum() == 6


def test_regression_metrics_are_scikit_learn_s_and_numpy_s(random):
    gold = torch.tensor(random.normal(2000, 3, NUM_ROWS), dtype=torch.float32)
    predicted = gold + torch.tensor(random.normal(0.5, 2, NUM_ROWS), dtype=torch.float32)
    sums = summed(scores.moments, predicted, gold)
    squared = ((predicted - gold).double() ** 2).sum().item()
    found = scores.regression(sums, squared, NUM_ROWS)
    assert found == pytest.approx(
        {
            "mse": metrics.mean_squared_error(gold, predicted),
            "mae": metrics.mean_absolute_error(gold, predicted),
            "r2": metrics.r2_score(gold, predicted),
            "pearson": np.corrcoef(gold, predicted)[0, 1],
        },
        rel=1e-4,
    )


@pytest.mark.parametrize(("predicted", "r2"), [([3.0, 3.0], 1.0), ([3.0, 4.0], 0.0)])
def test_of_equal_gold_numbers_r2_is_scikit_learn_s_and_there_is_no_correlation(predicted, r2):
    gold, answers = torch.tensor([3.0, 3.0]), torch.tensor(predicted)
    assert metrics.r2_score(gold, answers) == r2
    found = scores.regression(scores.moments(answers, gold).numpy(), float(((answers - gold) ** 2).sum()), 2)
    assert found["r2"] == r2
    assert "pearson" not in found


def test_answers_that_are_all_equal_have_no_correlation():
    gold, answers = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.1])
    assert "pearson" not in scores.regression(scores.moments(answers, gold).numpy(), 1.0, 2)
