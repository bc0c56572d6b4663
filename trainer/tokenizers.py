"""Tokenizers: the model's own, or one trained on the run's own text.

Special tokens, chat template, padding side and longest length are decided here and saved with the model.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from serving.directory import BadInput
from trainer.config import NewModel, PretrainedModel, PretrainedTokenizer, RunConfig, TrainedTokenizer
from trainer.config.presets import Architecture
from trainer.vocabularies import ALGORITHMS, HAS_UNKNOWN, UNKNOWN

PAD, END = "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CLS, SEP = "[CLS]", "[SEP]"

# One end token closes documents in pre-training and turns in chats, so it is trained before a chat is ever seen.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_DECODER = {"pad_token": PAD, "eos_token": END}
# The separator also closes a text, for whoever asks for an end token.
_ENCODER = {"pad_token": "[PAD]", "cls_token": CLS, "sep_token": SEP, "mask_token": "[MASK]", "eos_token": SEP}
_LONGEST_WORD = 1000  # characters that a tokenizer is trained on as one piece
_ENDLESS = re.compile(rf"((?<!\S)\S{{{_LONGEST_WORD},}}|(?<!\s)\s{{{_LONGEST_WORD},}})")
# What models call a token that only pads, where their tokenizer does not say so; the end token is the last resort.
_PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


def train_for(section: TrainedTokenizer, model: NewModel, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a run trains on `texts` for its new model. Raises BadInput for texts without a word."""
    return train_tokenizer(
        texts,
        section.vocab_size,
        section.max_length or model.context_length,
        architecture=model.architecture,
        algorithm=section.algorithm,
        lowercase=section.lowercase,
        min_frequency=section.min_frequency,
    )


def load_for(config: RunConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a run loads. Raises BadInput where there is none, or it does not fit the objective."""
    section, model = config.tokenizer, config.model
    assert isinstance(section, PretrainedTokenizer), "the other type is trained"
    path, trusted = section.path, section.trust_remote_code
    if path is None:
        assert isinstance(model, PretrainedModel), "the config lets no new model be without a tokenizer"
        path, trusted = model.path, model.trust_remote_code
    tokenizer = load_tokenizer(path, section.chat_template, trust_remote_code=trusted)
    tokenizer.model_max_length = section.max_length or tokenizer.model_max_length
    if config.objective.type == "masked_lm" and tokenizer.mask_token_id is None:
        raise BadInput(
            f"tokenizer.path: the tokenizer at {path} has no mask token (mask_token), which masked_lm needs; use that "
            "of an encoder such as BERT"
        )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    max_length: int,
    *,
    architecture: Architecture = "decoder",
    algorithm: str = "bpe",
    lowercase: bool = False,
    min_frequency: int = 1,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most `vocab_size` entries, the same for the same texts, which are read once.

    A decoder's has an end token, which nothing adds by itself, and a chat template. An encoder's puts [CLS] and [SEP]
    around a text or a pair, whose second text has the token type 1. Raises BadInput for texts without a word.
    """
    texts = _without_endless_words(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise BadInput("tokenizer.type: train found, but the training rows hold no text; accepted: pretrained")
    named, roles = (_DECODER, ROLES) if architecture == "decoder" else (_ENCODER, [])
    if algorithm in HAS_UNKNOWN:
        named = {**named, "unk_token": UNKNOWN}
    learn = ALGORITHMS[algorithm]
    special = [*dict.fromkeys(named.values()), *roles]
    backend = learn(itertools.chain([first], texts), special, vocab_size, lowercase=lowercase, least=min_frequency)
    if architecture == "encoder":
        backend.post_processor = _enclose(backend)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=roles,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *(["token_type_ids"] if architecture == "encoder" else []), "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE if architecture == "decoder" else None
    return tokenizer


def load_tokenizer(
    path: str, chat_template: Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved at a folder or hub name, with a pad token (the end token where it has none).

    The Jinja file `chat_template`, if given, replaces its own. Raises BadInput if there is no tokenizer or no such
    file, or if it has no end token: without one a model never learns to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: the library in Rust raises a bare Exception for a broken file
        raise BadInput(_no_tokenizer(path, str(error))) from None
    if not tokenizer.is_fast:
        raise BadInput(
            f"tokenizer.path: the tokenizer at {path} is a {type(tokenizer).__name__} without a tokenizer.json, which "
            "training and serving read; use one that the tokenizers library can load"
        )
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        # transformers makes one up of the special tokens where the file is missing
        raise BadInput(_no_tokenizer(path, "it has no vocabulary; save the tokenizer into it with save_pretrained"))
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT and its kin close a text by it
    if tokenizer.eos_token_id is None:
        raise BadInput(f"tokenizer.path: the tokenizer at {path} has no end token (eos_token); add one to it")
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((name for name in _PADS if name in known), tokenizer.eos_token)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_template(tokenizer, chat_template)
    return tokenizer


def _without_endless_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut where letters or spaces go on and on (base64, one long line): BPE takes the square of the
    longest word in time, and nothing is learned from one that occurs once."""
    for text in texts:
        for part in _ENDLESS.split(text):
            size = _LONGEST_WORD if _ENDLESS.fullmatch(part) else len(part)
            yield from (part[start : start + size] for start in range(0, len(part), size or 1))


def num_entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs, so that every id has one (some vocabularies have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def keeps_pairs_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself puts a special token between the texts of a pair."""
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)


def _enclose(backend: Tokenizer) -> processors.TemplateProcessing:
    ids = [(token, backend.token_to_id(token)) for token in (CLS, SEP)]
    return processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids
    )


def _no_tokenizer(path: str, reason: str) -> str:
    if "trust_remote_code" in reason:
        reason = "it needs Python code that lies with it; if you trust it, set model.trust_remote_code=true"
    return f"tokenizer.path: no tokenizer can be loaded from {path} ({reason.strip().partition(chr(10))[0]})"


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"tokenizer.chat_template: {path}: cannot be read ({error}); mend it") from None
    if not text.strip():
        raise BadInput(f"tokenizer.chat_template: {path}: is empty; write the template, or leave the key out")
    return text


def _check_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise BadInput(
            f"tokenizer.chat_template: {path}: is no Jinja template (line {error.lineno}: {error.message}); mend it"
        ) from None
    except (TemplateError, TypeError):
        pass  # it may refuse this chat: what it says to the run's own chats counts
