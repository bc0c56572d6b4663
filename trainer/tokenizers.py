"""Tokenizers: the model's own, or a byte-level BPE trained on the run's own text.

Special tokens, chat template, padding side and longest length are decided here and saved with the model.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from serving.directory import BadInput

PAD, END = "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

# One end token closes documents in pre-training and turns in chats, so it is trained before a chat is ever seen.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `vocab_size` entries: any text round-trips, there is no unknown token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=ROLES,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(path: str, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved at a folder or hub name, with a pad token (the end token where it has none).

    The Jinja file `chat_template`, if given, replaces its own. Raises BadInput if there is no tokenizer or no such
    file, or if it has no end token: without one a model never learns to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"tokenizer.path: no tokenizer can be loaded from {path} ({_first_line(error)})") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT and its kin close a text by it
    if tokenizer.eos_token_id is None:
        raise BadInput(f"tokenizer.path: the tokenizer at {path} has no end token (eos_token); add one to it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"tokenizer.chat_template: {chat_template}: cannot be read ({error}); mend it") from None
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
