"""What the quickstart claims: a difference that no near tie excuses fails it, and so does any claim that fails."""

from types import SimpleNamespace

import pytest
import torch

from launch import evidence, quickstart
from launch.evidence import Comparison
from serving.engine import NEAR_TIE

EXPECTED = [5, 6, 7]


def model_with_margin(margin: float):
    """A model whose best two logits lie `margin` apart after any prompt."""
    logits = torch.tensor([[[0.0, 1.0 + margin, 1.0]]], dtype=torch.float64)
    return lambda ids: SimpleNamespace(logits=logits)


def compare(output: list[int], margin: float) -> Comparison:
    found = Comparison()
    evidence._compare(found, model_with_margin(margin), 0, [1, 2], output, EXPECTED)
    return found


def test_equal_outputs_are_no_mismatch():
    found = compare(EXPECTED, 1.0)
    assert (found.mismatches, found.near_ties, found.repeats) == ([], 0, [])


def test_a_difference_at_a_clear_margin_is_a_mismatch_that_says_where():
    [mismatch] = compare([5, 9, 9], 2 * NEAR_TIE).mismatches
    assert mismatch.startswith("prompt 0 at token 1")


def test_a_difference_at_a_near_tie_is_counted_not_failed():
    found = compare([5, 9, 9], NEAR_TIE / 2)
    assert (found.mismatches, found.near_ties) == ([], 1)


def test_one_token_repeated_is_noticed():
    assert compare([5, 5, 5], 1.0).repeats == [0]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Every stage of the quickstart replaced by one that claims what the test says."""
    claims = {"export": True, "decode": True, "serve": True}
    called = []

    def stage(name):
        def run(outcome, *_):
            called.append(name)
            outcome.claim(claims[name], name)
            return claims[name]

        return run

    monkeypatch.setattr(quickstart, "_show_corpus", lambda: None)
    monkeypatch.setattr(quickstart, "_train", lambda *_: claims.get("train", 0))
    monkeypatch.setattr(quickstart, "_report", lambda *_: tmp_path / "report.html")
    for name in ("export", "decode", "serve"):
        monkeypatch.setattr(quickstart, f"_{name}", stage(name))
    return SimpleNamespace(claims=claims, called=called, folder=tmp_path)


def test_it_returns_0_when_every_claim_holds(stages):
    assert quickstart.quickstart(stages.folder) == 0
    assert stages.called == ["export", "decode", "serve"]


@pytest.mark.parametrize("name", ["decode", "serve"])
def test_it_returns_1_when_a_claim_does_not_hold(stages, name):
    stages.claims[name] = False
    assert quickstart.quickstart(stages.folder) == 1


def test_nothing_is_decoded_or_served_after_a_failed_proof(stages):
    stages.claims["export"] = False
    assert quickstart.quickstart(stages.folder) == 1
    assert stages.called == ["export"]


def test_a_stopped_training_ends_it_with_the_same_code(stages):
    stages.claims["train"] = 75
    assert quickstart.quickstart(stages.folder) == 75
    assert stages.called == []
