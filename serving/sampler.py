"""From logits to a token id. Pure functions of one row, so that a request never feels its neighbours. numpy only."""

import numpy as np

from serving.request import Sampling

_FIRST_CANDIDATES = 256


def greedy(logits_BV: np.ndarray) -> np.ndarray:
    """Return the id of each row's largest logit; the lowest id wins a tie.

    Raises FloatingPointError when a row's largest logit is not a finite number.
    """
    picks_B = np.argmax(logits_BV, axis=-1)
    best_B = np.take_along_axis(logits_BV, picks_B[:, None], axis=-1)
    if not np.isfinite(best_B).all():  # argmax lands on a NaN when there is one
        raise FloatingPointError("the model's logits are not finite")
    return picks_B


def sample(logits_V: np.ndarray, sampling: Sampling, position: int) -> int:
    """Return the next token id for one row of logits.

    With a seed the draw is a pure function of (logits, seed, position), `position` being the index of the token that
    is picked. Temperature is applied first, then top_k, then top_p. Raises FloatingPointError for non-finite logits.
    """
    if sampling.is_greedy:
        return int(greedy(logits_V[None])[0])
    ids, probabilities = _candidates(logits_V, sampling)
    seed = None if sampling.seed is None else [sampling.seed, position]
    threshold = np.random.default_rng(seed).random() * probabilities.sum()
    index = int(np.searchsorted(np.cumsum(probabilities), threshold, side="right"))
    return int(ids[min(index, len(ids) - 1)])


def top2_margin(logits_V: np.ndarray) -> float:
    """Return how far the largest logit lies above the second largest (infinity when there is only one)."""
    if len(logits_V) < 2:
        return float("inf")
    second, first = np.partition(logits_V, -2)[-2:]
    return float(first) - float(second)


def _candidates(logits_V: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that may be picked and their unnormalised probabilities, both in a fixed order."""
    scores_V = logits_V.astype(np.float64)
    highest = scores_V.max()
    if not np.isfinite(highest):
        raise FloatingPointError("the model's logits are not finite")
    # The difference comes before the division: a tiny temperature must end in 0 and -inf, never in inf - inf.
    with np.errstate(over="ignore", under="ignore"):
        weights_V = np.exp((scores_V - highest) / sampling.temperature)
    size = len(weights_V)
    limit = min(sampling.top_k, size) if sampling.top_k else size
    if sampling.top_p < 1:
        return _nucleus(weights_V, limit, sampling.top_p)
    if limit == size:
        return np.arange(size), weights_V
    ids = _largest(weights_V, limit)
    return ids, weights_V[ids]


def _nucleus(weights_V: np.ndarray, limit: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Keep the fewest of the `limit` largest weights that together reach `top_p` of their sum; at least one."""
    if limit < len(weights_V):
        weights_V = np.where(np.isin(np.arange(len(weights_V)), _largest(weights_V, limit)), weights_V, 0.0)
    wanted = top_p * weights_V.sum()
    count = min(_FIRST_CANDIDATES, limit)
    while True:  # sorting a whole vocabulary costs milliseconds; the nucleus is nearly always small
        ids = _largest(weights_V, count)
        kept = weights_V[ids]
        reached = int(np.searchsorted(np.cumsum(kept), wanted)) + 1
        if reached <= count or count == limit:
            return ids[:reached], kept[:reached]
        count = min(count * 8, limit)


def _largest(values_V: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` largest values, largest first; among equals the lowest id wins."""
    size = len(values_V)
    if count < size:
        smallest_kept = np.partition(values_V, size - count)[size - count]
        ids = np.flatnonzero(values_V >= smallest_kept)
    else:
        ids = np.arange(size)
    return ids[np.argsort(-values_V[ids], kind="stable")][:count]
