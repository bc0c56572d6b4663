"""The loss that never holds all logits, against torch's cross_entropy on all of them; and the head held back for it."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM

from trainer import lm_head, losses
from trainer.losses import cross_entropy_sum, linear_cross_entropy_sum
from trainer.packing import IGNORED

from .test_attention import DECODERS, GPT, GQA, model_of


def made(num_tokens: int, width: int, vocab_size: int, *, ignored: float, dtype=torch.float32):
    """Hidden states, weight and bias that learn, and targets."""
    torch.manual_seed(0)
    shapes = [(1, num_tokens, width), (vocab_size, width), (vocab_size,)]
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(vocab_size, (1, num_tokens))
    targets[torch.rand(1, num_tokens) < ignored] = IGNORED
    return *inputs, targets


@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("biased", [True, False])
def test_loss_and_gradients_equal_those_of_cross_entropy_on_all_logits(biased, ignored):
    hidden, weight, bias, targets = made(700, 48, 5000, ignored=ignored)  # two chunks
    bias = bias if biased else None
    learning = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    loss = linear_cross_entropy_sum(hidden, weight, bias, targets)
    expected = F.cross_entropy(F.linear(hidden, weight, bias)[0], targets[0], ignore_index=IGNORED, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, references = (torch.autograd.grad(each / 700, learning) for each in (loss, expected))
    for gradient, reference in zip(ours, references, strict=True):
        assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_a_target_that_the_model_thinks_impossible_costs_what_it_should():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0], [499.0]])
    loss = linear_cross_entropy_sum(hidden, weight, None, torch.tensor([0]))
    assert loss.item() == pytest.approx(500 + torch.tensor(1 + torch.e**-1).log().item(), rel=1e-6)


def test_under_autocast_products_are_in_its_type_and_sums_in_fp32():
    hidden, weight, bias, targets = made(300, 48, 1000, ignored=0.1)
    expected = cross_entropy_sum(F.linear(hidden.double(), weight.double(), bias.double()).double(), targets)
    reference = torch.autograd.grad(expected, [hidden, weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, bias, targets)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, exact in zip(gradients, reference, strict=True):
        assert 0 < (ours - exact).norm() <= 0.02 * exact.norm()


def test_nothing_to_learn_gives_a_loss_of_zero_and_gradients_of_zero():
    hidden, weight, bias, targets = made(5, 8, 30, ignored=1.1)
    loss = linear_cross_entropy_sum(hidden, weight, bias, targets)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [hidden, weight, bias]))


def test_a_frozen_head_gets_no_gradient_and_evaluation_makes_none(monkeypatch):
    hidden, weight, _, targets = made(40, 8, 30, ignored=0)
    weight.requires_grad_(False)
    linear_cross_entropy_sum(hidden, weight, None, targets).backward()
    assert weight.grad is None
    reference = torch.autograd.grad(cross_entropy_sum(F.linear(hidden, weight), targets), [hidden])[0]
    torch.testing.assert_close(hidden.grad, reference)
    monkeypatch.setattr(losses, "_add_product", None)  # what makes a gradient of the weights
    with torch.no_grad():
        linear_cross_entropy_sum(hidden, weight.requires_grad_(), None, targets)


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden, weight, bias, targets = made(5, 8, 30, ignored=0)
    loss = linear_cross_entropy_sum(hidden, weight, bias, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {**GQA, "tie_word_embeddings": True}),
        ("llama", {**GQA, "tie_word_embeddings": False}),
        ("gpt2", GPT),
        ("gptj", {**GPT, "rotary_dim": 8}),  # a head with a bias
        ("gemma3_text", DECODERS["gemma3_text"]),
        ("bert", {}),  # a transform before the head, whose weight is tied and whose bias is not
    ],
)
def test_the_loss_inside_the_head_and_its_gradients_are_those_of_the_models_own_logits(kind, settings):
    model = model_of(kind, settings, AutoModelForMaskedLM) if kind == "bert" else model_of(kind, settings)
    ids, targets = torch.randint(5, 300, (1, 20)), torch.randint(5, 300, (1, 20))
    head = lm_head.find(model, {"input_ids": ids})
    with head.doing(lambda hidden: head.loss_sum(hidden, targets)):
        loss = model(input_ids=ids).logits
    expected = cross_entropy_sum(model(input_ids=ids).logits, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    learning = list(model.parameters())
    ours, references = (torch.autograd.grad(each, learning, allow_unused=True) for each in (loss, expected))
    for gradient, reference in zip(ours, references, strict=True):
        assert (gradient is None) == (reference is None)
        assert gradient is None or (gradient - reference).norm() <= 1e-5 * reference.norm() + 1e-6


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {**GQA, "final_logit_softcapping": 30.0}),
        ("cohere", {**GQA, "logit_scale": 0.5}),
        ("granite", {**GQA, "logits_scaling": 3.0}),
    ],
)
def test_a_model_that_changes_its_logits_after_the_head_keeps_its_head(kind, settings):
    assert lm_head.find(model_of(kind, settings), {"input_ids": torch.randint(5, 300, (1, 9))}) is None


def test_lora_on_the_layers_leaves_the_head_to_do_the_loss_and_lora_on_the_head_does_not():
    sample = {"input_ids": torch.randint(5, 300, (1, 9))}
    around = get_peft_model(model_of("llama", GQA), LoraConfig(target_modules=["q_proj"])).eval()
    assert lm_head.find(around, sample) is not None
    inside = get_peft_model(model_of("llama", GQA), LoraConfig(target_modules=["lm_head"])).eval()
    assert lm_head.find(inside, sample) is None


def test_a_head_does_other_work_only_while_it_is_asked_for():
    model = model_of("llama", GQA)
    ids, names = torch.randint(5, 300, (1, 9)), set(model.state_dict())
    logits = model(input_ids=ids).logits
    head = lm_head.find(model, {"input_ids": ids})
    with pytest.raises(ZeroDivisionError), head.doing(lambda hidden: hidden):
        1 / 0  # noqa: B018
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert set(model.state_dict()) == names
