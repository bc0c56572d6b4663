"""Mixtures of experts: what the operator answers is what was routed, and near ties between experts are no faults."""

import numpy as np
import pytest

from serving.differences import Differences
from serving.export import VerificationFailed, export_model

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "num_local_experts": 4}


@pytest.fixture
def mixture(save_with_tokenizer, tmp_path):
    """A tiny Mixtral."""
    import transformers

    config = transformers.MixtralConfig(**SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return save_with_tokenizer(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("spoilt", ["fc1", "fc2"])
def test_experts_in_another_order_are_refused(mixture, tmp_path, monkeypatch, spoilt):
    import onnx_ir as ir

    from serving.export import graph

    real = graph.interleave

    def with_experts_moved_on(model):
        real(model)
        for node in model.graph:
            if node.op_type == "MoE":
                weight = node.inputs[{"fc1": 2, "fc2": 4}[spoilt]]
                moved = np.roll(weight.const_value.numpy(), 1, axis=0)
                weight.const_value = ir.tensor(moved, name=weight.name)

    monkeypatch.setattr(graph, "interleave", with_experts_moved_on)
    with pytest.raises(VerificationFailed, match="logits differ by"):
        export_model(mixture, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_the_margin_of_a_choice_is_that_between_the_last_chosen_and_the_first_not_chosen():
    import torch

    from serving.export.routing import Routing

    with Routing(2) as routing:
        torch.topk(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.4, 0.25, 0.2, 0.15]]), 2)
        torch.tensor([[8.0, 4.0, 1.0], [8.0, 4.0, 3.0]]).topk(2)
        torch.topk(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 2)  # all of them: nothing else could be chosen
    # 0.15 of 0.3 and 3 of 4; 0.05 of 0.25 and 1 of 4.
    np.testing.assert_allclose(routing.margins_T, [0.5, 0.2], rtol=1e-6)


def test_what_has_no_experts_has_no_margins():
    import torch

    from serving.export.routing import Routing

    with Routing(2) as routing:
        torch.softmax(torch.ones(2, 3), -1)
    assert routing.margins_T is None


# Accepted are 0.001, behind a near tie 0.3 of a spread of 2.
MARGINS = np.array([0.5, 1e-6, 0.5])


def differences(*found: float, behind: bool = True) -> dict:
    gathered = Differences(1e-3, 2.0, "fp32")
    for position, difference in enumerate(found):
        is_behind = behind and gathered.behind_tie(MARGINS, position + 1)
        gathered.add(np.array([0.0, difference]), np.zeros(2), behind_tie=is_behind)
    return gathered.check(1e-3, positions=len(found))


def test_a_difference_from_a_near_tie_of_experts_on_is_counted_and_not_refused():
    check = differences(1e-4, 0.1, 1e-4)
    assert (check["passed"], check["near_ties"], check["max_abs_diff"]) == (True, 1, pytest.approx(1e-4))


@pytest.mark.parametrize(
    "found",
    [
        pytest.param((0.1, 1e-4, 1e-4), id="before the near tie"),
        pytest.param((1e-4, 0.7, 1e-4), id="more than another expert explains"),
        pytest.param((1e-4, 0.1, 0.1), id="most of all positions"),
    ],
)
def test_any_other_difference_is_refused(found):
    assert not differences(*found)["passed"]


def test_without_a_near_tie_nothing_is_excused():
    assert not differences(1e-4, 0.1, 1e-4, behind=False)["passed"]
    assert not Differences(1e-3, 2.0, "fp32").behind_tie(None, 3)
