"""Families of models: decoders and encoders with each head that they may have, beside transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from serving.directory import BadInput
from trainer import model_fit, models
from trainer.config import PretrainedModel
from trainer.tokenizers import load_tokenizer, train_tokenizer

TEXTS = ["the fox", "the quick brown fox returns a list of lines", "a", "lines in every file that it has read"]
_WIDE = {"initializer_range": 0.2}  # of random weights, so that texts differ by more than rounding
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **_WIDE}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# A model of each family as it is saved before it classifies anything: with the head of a language model.
DECODERS = {
    "GPT2LMHeadModel": _GPT2,
    "LlamaForCausalLM": _GROUPED,
    "OPTForCausalLM": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "GPTNeoXForCausalLM": {**_SIZES, "max_position_embeddings": 64},
    "Qwen3ForCausalLM": {**_GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**_GROUPED, "head_dim": 8},
}  # fmt: skip
ENCODERS = {
    "BertForMaskedLM": {**_SIZES, "max_position_embeddings": 64},
    "RobertaForMaskedLM": {**_SIZES, "max_position_embeddings": 66},
    "DistilBertForMaskedLM": {
        "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, **_WIDE,
    },
    "ModernBertForMaskedLM": {**_SIZES, "max_position_embeddings": 64},
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers(tokenizer):
    """A tokenizer for each kind of model; GPT-2's kind has no pad token of its own."""
    return {"decoder": tokenizer, "encoder": train_tokenizer(TEXTS, 300, 64, architecture="encoder")}


@pytest.fixture
def save_family(tokenizers, tmp_path):
    """Return a function that saves a random model of a family with its tokenizer, and returns the folder."""

    def save(name: str, **changes) -> str:
        tokenizer = tokenizers["encoder" if name in ENCODERS else "decoder"]
        model_class = getattr(transformers, name)
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        if name == "GPT2LMHeadModel":
            special["pad_token_id"] = None
            tokenizer = transformers.AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
            tokenizer.pad_token = None
        sizes = {**DECODERS, **ENCODERS}.get(name, {})
        torch.manual_seed(0)
        model = model_class(model_class.config_class(vocab_size=len(tokenizer), **{**sizes, **special, **changes}))
        model.save_pretrained(tmp_path / name)
        return _saved(tokenizer, tmp_path / name)

    return save


def _saved(tokenizer, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder: str, head: str, labels=None):
    """Return model and tokenizer as a run builds them."""
    tokenizer = load_tokenizer(folder)
    return models.build_model(
        PretrainedModel(type="pretrained", path=folder), tokenizer, head, labels
    ).eval(), tokenizer


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_padded_batch_is_classified_as_each_text_alone(save_family, name):
    model, tokenizer = load(save_family(name), "AutoModelForSequenceClassification", ["a", "b", "c"])
    with torch.no_grad():
        together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert alone.std(0).min() > 1e-2, "texts do not differ"


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_answers_from_the_last_real_token(save_family, name):
    model, tokenizer = load(save_family(name), "AutoModelForSequenceClassification", ["a", "b"])
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
        last = hidden[torch.arange(len(TEXTS)), batch["attention_mask"].sum(1) - 1]
        torch.testing.assert_close(model(**batch).logits, model.score(last))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_language_model_keeps_every_weight_it_was_saved_with(save_family, name):
    folder = save_family(name)
    head = "AutoModelForMaskedLM" if name in ENCODERS else "AutoModelForCausalLM"
    model, tokenizer = load(folder, head)
    reference = getattr(transformers, name).from_pretrained(folder).eval()
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_an_encoder_is_no_base_for_language_models_to_the_left_and_a_decoder_none_for_masks(save_family):
    with pytest.raises(BadInput, match=r"is a bert, which reads both ways .*; causal_lm and sft need a decoder"):
        load(save_family("BertForMaskedLM"), "AutoModelForCausalLM")
    with pytest.raises(BadInput, match=r"is of type llama, for which transformers has nothing that learns masked_lm"):
        load(save_family("LlamaForCausalLM"), "AutoModelForMaskedLM")
    with pytest.raises(BadInput, match=r"is of type opt, .* nothing that learns token_classification"):
        load(save_family("OPTForCausalLM"), "AutoModelForTokenClassification", ["a", "b"])


def test_an_encoder_with_a_decoder_is_refused(save_family):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    folder = save_family("T5ForConditionalGeneration", **sizes)
    with pytest.raises(BadInput, match="is a t5, an encoder with a decoder; accepted: one of the two alone"):
        load(folder, "AutoModelForCausalLM")


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def test_an_embedding_may_be_larger_than_the_tokenizer_and_not_smaller(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer) + 20)
    model.save_pretrained(base)
    wider, _ = load(str(base), "AutoModelForCausalLM")
    assert wider.get_input_embeddings().num_embeddings == len(tokenizer) + 20
    model.resize_token_embeddings(len(tokenizer) - 1)
    model.save_pretrained(base)
    with pytest.raises(BadInput, match=rf"^tokenizer\.path: 300 entries, but {base} embeds 299; use its own$"):
        load(str(base), "AutoModelForCausalLM")


def test_positions_that_are_counted_from_the_padding_shorten_the_longest_text(save_family):
    model, tokenizer = load(save_family("RobertaForMaskedLM"), "AutoModelForMaskedLM")
    longest = 66 - tokenizer.pad_token_id - 1
    assert model_fit.longest_text(model) == longest
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, longest + 1), 5))
    tokenizer.model_max_length = 10**6
    with pytest.raises(BadInput, match=rf"^batch\.max_length: {longest + 1} found; the model takes at most {longest};"):
        model_fit.check_length(model, tokenizer, longest + 1)


def test_positions_that_are_counted_from_the_padding_need_the_models_own(save_family):
    folder = save_family("RobertaForMaskedLM")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = "[MASK]"
    with pytest.raises(BadInput, match=r"^tokenizer\.path: pads with id 3, but the model counts positions from"):
        models.build_model(PretrainedModel(type="pretrained", path=folder), tokenizer, "AutoModelForMaskedLM", None)


def test_the_longest_text_and_the_end_of_generated_ones_are_saved_alike(base, tmp_path):
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("model_max_length")  # then transformers takes any length
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 5}))
    model, tokenizer = load(str(base), "AutoModelForCausalLM")
    assert tokenizer.model_max_length == 128
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, tokenizer.eos_token_id]}))
    model, _ = load(str(base), "AutoModelForCausalLM")
    assert model.generation_config.eos_token_id == [7, tokenizer.eos_token_id], "others that end a text are kept"


def test_an_end_token_that_also_pads_learns_from_being_read(save_family):
    folder = save_family("LlamaForCausalLM", pad_token_id=None)
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = models.build_model(PretrainedModel(type="pretrained", path=folder), tokenizer, "AutoModelForCausalLM", None)
    model(input_ids=torch.tensor([[tokenizer.eos_token_id, 5]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0
    assert model.config.pad_token_id == tokenizer.eos_token_id


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_classifier_keeps_which_answer_is_which(save_family, name):
    sizes = {**_SIZES, "max_position_embeddings": 64}
    folder = save_family(name, **sizes, num_labels=3, id2label={0: "verb", 1: "noun", 2: "other"})
    if name.startswith("Bert"):
        train_tokenizer(TEXTS, 300, 64, architecture="encoder").save_pretrained(folder)
    reference = getattr(transformers, name).from_pretrained(folder).eval()
    model, tokenizer = load(folder, "AutoModelForSequenceClassification", ["noun", "other", "verb"])
    batch = tokenizer(TEXTS[1], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reference(**batch).logits[:, [1, 2, 0]])
    assert model.config.id2label == {0: "noun", 1: "other", 2: "verb"}


def test_a_classifier_of_other_labels_is_refused(save_family):
    folder = save_family("BertForTokenClassification", **_SIZES, id2label={0: "O", 1: "B-PER"})
    with pytest.raises(BadInput, match=r"tells O, B-PER apart, but data\.label has B-LOC, O; use the model"):
        load(folder, "AutoModelForTokenClassification", ["B-LOC", "O"])


def test_a_head_of_another_task_is_replaced(save_family):
    folder = save_family("BertForSequenceClassification", **_SIZES, num_labels=5)
    model, _ = load(folder, "AutoModelForTokenClassification", ["B-LOC", "O"])
    assert model.classifier.weight.shape == (2, 32)


def test_a_language_model_without_its_head_is_refused(save_family):
    folder = save_family("BertModel", **_SIZES)
    with pytest.raises(BadInput, match=r"was saved without the head that this objective trains \(cls\.predictions\."):
        load(folder, "AutoModelForMaskedLM")
