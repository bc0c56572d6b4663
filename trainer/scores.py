"""Metrics from sums that add up over batches and ranks, made of them by scikit-learn, so that no logits are kept.

Shape letters: N answers, C labels, B bins.
"""

import math

import numpy as np
import torch

MOST_LABELS_IN_DETAIL = 100  # with more, no confusion matrix and no ROC AUC is made: both grow faster than the labels

# Scores are counted in bins of log-odds s, equally wide in asinh(16 s): 0.0002 wide around 0, 0.4 % of s far from it.
# Two scores in one bin count as equal, so the ROC AUC is wrong by at most half of the pairs of a row with the label and
# a row without that share a bin: under 0.001 for logits that differ by more than a few thousandths.
NUM_BINS, _SCALE, _LARGEST_LOG_ODDS = 4096, 16.0, 64.0


# --- sums, on the device ---------------------------------------------------------------------------------------------


def label_counts(predicted: torch.Tensor, gold: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return how often each label was right, predicted and gold, shape [3, C], of label numbers [N]."""
    parts = (gold[predicted == gold], predicted, gold)
    return torch.stack([torch.bincount(part, minlength=num_labels) for part in parts])


def confusion(predicted: torch.Tensor, gold: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return how often each gold label (row) was answered by each label (column), shape [C, C]."""
    pairs = torch.bincount(gold * num_labels + predicted, minlength=num_labels**2)
    return pairs.view(num_labels, num_labels)


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of softmax probabilities p, shape [N, C], in fp64."""
    logits = logits.double()
    highest, at = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)
    # Of all but the highest the rest holds most of the probability, so nothing is lost by taking p off it.
    log_p = torch.log_softmax(logits, -1)
    return torch.where(logits == highest, highest - others, log_p - torch.log1p(-log_p.exp()))


def score_histogram(scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Return the counts of log-odds [N, C] by bin, for rows without and with the label (0 or 1 in `gold` [N, C]).

    Shape [C, 2, B]. NaN is counted somewhere: the loss tells of it.
    """
    num_labels = scores.shape[1]
    position = torch.asinh(_SCALE * scores.double().nan_to_num()) / math.asinh(_SCALE * _LARGEST_LOG_ODDS)
    bins = ((position + 1) * (NUM_BINS / 2)).floor().clamp(0, NUM_BINS - 1).long()
    cells = (torch.arange(num_labels, device=scores.device) * 2 + gold.long()) * NUM_BINS + bins
    return torch.bincount(cells.flatten(), minlength=num_labels * 2 * NUM_BINS).view(num_labels, 2, NUM_BINS)


def moments(predicted: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Return the sums of p, y, p², y², py and |p - y| of predictions p and gold numbers y, both [N], shape [6]."""
    p, y = predicted.double(), gold.double()
    return torch.stack([each.sum() for each in (p, y, p * p, y * y, p * y, (p - y).abs())])


# --- metrics, from the sums of all ranks -----------------------------------------------------------------------------


def precision_recall_f1(counts: np.ndarray, average: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of label counts [3, C]: of each label, or by scikit-learn's `average`.

    Averages are over the labels that are gold or predicted somewhere. Nothing divided by nothing is 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    right, predicted, gold = counts
    labels, other = np.arange(len(right)), np.full(len(right), len(right))
    occurring = labels[(predicted + gold) > 0]
    if not len(occurring):
        nothing = np.zeros(len(right) if average is None else ())
        return nothing, nothing, nothing
    # What was not right is said of, or as, one more label, which is left out of `labels`.
    precision, recall, f1, _ = precision_recall_fscore_support(
        np.concatenate([labels, labels, other]),
        np.concatenate([labels, other, labels]),
        sample_weight=np.concatenate([right, gold - right, predicted - right]),
        labels=labels if average is None else occurring,
        average=average,
        zero_division=0,
    )
    return precision, recall, f1


def roc_auc(histogram: np.ndarray) -> float | None:
    """Return the ROC AUC of each label against the rest, averaged over labels, of a histogram [C, 2, B].

    Labels that no row has, or every row, are left out; None if all are.
    """
    from sklearn.metrics import roc_auc_score

    bins = np.arange(histogram.shape[-1])
    areas = [
        roc_auc_score(np.repeat([0, 1], len(bins)), np.tile(bins, 2), sample_weight=each.ravel())
        for each in histogram
        if each.any(-1).all()
    ]
    return float(np.mean(areas)) if areas else None


def regression(sums: np.ndarray, squared_error: float, num_rows: float) -> dict[str, float]:
    """Return mse, mae, r2 and Pearson's r of `moments`; r is left out where predictions or gold numbers are all equal.

    r2 is scikit-learn's: where all gold numbers are equal, 1 if every answer is right, else 0.
    """
    p, y, pp, yy, py, absolute = sums / num_rows
    variance_p, variance_y = (max(0.0, square - mean * mean) for square, mean in ((pp, p), (yy, y)))
    mse = squared_error / num_rows
    explained = 1 - mse / variance_y if variance_y > _nothing(yy) else float(mse == 0)
    found = {"mse": mse, "mae": absolute, "r2": explained}
    if variance_p > _nothing(pp) and variance_y > _nothing(yy):
        found["pearson"] = (py - p * y) / np.sqrt(variance_p * variance_y)
    return {name: float(value) for name, value in found.items()}


def _nothing(mean_square: float) -> float:
    """A variance below this is rounding."""
    return 1e-14 * mean_square
