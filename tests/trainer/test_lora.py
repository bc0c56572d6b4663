"""LoRA: what it wraps, how it is merged, and what is refused."""

import copy
import json

import pytest
import torch
from peft.tuners.lora import Linear
from pydantic import ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from serving import directory
from serving.directory import BadInput
from trainer import model_dir
from trainer.config import Lora
from trainer.strategies import STRATEGIES, count_parameters

IDS = torch.arange(2, 22).view(2, 10)


def lora(model: torch.nn.Module, **settings) -> torch.nn.Module:
    return STRATEGIES["lora"](model, Lora(type="lora", **settings))


def wrapped(model: torch.nn.Module) -> set[str]:
    """The names, in the plain model, of the layers that carry an update."""
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model.") for name in names}


def move_the_updates(model: torch.nn.Module) -> None:
    """What training does: no update is zero any more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.3)


def test_rank_alpha_dropout_and_targets_reach_the_updates(tiny_model):
    model = lora(tiny_model("Llama", "CausalLM"), rank=4, alpha=12, dropout=0.25, targets=["q_proj", "down_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.scaling["default"] == 12 / 4
    assert layer.lora_dropout["default"].p == 0.25
    ends = ("self_attn.q_proj", "mlp.down_proj")
    assert wrapped(model) == {f"model.layers.{block}.{end}" for block in (0, 1) for end in ends}
    assert count_parameters(model)[0] == 2 * 4 * ((16 + 16) + (32 + 16))


def test_rslora_divides_by_the_root_of_the_rank_and_dora_learns_lengths(tiny_model):
    model = lora(tiny_model("Llama", "CausalLM"), rank=4, alpha=12, targets=["q_proj"], rslora=True, dora=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 12 / 4**0.5
    lengths = layer.lora_magnitude_vector["default"].weight
    assert lengths.requires_grad
    torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*1\.self_attn\.[qk]_proj", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}),
        (r".*\.1\..*", {f"model.layers.1.{end}" for end in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]}),
        (["layers.0.mlp.up_proj", "o_proj"], {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj",
                                              "model.layers.1.self_attn.o_proj"}),
    ],
)  # fmt: skip
def test_a_target_is_a_regular_expression_of_whole_names_or_the_end_of_names(tiny_model, targets, expected):
    assert wrapped(lora(tiny_model("Llama", "CausalLM"), targets=targets)) == expected


@pytest.mark.parametrize(
    ("family", "head", "per_block", "beside"),
    [("Llama", "CausalLM", 7, set()), ("GPT2", "SequenceClassification", 4, set()),
     ("Bert", "TokenClassification", 6, set()), ("Bert", "SequenceClassification", 6, {"bert.pooler.dense"}),
     ("DistilBert", "SequenceClassification", 6, set())],
)  # fmt: skip
def test_all_linear_is_every_linear_layer_but_the_heads(tiny_model, family, head, per_block, beside):
    found = wrapped(lora(tiny_model(family, head)))
    assert len(found - beside) == 2 * per_block
    assert beside <= found


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["no_such_layer"],
            "'no_such_layer' found; no layer that LoRA can wrap has that name; near to it: model.layers",
        ),
        (["q_proj", "v_prj"], "'v_prj' found; .* near to it: .*v_proj"),
        (["layers"], "'layers' found"),  # a name of something, but of no layer
        (r"q_proj", "'q_proj' found"),  # a regular expression is of the whole name
        ("(", "'\\(' found; it is no regular expression"),
        (["lm_hed"], "'lm_hed' found; .* near to it: .*lm_head"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_near_names(tiny_model, targets, said):
    with pytest.raises(BadInput, match=rf"^strategy\.targets: {said}"):
        lora(tiny_model("Llama", "CausalLM"), targets=targets)


def test_a_target_that_is_the_tasks_head_is_refused(tiny_model):
    with pytest.raises(BadInput, match=r"'score' found; score is the task's head, which learns whole: leave it out"):
        lora(tiny_model("Llama", "SequenceClassification"), targets=["q_proj", "score"])


@pytest.mark.parametrize(
    "settings", [{"targets": []}, {"targets": ""}, {"targets": ["q_proj", ""]}, {"rank": 0, "dora": True}]
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ValidationError, match=r"targets: is empty, or a name in it is|greater than or equal to 1"):
        Lora(type="lora", **settings)


def test_dora_on_a_row_of_zeros_is_refused_because_it_would_divide_by_its_length(tiny_model):
    base = tiny_model("Llama", "CausalLM")
    assert not base.lm_head.weight[0].any()  # the pad token's
    with pytest.raises(BadInput, match=r"strategy\.dora: lm_head has a row of zeros, .*: do not target it"):
        lora(base, targets=["lm_head"], dora=True)


# --- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_updates_of_shared_embeddings_survive_merging_and_saving(tiny_model, tmp_path, tied, targets, dora):
    """Merging into a weight that two layers share would change both (transformers#45127)."""
    base = tiny_model("Llama", "CausalLM")
    with torch.no_grad():
        base.model.embed_tokens.weight[0] = 0.1  # the pad token's row is zero, which DoRA cannot take
    if not tied:
        STRATEGIES["linear_probe"](base, None)  # unties
    with torch.no_grad():
        at_first = base.eval()(IDS).logits
        model = lora(copy.deepcopy(base), rank=2, targets=targets, dora=dora).eval()
        assert torch.equal(model(IDS).logits, at_first)
        move_the_updates(model)
        trained = model(IDS).logits
        assert float((trained - at_first).abs().max()) > 1e-3
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(loaded(IDS).logits, trained, rtol=1e-5, atol=1e-5)
    assert loaded.config.tie_word_embeddings == (tied and targets == "all-linear")
    shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert shared == loaded.config.tie_word_embeddings


def test_the_unmerged_form_of_updated_embeddings_loads_on_the_tied_base(tiny_model, tmp_path):
    from peft import PeftModel

    base = tiny_model("Llama", "CausalLM")
    model = lora(copy.deepcopy(base), rank=2, targets=["embed_tokens", "lm_head"]).eval()
    move_the_updates(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits, expected)


def test_a_run_merges_says_how_exactly_and_leaves_the_base_alone(make_config, train, base_model):
    config = make_config("sft", "lora")
    assert train(config) == 0
    manifest = directory.read_manifest(config.run.folder / "model", "model")
    assert manifest["merge"].keys() == {"largest_difference", "relative_to_largest_logit"}
    assert 0 <= manifest["merge"]["relative_to_largest_logit"] <= 1e-5
    with safe_open(config.run.folder / "model" / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert "lm_head.weight" not in names  # tied in the base, tied in the result
    assert not [name for name in names if "lora" in name or "base_layer" in name]


def test_a_merge_that_changes_the_model_publishes_nothing(make_config, train, monkeypatch):
    merge = Linear.merge

    def merge_twice(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        with torch.no_grad():
            self.base_layer.weight += 1e-2

    monkeypatch.setattr(Linear, "merge", merge_twice)
    config = make_config("sft", "lora")
    with pytest.raises(RuntimeError, match="merging the LoRA changed the logits"):
        train(config)
    assert not (config.run.folder / "model").exists()
    assert json.loads((config.run.folder / "status.json").read_text())["state"] == "failed"
    assert model_dir.MERGE_TOLERANCE <= 1e-4


def test_a_lora_of_a_classifier_trains_its_new_head_whole(make_config, parts_of, monkeypatch):
    trained, start, save = {}, {}, model_dir.save_model

    def look(final, model, *args, **kwargs):
        trained.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return save(final, model, *args, **kwargs)

    monkeypatch.setattr(model_dir, "save_model", look)
    config = make_config("classification", "lora")
    parts_of(config, before=lambda p: start.update({n: w.detach().clone() for n, w in p.model.named_parameters()}))
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("score.modules_to_save" in name for name in changed)
    assert all(".lora_" in name or "modules_to_save" in name for name in changed)
