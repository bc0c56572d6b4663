"""Which weights learn, and that nothing else moves."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from serving.directory import BadInput
from trainer import build
from trainer.config import Full, Lora
from trainer.strategies import STRATEGIES, count_parameters


@pytest.fixture
def base(base_model):
    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


IDS = torch.arange(20)[None]


def before_the_model_is_saved(monkeypatch, look):
    """Call `look(model)` when the trained model is about to be merged and saved."""
    from trainer import model_dir

    save = model_dir.save_model

    def wrapped(final, model, *args, **kwargs):
        look(model)
        return save(final, model, *args, **kwargs)

    monkeypatch.setattr(model_dir, "save_model", wrapped)


def test_full_trains_every_weight(make_config, parts_of, base):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = parts_of(make_config("sft", "full")).model.state_dict()
    assert [name for name, value in before.items() if torch.equal(value, trained[name])] == []


def test_lora_trains_the_adapter_and_leaves_the_base_bit_for_bit(make_config, parts_of, base, monkeypatch):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = {}
    before_the_model_is_saved(monkeypatch, lambda model: trained.update(copied(model.state_dict())))
    start = {}
    parts_of(make_config("sft", "lora"), before=lambda parts: start.update(copied(parts.model.state_dict())))
    adapter = {name for name in trained if ".lora_" in name}
    assert len(adapter) == 2 * 7 * 2  # A and B of seven linear layers in two blocks: all but the head
    assert not [name for name in adapter if torch.equal(trained[name], start[name])]
    prefix = "base_model.model."
    frozen = {name.removeprefix(prefix).replace(".base_layer", ""): trained[name] for name in trained.keys() - adapter}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)


def copied(state):
    return {name: value.clone() for name, value in state.items()}


def test_lora_of_a_classifier_trains_its_new_head_whole(make_config, parts_of, monkeypatch):
    trained, start = {}, {}
    before_the_model_is_saved(monkeypatch, lambda model: trained.update(copied(dict(model.named_parameters()))))
    config = make_config("classification", "lora")
    parts_of(config, before=lambda parts: start.update(copied(dict(parts.model.named_parameters()))))
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("score.modules_to_save" in name for name in changed)
    assert all(".lora_" in name or "modules_to_save" in name for name in changed)


def test_lora_at_step_0_is_the_base_bit_for_bit(base, make_config):
    with torch.no_grad():
        expected = base(IDS).logits
        wrapped = build.build(make_config("sft", "lora")).model.eval()
        assert isinstance(wrapped, PeftModel)
        assert torch.equal(wrapped(IDS).logits, expected)


def test_rank_alpha_dropout_and_targets_reach_the_adapter(base):
    config = Lora(type="lora", rank=4, alpha=12, dropout=0.25, targets=["q_proj", "down_proj"])
    model = STRATEGIES["lora"](base, config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.25
    wrapped = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert wrapped == {"q_proj", "down_proj"}
    assert count_parameters(model)[0] == 2 * 4 * ((32 + 32) + (64 + 32))


def test_an_unknown_target_is_refused_by_name(base):
    with pytest.raises(BadInput, match=r"strategy\.targets: \['no_such_layer'\] found"):
        STRATEGIES["lora"](base, Lora(type="lora", targets=["no_such_layer"]))


def test_targets_that_are_no_pattern_are_refused(base):
    with pytest.raises(BadInput, match=r"strategy\.targets: '\(' found"):
        STRATEGIES["lora"](base, Lora(type="lora", targets="("))


def test_shared_weights_are_counted_once(base):
    learning, total = count_parameters(STRATEGIES["full"](base, Full(type="full")))
    assert learning == total == sum(p.numel() for p in {id(p): p for p in base.parameters()}.values())
    assert total < sum(value.numel() for value in base.state_dict().values())  # which lists the shared one twice


def test_a_frozen_model_is_thawed_by_full(base_model):
    model = AutoModelForSequenceClassification.from_pretrained(base_model).requires_grad_(False)
    assert all(p.requires_grad for p in STRATEGIES["full"](model, Full(type="full")).parameters())
