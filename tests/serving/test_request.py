"""Sampling refuses every value outside its range, on one line that names the setting and what is accepted."""

import pytest

from serving.directory import BadInput
from serving.request import Request, Sampling

BAD_VALUES = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2**63),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", True),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2**63),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.0),
    ("ignore_end", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(BadInput, match=f"^{name}: ") as caught:
        Sampling(**{name: value})
    assert "\n" not in str(caught.value)


def test_the_edges_of_the_ranges_are_accepted():
    Sampling(max_new_tokens=1, temperature=0, top_k=0, top_p=1, seed=0)
    Sampling(seed=2**63 - 1, top_p=1e-9, temperature=1e-9)


def test_only_temperature_zero_is_greedy():
    assert Sampling().is_greedy
    assert not Sampling(temperature=1e-9).is_greedy


def test_requests_are_told_apart_by_identity_not_by_content():
    first, second = (Request("same", [1, 2], Sampling()) for _ in range(2))
    assert first != second
    assert len({first, second}) == 2
    assert first.output_ids is not second.output_ids
    assert not first.is_finished
