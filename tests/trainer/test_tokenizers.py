"""Tokenizers: special tokens, template, padding side and length are decided once and come back from what is saved."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from serving.directory import BadInput
from serving.text import Text
from trainer import build
from trainer.objectives.sft import encode_chat
from trainer.tokenizers import END, PAD, load_tokenizer, train_tokenizer
from trainer.vocabularies import ALGORITHMS

TEXTS = ["The quick brown fox returns a list of lines.", "It has read every file, don't ask; naïve café 123."] * 5
CHAT = [{"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "The quick\nfox."}]
SAMPLES = [*TEXTS[:2], "two  spaces\n\tand 日本語 🦊", f"written out: {END} [SEP] [MASK] <|user|>", ""]


@pytest.fixture(params=[(architecture, name) for architecture in ("decoder", "encoder") for name in ALGORITHMS])
def trained(request, tmp_path):
    """A trained tokenizer, and the folder it was saved to beside the config.json of such a model."""
    architecture, algorithm = request.param
    tokenizer = train_tokenizer(TEXTS, 350, 64, architecture=architecture, algorithm=algorithm)
    tokenizer.save_pretrained(tmp_path)
    (LlamaConfig() if architecture == "decoder" else BertConfig()).save_pretrained(tmp_path)
    return tokenizer, tmp_path


def test_a_trained_tokenizer_comes_back_as_it_was(trained):
    tokenizer, folder = trained
    for again in (AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))):
        assert [again(text).data for text in SAMPLES] == [tokenizer(text).data for text in SAMPLES]
        assert again("a text", "another").data == tokenizer("a text", "another").data
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.chat_template == tokenizer.chat_template
        assert (again.padding_side, again.model_max_length) == ("right", 64)


def test_serving_reads_a_trained_tokenizer_as_transformers_does(trained):
    tokenizer, folder = trained
    text = Text.open(folder)
    for sample in SAMPLES:
        ids = tokenizer(sample)["input_ids"]
        assert text.encode(sample) == ids
        assert text.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert text.has_chat_template == bool(tokenizer.chat_template)
    if tokenizer.chat_template:
        assert text.chat(CHAT[:1]) == tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_decoder_has_an_end_token_that_nothing_adds_and_no_begin_token(algorithm):
    tokenizer = train_tokenizer(TEXTS, 350, 64, algorithm=algorithm)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (PAD, END, None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("fox")["input_ids"])[-1] != END
    assert "token_type_ids" not in tokenizer("fox")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_trained_chat_template_trains_the_answer_and_its_end(algorithm):
    tokenizer = train_tokenizer(TEXTS, 350, 64, algorithm=algorithm)
    ids, learned = encode_chat(CHAT, tokenizer)
    assert ids[learned][-1] == tokenizer.eos_token_id
    assert "".join(tokenizer.decode(ids[learned]).split()) == f"Thequickfox.{END}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_encoder_closes_texts_and_tells_those_of_a_pair_apart(algorithm):
    tokenizer = train_tokenizer(TEXTS, 350, 64, architecture="encoder", algorithm=algorithm)
    pair = tokenizer("fox", "list")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    middle = tokens.index("[SEP]")
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    assert pair["token_type_ids"] == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)
    assert tokenizer.convert_ids_to_tokens(tokenizer("[MASK]")["input_ids"]) == ["[CLS]", "[MASK]", "[SEP]"]
    assert (tokenizer.mask_token, tokenizer.pad_token_id, tokenizer.chat_template) == ("[MASK]", 0, None)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_without_text_train_no_tokenizer(texts, algorithm):
    with pytest.raises(BadInput, match=r"^tokenizer\.type: train found, but the training rows hold no text"):
        train_tokenizer(iter(texts), 350, 64, algorithm=algorithm)


@pytest.mark.parametrize(
    ("objective", "algorithm"),
    [("sft", "unigram"), ("sft", "wordpiece"), ("causal_lm", "wordlevel"), ("masked_lm", "wordpiece")],
)
def test_the_model_directory_holds_the_tokenizer_that_the_run_trained(
    make_config, data_files, parts_of, objective, algorithm
):
    rows = data_files["causal_lm" if objective == "masked_lm" else objective]
    values = make_config("sft", "scratch", run={"steps": 1}, tokenizer={"algorithm": algorithm}).model_dump(mode="json")
    if objective == "masked_lm":
        values["model"] |= {"architecture": "encoder", "num_kv_heads": 4}
    config = type(make_config()).model_validate({**values, "objective": {"type": objective}, "data": rows})
    tokenizer = parts_of(config).tokenizer
    again = AutoTokenizer.from_pretrained(config.run.folder / "model")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert again.model_max_length == 64
    text = Text.open(config.run.folder / "model")
    assert [text.encode(sample) for sample in SAMPLES] == [again(sample)["input_ids"] for sample in SAMPLES]


def test_the_longest_text_is_what_the_config_says(make_config):
    config = make_config("causal_lm", "scratch", tokenizer={"max_length": 50})
    assert build.build(config).tokenizer.model_max_length == 50
    with pytest.raises(ValueError, match=r"batch\.max_length 48 is longer than tokenizer\.max_length 40"):
        make_config("causal_lm", "scratch", tokenizer={"max_length": 40})


# --- tokenizers that exist -------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a word-level tokenizer with the given special tokens, and returns its folder."""

    def run(words: str = "the fox", **special: str) -> Path:
        vocabulary = {word: number for number, word in enumerate(["<unk>", *words.split(), *special.values()])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "tok")
        return tmp_path / "tok"

    return run


@pytest.mark.parametrize(
    ("special", "words", "pad"),
    [
        ({"eos_token": "<end>", "pad_token": "<own>"}, "the fox", "<own>"),
        ({"eos_token": "<end>"}, "the fox", "<end>"),  # as GPT-2
        ({"eos_token": "<end>"}, "the <|finetune_right_pad_id|>", "<|finetune_right_pad_id|>"),  # as Llama 3
        ({"sep_token": "[SEP]", "pad_token": "[PAD]"}, "the fox", "[PAD]"),  # as BERT
    ],
)
def test_a_pad_token_is_its_own_or_one_made_for_it_or_the_end_token(save, special, words, pad):
    tokenizer = load_tokenizer(str(save(words, **special)))
    assert tokenizer.pad_token == pad
    assert tokenizer.eos_token == special.get("eos_token", "[SEP]")
    assert tokenizer.padding_side == "right"


def test_a_tokenizer_without_an_end_token_is_refused(save):
    with pytest.raises(BadInput, match=r"^tokenizer\.path: .* has no end token \(eos_token\); add one to it$"):
        load_tokenizer(str(save(pad_token="<pad>")))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{broken"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{broken"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(save, file, text):
    folder = save(eos_token="<end>")
    (folder / file).write_text(text)
    with pytest.raises(BadInput, match=r"^tokenizer\.path: no tokenizer can be loaded from ") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_holds_no_tokenizer(tmp_path):
    with pytest.raises(BadInput, match=r"^tokenizer\.path: no tokenizer can be loaded from "):
        load_tokenizer(str(tmp_path))


def test_a_folder_whose_vocabulary_is_missing_holds_no_tokenizer(tmp_path):
    """Of its class alone transformers makes a tokenizer that knows the special tokens and nothing else."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(
        BadInput, match=r"^tokenizer\.path: no tokenizer can be loaded from .* \(it has no vocabulary; "
    ):
        load_tokenizer(str(tmp_path))


def test_masked_lm_needs_a_mask_token(make_config, base_model, data_files):
    values = make_config("causal_lm", "full").model_dump(mode="json")
    config = type(make_config()).model_validate({**values, "objective": {"type": "masked_lm"}})
    with pytest.raises(BadInput, match=r"^tokenizer\.path: .* has no mask token \(mask_token\), which masked_lm needs"):
        build.build(config)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}", r"is no Jinja template \(line 1: "),
        ("fine\n{{ messages[ }}", r"is no Jinja template \(line 2: "),
        (" \n", "is empty; write the template, or leave the key out"),
        (None, "cannot be read"),
    ],
)
def test_a_chat_template_that_does_not_parse_is_refused(save, tmp_path, template, said):
    file = tmp_path / "chat.jinja"
    if template is not None:
        file.write_text(template)
    with pytest.raises(BadInput, match=rf"^tokenizer\.chat_template: {file}: {said}"):
        load_tokenizer(str(save(eos_token="<end>")), file)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('start with the system') }}", "{{ messages[5].content + '!' }}{{ eos_token }}"]
)
def test_a_chat_template_may_refuse_a_chat_and_is_saved(save, tmp_path, template):
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    tokenizer = load_tokenizer(str(save(eos_token="<end>")), file)
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == template


def test_rows_longer_than_the_tokenizer_says_are_refused_unless_told_otherwise(make_config, base_model, tmp_path):
    folder = Path(shutil.copytree(base_model, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 40}))
    changes = {"model": {"path": str(folder)}}
    with pytest.raises(BadInput, match=r"^batch\.max_length: 48 found; the tokenizer says .* at most 40; lower it"):
        build.build(make_config("causal_lm", "full", **changes))
    built = build.build(make_config("causal_lm", "full", **changes, tokenizer={"type": "pretrained", "max_length": 64}))
    assert built.tokenizer.model_max_length == 64


def test_words_without_an_end_are_cut_for_learning_and_other_texts_are_learned_as_they_are(monkeypatch):
    given: list[str] = []
    learn = ALGORITHMS["bpe"]

    def listen(texts, *rest, **settings):
        return learn([given.append(text) or text for text in texts], *rest, **settings)

    monkeypatch.setitem(ALGORITHMS, "bpe", listen)
    texts = ["a list of lines", " \n", "x" * 999, f"a {'x' * 2500} b", " " * 1001 + "c"]
    train_tokenizer(texts, 300, 64)
    # BPE takes the square of the longest word in time: it would never be done with a line of some megabytes.
    cut = ["x" * 1000, "x" * 1000, "x" * 500]
    assert given == ["a list of lines", " \n", "x" * 999, "a ", *cut, " b", " " * 1000, " ", "c"]
