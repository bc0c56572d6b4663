"""New models: of the size that their name says, with what the user sets, for what they can learn."""

import pytest
import torch
import transformers
from pydantic import ValidationError

from serving.directory import BadInput
from trainer import models
from trainer.config import NewModel
from trainer.config.presets import PRESETS, VOCABULARY
from trainer.new_model import new_config
from trainer.tokenizers import train_tokenizer

HEADS = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "context_length": 64}
TEXTS = ["the quick brown fox returns a list of lines", "it has read every file before and after lunch"]


@pytest.fixture(scope="module")
def tokenizers():
    """A tokenizer for each architecture."""
    return {name: train_tokenizer(TEXTS, 300, 64, architecture=name) for name in HEADS}


@pytest.fixture
def build(tokenizers):
    """Return a function that builds a tiny new model with a head."""

    def run(architecture: str, head: str, labels=None, **changes):
        torch.manual_seed(0)
        section = NewModel(type="new", architecture=architecture, **{**SIZES, **changes})
        return models.build_model(section, tokenizers[architecture], head, labels).eval()

    return run


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("architecture", HEADS)
def test_a_preset_has_about_as_many_weights_as_its_name_says(architecture, preset):
    class OfVocabulary:
        pad_token_id, eos_token_id = 0, 1

        @staticmethod
        def get_vocab():
            return {"last": VOCABULARY[preset] - 1}

    section = NewModel(type="new", architecture=architecture, preset=preset)
    config = new_config(section, OfVocabulary(), HEADS[architecture], {})
    with torch.device("meta"):
        model = getattr(transformers, HEADS[architecture]).from_config(config)
    number, unit = float(preset[:-1]), {"m": 1e6, "b": 1e9}[preset[-1]]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(number * unit, rel=0.15)


def test_without_a_preset_the_sizes_are_the_plain_defaults():
    section = NewModel(type="new")
    assert (section.hidden_size, section.intermediate_size, section.num_layers) == (256, 688, 4)
    assert (section.num_heads, section.num_kv_heads, section.context_length) == (4, 2, 512)


def test_sizes_that_the_user_sets_win_over_the_preset():
    preset = NewModel(type="new", preset="1m")
    wider = NewModel(type="new", preset="1m", hidden_size=256, num_layers=7)
    assert (wider.hidden_size, wider.num_layers) == (256, 7)
    assert (wider.intermediate_size, wider.num_heads) == (preset.intermediate_size, preset.num_heads)
    assert preset.hidden_size == 128
    default = NewModel(type="new", preset="1m", hidden_size=256)  # a size that is also the plain default is still set
    assert default.hidden_size == 256


def test_the_resolved_config_has_the_sizes_and_makes_the_same_model():
    for given in ({"preset": "3m"}, {"preset": "10m", "architecture": "encoder"}, {"num_layers": 3}):
        section = NewModel(type="new", **given)
        again = NewModel.model_validate(section.model_dump(mode="json"))
        assert again == section
        assert again.preset is None


def test_a_preset_that_changes_nothing_is_refused():
    resolved = NewModel(type="new", preset="3m").model_dump()
    with pytest.raises(ValidationError, match="preset 10m changes nothing: every size is set beside it"):
        NewModel.model_validate({**resolved, "preset": "10m"})


@pytest.mark.parametrize("given", [{"preset": "7b"}, {"preset": "1m", "architecture": "both"}, {"preset": 3}])
def test_an_unknown_preset_or_architecture_is_refused(given):
    with pytest.raises(ValidationError, match="Input should be"):
        NewModel(type="new", **given)


def test_an_encoder_has_as_many_key_heads_as_heads():
    assert NewModel(type="new", architecture="encoder", hidden_size=48, num_heads=6).num_kv_heads == 6
    with pytest.raises(ValidationError, match=r"num_kv_heads 2 does not fit architecture encoder, .* 4: leave it out"):
        NewModel(type="new", architecture="encoder", num_kv_heads=2)


@pytest.mark.parametrize(
    ("objective", "architecture"), [("masked_lm", "decoder"), ("causal_lm", "encoder"), ("sft", "encoder")]
)
def test_an_objective_that_the_architecture_cannot_learn_is_refused(make_config, objective, architecture):
    values = make_config().model_dump(mode="json")
    values["model"] = {"type": "new", "architecture": architecture}
    values["objective"] = {"type": objective}
    said = f"objective.type {objective} does not fit model.architecture {architecture}"
    with pytest.raises(ValidationError, match=said):
        type(make_config()).model_validate(values)


def test_a_head_that_the_architecture_cannot_have_is_refused(build):
    with pytest.raises(BadInput, match=r"^model\.architecture: decoder found, but .*; accepted: encoder$"):
        build("decoder", "AutoModelForMaskedLM")
    with pytest.raises(BadInput, match=r"^model\.architecture: encoder found, but .*; accepted: decoder$"):
        build("encoder", "AutoModelForCausalLM")


@pytest.mark.parametrize("architecture", HEADS)
def test_a_decoder_reads_to_the_left_and_an_encoder_both_ways(build, tokenizers, architecture):
    model = build(architecture, HEADS[architecture])
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (2, 4, len(tokenizers[architecture]))
    assert torch.equal(logits[0, :3], logits[1, :3]) == (architecture == "decoder")


@pytest.mark.parametrize("architecture", HEADS)
def test_both_architectures_have_heads_for_texts_and_for_tokens(build, architecture):
    ids, labels = torch.tensor([[5, 6, 7]]), ["a", "b", "c", "d"]
    texts = build(architecture, "AutoModelForSequenceClassification", labels)
    tokens = build(architecture, "AutoModelForTokenClassification", labels)
    with torch.no_grad():
        assert texts(input_ids=ids).logits.shape == (1, 4)
        assert tokens(input_ids=ids).logits.shape == (1, 3, 4)
    assert texts.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_an_encoder_tells_the_texts_of_a_pair_apart(build, tokenizers):
    model = build("encoder", "AutoModelForMaskedLM")
    pair = tokenizers["encoder"]("the fox", "a list", return_tensors="pt")
    with torch.no_grad():
        logits = model(**pair).logits
        as_one = model(**{**pair, "token_type_ids": torch.zeros_like(pair["token_type_ids"])}).logits
    assert not torch.allclose(logits, as_one)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_tensor_also_in_the_file(build, tmp_path, architecture, tied):
    from safetensors import safe_open

    model = build(architecture, HEADS[architecture], tie_embeddings=tied)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs.data_ptr() == outputs.data_ptr()) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 (no mapping)
    assert shapes.count(tuple(inputs.shape)) == (1 if tied else 2)


@pytest.mark.parametrize("architecture", HEADS)
def test_the_attention_function_is_chosen_at_build_and_changes_no_result(tokenizers, architecture):
    section, logits = NewModel(type="new", architecture=architecture, **SIZES), []
    for name in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = models.build_model(
            section, tokenizers[architecture], HEADS[architecture], None, attn_implementation=name
        )
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits.append(model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits)
    torch.testing.assert_close(*logits)


def test_an_end_token_that_also_pads_learns_from_being_read(tokenizers):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers["decoder"].backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    section = NewModel(type="new", **SIZES, tie_embeddings=False)
    model = models.build_model(section, tokenizer, "AutoModelForCausalLM", None)
    model(input_ids=torch.tensor([[tokenizer.eos_token_id, 5]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0
    assert model.config.pad_token_id == tokenizer.eos_token_id
