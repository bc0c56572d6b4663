"""Attention within segments, against torch's own attention and transformers' models, one document at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from trainer import attention
from trainer.packing import collate_packed
from trainer.token_model import tried_out

from .test_packing import examples_of

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODERS = {
    "llama": GQA,
    "gpt2": GPT,
    "qwen2": GQA,
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": 6},
    "gemma2": {**GQA, "attn_logit_softcapping": None, "sliding_window": 6},
    "gemma3_text": {**GQA, "sliding_window": 6},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}
ENCODERS = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "modernbert": {"local_attention": 8},
}
CANNOT = {
    "gemma2": GQA,  # it bends attention scores by a softcap
    "bloom": {"n_layer": 2, "n_head": 4},  # its positions are in the attention scores
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},  # a convolution crosses documents
}


class Module(torch.nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, 2


def model_of(kind: str, settings: dict, auto=AutoModelForCausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).float().eval()


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)[None, None, None]


def inputs_of(num_tokens: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Query [1, 4, N, 8], key and value [1, 2, N, 8]."""
    torch.manual_seed(0)
    return [torch.randn(1, num_tokens, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]


def one_by_one(query, key, value, lengths, is_causal: bool, window: int | None, scale: float) -> torch.Tensor:
    parts = []
    for start, stop in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distance >= 0) if is_causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            seen &= distance.abs() < window
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("is_causal", [True, False])
def test_segments_give_what_each_gives_alone_and_so_do_their_gradients(is_causal, window):
    lengths = [3, 1, 200, 129, 7, 600]  # of one block and several; kept weights, and weights computed again
    inputs = inputs_of(sum(lengths))
    output, _ = attention.attend(
        Module(is_causal), *inputs, mask_of(lengths), scaling=0.3, sliding_window=window, is_causal=None
    )
    expected = one_by_one(*inputs, lengths, is_causal, window, 0.3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(output)
    ours = torch.autograd.grad(output, inputs, upstream)
    for gradient, reference in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-11)


def test_in_bf16_it_is_as_close_to_exact_as_torchs_own_kernel():
    lengths = [200, 37]
    inputs = [tensor.detach().bfloat16() for tensor in inputs_of(237)]
    sharp = [inputs[0] * 4, inputs[1] * 2, inputs[2]]  # scores whose rounding to bf16 would show
    exact = one_by_one(*(tensor.double() for tensor in sharp), lengths, True, None, 8**-0.5)
    ours = attention.attend(Module(True), *sharp, mask_of(lengths))[0]
    parts = [
        F.scaled_dot_product_attention(*(tensor[:, :, part] for tensor in sharp), is_causal=True, enable_gqa=True)
        for part in (slice(200), slice(200, None))
    ]
    torchs = torch.cat(parts, 2).transpose(1, 2)
    assert (ours - exact).norm() <= 1.5 * (torchs - exact).norm()


@pytest.mark.parametrize("length", [40, 600])
def test_dropout_follows_torchs_seed_and_its_gradient_is_that_of_what_was_dropped(length):
    inputs = inputs_of(length)

    def run(*tensors, seed=3):
        torch.manual_seed(seed)
        return attention.attend(Module(True), *tensors, mask_of([length]), dropout=0.4)[0]

    output = run(*inputs)
    assert torch.equal(output, run(*inputs))
    assert not torch.equal(output, run(*inputs, seed=4))
    # The output is linear in the values, and where the dropped weights are fixed its derivative can be measured.
    upstream, direction, step = torch.randn_like(output), torch.randn_like(inputs[0]), 1e-6
    gradients = torch.autograd.grad(output, inputs, upstream)
    moved = [run(inputs[0] + sign * step * direction, *inputs[1:]) for sign in (1, -1)]
    measured = ((moved[0] - moved[1]) * upstream).sum() / (2 * step)
    torch.testing.assert_close((gradients[0] * direction).sum(), measured, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((gradients[2] * inputs[2]).sum(), (output * upstream).sum())


def test_dropout_keeps_the_mean():
    lengths = [100] * 40
    query, key, value = inputs_of(4000)
    value = torch.ones_like(value)
    torch.manual_seed(0)
    output = attention.attend(Module(False), query, key, value, mask_of(lengths), dropout=0.3)[0]
    assert output.std() > 0.01
    assert output.mean().item() == pytest.approx(1, abs=0.005)


def test_a_keyword_that_would_change_the_result_is_an_error():
    with pytest.raises(NotImplementedError, match="attention with softcap is not known to work in segments"):
        attention.attend(Module(True), *inputs_of(4), mask_of([4]), softcap=30.0, use_cache=True, s_aux=None)


def test_any_other_mask_goes_to_torchs_attention():
    model = model_of("llama", GQA)
    ids, padded = torch.randint(5, 300, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded[1, 5:] = 0
    expected = model(input_ids=ids, attention_mask=padded).logits
    generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    model.set_attn_implementation(attention.NAME)
    assert torch.equal(model(input_ids=ids, attention_mask=padded).logits, expected)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), generated)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_packed_documents_give_every_model_the_outputs_and_gradients_of_documents_alone(kind):
    auto = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    model = model_of(kind, {**DECODERS, **ENCODERS}[kind], auto)
    examples = examples_of([5, 17, 1, 30, 2])
    alone = torch.cat([model(torch.from_numpy(each.input_ids).long()[None]).logits for each in examples], 1)
    upstream = torch.randn_like(alone)
    expected = gradients_of(alone, upstream, model)

    first_position = tried_out(model, 32).first_position
    assert first_position == (2 if kind == "roberta" else 0)
    assert model.config._attn_implementation == attention.NAME
    batch = collate_packed([examples], first_position)
    del batch["targets"]
    packed = model(**batch).logits
    assert (packed - alone).norm() <= 1e-5 * alone.norm()
    for ours, reference in zip(gradients_of(packed, upstream, model), expected, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm() + 1e-6


def gradients_of(output: torch.Tensor, upstream: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(output, list(model.parameters()), upstream, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_cannot_keep_documents_apart_is_found_out_and_left_as_it_was(kind):
    model = model_of(kind, CANNOT[kind])
    before = model.config._attn_implementation
    assert tried_out(model, 32).first_position is None
    assert model.config._attn_implementation == before


def test_trying_a_model_out_changes_neither_its_mode_nor_torchs_generator():
    model = model_of("gpt2", GPT).train()
    torch.manual_seed(5)
    tried_out(model, 32)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert model.training
    assert torch.equal(drawn, torch.rand(1))


def test_what_a_model_saves_does_not_say_how_it_was_trained(tmp_path):
    model = model_of("llama", GQA)
    names = set(model.state_dict())
    tried_out(model, 32)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert set(model.state_dict()) == names
