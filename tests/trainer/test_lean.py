"""Lean norms and gated layers, against transformers' own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from trainer.lean import make_lean

from .test_attention import DECODERS, GPT, GQA, model_of

LEAN = {"llama": GQA, "qwen3": GQA, "mistral": DECODERS["mistral"], "smollm3": GQA, "olmo2": GQA}
IDS = torch.arange(5, 25).reshape(1, 20)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Norms that scale by something: new ones scale by 1, with which a wrong formula can be right."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def outputs_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    torch.manual_seed(1)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return logits, torch.autograd.grad(logits, learning, torch.randn_like(logits))


def kept_bytes(model: torch.nn.Module) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=IDS, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", LEAN)
def test_a_lean_model_gives_the_same_outputs_and_gradients_and_keeps_less(kind):
    model = randomized(model_of(kind, LEAN[kind]))
    expected, gradients = outputs_and_gradients(model)
    before = kept_bytes(model)
    make_lean(model)
    found, lean_gradients = outputs_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, reference in zip(lean_gradients, gradients, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()
    assert kept_bytes(model) < 0.8 * before


def test_in_double_precision_the_gradients_are_those_that_can_be_measured():
    model = randomized(model_of("llama", {**GQA, "num_hidden_layers": 1}).double())
    make_lean(model)
    layer = model.model.layers[0]
    x = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer.mlp(layer.input_layernorm(x)), (x,))


def test_under_autocast_a_gated_layer_computes_what_it_did():
    model = model_of("llama", GQA)
    layer, x = model.model.layers[0].mlp, torch.randn(1, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        make_lean(model)
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_gated_layer_whose_last_product_is_changed_by_lora_or_watched_by_a_hook_stays_right():
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=r".*layers\.0\.mlp\.(gate|down)_proj", init_lora_weights=False)
    model = get_peft_model(model_of("llama", GQA), lora).eval()
    seen = []
    model.base_model.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    expected, gradients = outputs_and_gradients(model)
    make_lean(model)
    found, lean_gradients = outputs_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, reference in zip(lean_gradients, gradients, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm() + 1e-7
    assert len(seen) == 2


@pytest.mark.parametrize(("kind", "settings"), [("gemma", GQA), ("gpt2", GPT), ("glm", GQA)])
def test_layers_that_compute_something_else_stay_as_they_are(kind, settings):
    """Gemma's norms scale by 1 + weight and its gates are GELU; GPT-2 has neither; GLM's gate and up are one layer."""
    model = model_of(kind, settings)
    layers = [module for module in model.modules() if kind != "glm" or "Norm" not in type(module).__name__]
    before = [type(module) for module in layers]
    make_lean(model)
    assert [type(module) for module in layers] == before


def test_what_was_made_lean_can_be_copied_named_and_taken_back():
    model = model_of("llama", GQA)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    undo = make_lean(model)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert (twin(input_ids=IDS).logits == 0).all(), "the copy has norms of its own"
    undo()
    assert [type(module) for module in model.modules()] == kinds
