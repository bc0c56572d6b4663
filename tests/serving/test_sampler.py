"""The sampler against hand-worked rows, against NumPy sorts written the slow way, and for independence of draws."""

import numpy as np
import pytest

from serving.request import Sampling
from serving.sampler import greedy, sample, top2_margin

# V vocabulary
HALF_QUARTER_QUARTER_V = np.log(np.array([0.25, 0.5, 0.25], dtype=np.float32))


def draws(logits_V: np.ndarray, count: int, **sampling) -> list[int]:
    return [
        sample(logits_V, Sampling(temperature=1.0, **{"seed": 7, **sampling}), position) for position in range(count)
    ]


def test_greedy_takes_the_lowest_id_among_equals():
    assert greedy(np.array([[1.0, 3.0, 3.0], [5.0, 0.0, 5.0]])).tolist() == [1, 0]
    assert sample(np.array([1.0, 3.0, 3.0]), Sampling(), 0) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_and_never_a_token(bad):
    row_V = np.array([0.0, bad, 1.0])
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=1, top_p=0.5)):
        with pytest.raises(FloatingPointError):
            sample(row_V, sampling, 0)
    with pytest.raises(FloatingPointError):
        greedy(np.stack([np.zeros(3), row_V]))


def test_masked_logits_are_never_picked():
    masked_V = np.array([-np.inf, 0.0, -np.inf, 0.0])
    assert set(draws(masked_V, 200)) == {1, 3}
    assert set(draws(masked_V, 200, top_p=0.999, top_k=4)) == {1, 3}


def test_draws_follow_the_softmax_of_the_logits():
    counts = np.bincount(draws(HALF_QUARTER_QUARTER_V, 4000), minlength=3)
    # 4000 draws: five standard deviations of a half are 158, of a quarter 137
    np.testing.assert_allclose(counts, [1000, 2000, 1000], atol=160)


def test_temperature_divides_the_logits():
    # Squared probabilities 1/16, 4/16, 1/16 are 1/6, 4/6, 1/6 of their sum.
    picks = [sample(HALF_QUARTER_QUARTER_V, Sampling(temperature=0.5, seed=3), position) for position in range(4000)]
    np.testing.assert_allclose(np.bincount(picks, minlength=3), [667, 2667, 667], atol=160)


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform():
    row_V = np.array([0.0, 1e4, -1e4])
    assert {sample(row_V, Sampling(temperature=1e-300, seed=1), position) for position in range(50)} == {1}
    hot = Sampling(temperature=100.0, seed=1)
    assert {sample(np.array([0.0, 1.0, 2.0]), hot, position) for position in range(100)} == {0, 1, 2}


def test_top_k_keeps_exactly_k_tokens_even_among_equals():
    assert set(draws(np.array([1.0, 2.0, 3.0, 4.0]), 200, top_k=2)) == {2, 3}
    assert set(draws(np.zeros(5), 300, top_k=2)) == {0, 1}
    assert set(draws(np.zeros(3), 300, top_k=99)) == {0, 1, 2}


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    assert set(draws(HALF_QUARTER_QUARTER_V, 300, top_p=0.49)) == {1}
    assert set(draws(HALF_QUARTER_QUARTER_V, 300, top_p=0.51)) == {0, 1}
    assert set(draws(HALF_QUARTER_QUARTER_V, 300, top_p=0.99)) == {0, 1, 2}
    assert set(draws(HALF_QUARTER_QUARTER_V, 50, top_p=1e-9)) == {1}


def test_top_p_counts_within_what_top_k_left():
    # Of the two largest, 0.4 and 0.3, the first holds 0.571: 0.55 needs one token, over the whole row it needs two.
    row_V = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(draws(row_V, 300, top_k=2, top_p=0.55)) == {0}
    assert set(draws(row_V, 300, top_p=0.55)) == {0, 1}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_a_nucleus_wider_than_the_first_candidates_equals_a_full_sort(top_p):
    logits_V = np.random.default_rng(0).normal(size=5000)
    probabilities_V = np.exp(logits_V) / np.exp(logits_V).sum()
    order_V = np.argsort(-probabilities_V, kind="stable")
    size = int(np.searchsorted(np.cumsum(probabilities_V[order_V]), top_p)) + 1
    picks = draws(logits_V, 300, top_p=top_p)
    assert set(picks) <= set(order_V[:size].tolist())
    expected = [order_V[_inverse_cdf(probabilities_V[order_V[:size]], 7, position)] for position in range(300)]
    assert picks == expected


def _inverse_cdf(probabilities: np.ndarray, seed: int, position: int) -> int:
    threshold = np.random.default_rng([seed, position]).random() * probabilities.sum()
    return int(np.flatnonzero(np.cumsum(probabilities) > threshold)[0])


def test_a_draw_depends_on_seed_and_position_only():
    logits_V = np.random.default_rng(1).normal(size=1000)
    sampling = Sampling(temperature=1.0, seed=11)
    alone = [sample(logits_V, sampling, position) for position in range(20)]
    for position in reversed(range(20)):
        sample(logits_V, Sampling(temperature=1.0), position)  # an unseeded neighbour draws in between
        assert sample(logits_V, sampling, position) == alone[position]
    assert alone != [sample(logits_V, Sampling(temperature=1.0, seed=12), position) for position in range(20)]
    assert len(set(alone)) > 1


def test_without_a_seed_draws_differ():
    logits_V = np.zeros(100_000)
    assert sample(logits_V, Sampling(temperature=1.0), 0) != sample(logits_V, Sampling(temperature=1.0), 0)


def test_half_precision_logits_are_sampled_in_double():
    logits_V = np.array([60000.0, 60000.0, -60000.0], dtype=np.float16)
    assert set(draws(logits_V, 100)) == {0, 1}


def test_top2_margin_is_the_gap_between_the_two_largest():
    assert top2_margin(np.array([1.0, 4.0, 3.5])) == 0.5
    assert top2_margin(np.array([2.0, 2.0])) == 0.0
    assert top2_margin(np.array([2.0])) == float("inf")
