"""How many tokens a text has, by the tokenizer of the base model or by an estimate while that is not here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEMPLATE_TOKENS = 24  # what a chat template adds to a question and its answer, where it cannot be measured

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # which templates write
_END_TOKENS = 2  # of what the template adds after an answer


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of texts, or estimates them: `by` says how."""

    count: Callable[[list[str]], list[int]]
    by: str
    is_estimate: bool = False
    template_tokens: int = TEMPLATE_TOKENS


def estimate(ascii_per_token: float, tokens_per_other_byte: float) -> TokenCounter:
    """Return a counter by letters: so many of ASCII to a token, and so many tokens to a byte of other scripts."""

    def count(texts: list[str]) -> list[int]:
        return [
            max(1, round(_num_ascii(text) / ascii_per_token + _num_other_bytes(text) * tokens_per_other_byte))
            for text in texts
        ]

    return TokenCounter(
        count,
        by=f"an estimate, {ascii_per_token:g} bytes to a token ({1 / tokens_per_other_byte:.2g} outside of ASCII): the "
        f"model's tokenizer is not here yet",
        is_estimate=True,
    )


def tokenizer_counter(path: str, file: Path, template: Path | None, config: Path | None) -> TokenCounter:
    """Return a counter by a tokenizer.json, which knows what the chat template beside it adds, if one is there."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: list[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]

    settings = json.loads(config.read_text(encoding="utf-8")) if config else {}
    text = template.read_text(encoding="utf-8") if template else settings.get("chat_template")
    added = _template_tokens(file, text, settings) if isinstance(text, str) else TEMPLATE_TOKENS
    return TokenCounter(count, by=f"the tokenizer of {path}", template_tokens=added)


def _template_tokens(file: Path, template: str, settings: dict[str, object]) -> int:
    """Tokens that the template adds to a question and its answer: roles, ends, a system turn of its own."""
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    special = {name: value for name, value in settings.items() if name in _SPECIAL and isinstance(value, str)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=template, **special)
    try:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return TEMPLATE_TOKENS
    return len(tokenizer(asked, add_special_tokens=False)["input_ids"]) - 1 + _END_TOKENS


def _num_ascii(text: str) -> int:
    return len(text) if text.isascii() else sum(char.isascii() for char in text)


def _num_other_bytes(text: str) -> int:
    return 0 if text.isascii() else len(text.encode()) - _num_ascii(text)
