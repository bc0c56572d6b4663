"""Text to token ids and back, as transformers does it, without transformers: `tokenizers` plus a sandboxed template."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from serving.chat_template import ChatTemplate
from serving.directory import BadInput

# Unicode noncharacters: no text can mean anything by them, so they can bracket what a user wrote.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_REPLACEMENT = "\ufffd"


class Text:
    """The tokenizer and the chat template of one model directory. Safe to use from several threads."""

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._json = tokenizer_json
        self._cut_side = config.get("truncation_side", "right")
        self._tokenizer = _load(tokenizer_json)
        self.chat_template_sha256 = (
            None if chat_template is None else hashlib.sha256(chat_template.encode()).hexdigest()
        )
        self._template = None if chat_template is None else ChatTemplate(chat_template, _named_tokens(config))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marked = re.compile(f"{_OPEN}({self._special.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    @classmethod
    def open(cls, folder: Path) -> "Text":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of `folder`. Raises BadInput."""
        folder = Path(folder)
        try:
            config = json.loads(_read(folder / "tokenizer_config.json") or "{}")
            if not isinstance(config, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise BadInput(f"{folder}/tokenizer_config.json: not JSON ({error}); export the model again") from None
        tokenizer_json = _read(folder / "tokenizer.json")
        if tokenizer_json is None:
            raise BadInput(f"{folder}: has no tokenizer.json; export the model again, with its tokenizer")
        return cls(tokenizer_json, config, _read(folder / "chat_template.jinja") or _inline_template(config))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """The number of ids that the tokenizer knows, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written out in it are taken as such, like transformers does."""
        return self._encode(self._tokenizer, text, add_special_tokens)

    def encode_cut(self, text: str, max_length: int) -> tuple[list[int], bool]:
        """Return at most `max_length` ids of `text`, the special tokens around it kept, and whether it was cut.

        Like transformers with `truncation=True, max_length=...`.
        """
        ids, _, is_cut = self.encode_pair(text, None, max_length)
        return ids, is_cut

    def encode_pair(self, text: str, pair: str | None, max_length: int) -> tuple[list[int], list[int], bool]:
        """Return `encode_cut` of a text or of two, with the number of the text (0 or 1) that each id is of between.

        Of two that are too long together the longer is cut first.
        """
        texts = [each for each in (text, pair) if each is not None]
        encodings = [self._encoding(self._tokenizer, each, add_special_tokens=False) for each in texts]
        room = max(max_length - self._tokenizer.num_special_tokens_to_add(is_pair=pair is not None), 0)
        lengths = _cut_lengths([len(each.ids) for each in encodings], room)
        is_cut = any(len(each.ids) > length for each, length in zip(encodings, lengths, strict=True))
        for encoding, length in zip(encodings, lengths, strict=True):
            encoding.truncate(length, direction=self._cut_side)
        whole = self._tokenizer.post_process(encodings[0], encodings[1] if pair is not None else None)
        return whole.ids, whole.type_ids, is_cut

    def encode_windows(self, text: str, max_length: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return all ids of `text` in pieces of at most `max_length`, each with its special tokens around it and with
        the characters of `text` that each id stands for; no piece where there is no id.
        """
        encoding = self._encoding(self._tokenizer, text, add_special_tokens=False)
        room = max(max_length - self._tokenizer.num_special_tokens_to_add(is_pair=False), 1)
        encoding.truncate(room, direction=self._cut_side)
        pieces = [self._tokenizer.post_process(each) for each in (encoding, *encoding.overflowing)]
        return [(piece.ids, piece.offsets) for piece in pieces if piece.ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: list[dict[str, Any]], *, now: datetime | None = None) -> list[int]:
        """Return the prompt ids for a chat, up to where the assistant's answer begins.

        Equal to transformers' `apply_chat_template(..., add_generation_prompt=True)`, but for one thing: a special
        token that a message spells out is encoded as plain text (transformers' `sanitize_control_tokens=True`), so
        that nobody can end their own turn and speak as somebody else. `now` is what a template that writes the date
        takes for it. Raises BadInput.
        """
        if self._template is None:
            raise BadInput("messages: this model has no chat template; send a plain prompt (/v1/completions) instead")
        if not messages:
            raise BadInput("messages: the list is empty; give at least one message")
        return self._encode_marked(self._template.render([self._mark(message) for message in messages], now=now))

    def _mark(self, value: Any) -> Any:
        """Bracket the special tokens in a user's strings; drop keys without a value, which templates trip over."""
        if isinstance(value, str):
            return self._special.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self._mark(item) for key, item in value.items() if item is not None}
        if isinstance(value, list | tuple):
            return [self._mark(item) for item in value]
        return value

    def _encode_marked(self, rendered: str) -> list[int]:
        """Encode a rendered chat, what is bracketed as plain text.

        Single brackets, left by a template that takes text apart or sent by a user, are dropped; the text on their
        two sides is encoded apart, so that it cannot join into a special token.
        """
        pieces = self._marked.split(rendered)  # text, bracketed token or None, text, ...
        ids = self._encode(self._tokenizer, pieces[0], add_special_tokens=False)
        for index, piece in enumerate(pieces[1:], start=1):
            if not piece:
                continue
            is_bracketed = index % 2 == 1
            piece_ids = self._encode_inside(self._plain if is_bracketed else self._tokenizer, piece)
            if is_bracketed and self._special_ids[piece] in piece_ids:
                raise BadInput(f"messages: {piece} is a special token of this model and cannot be sent as text")
            ids += piece_ids
        return ids

    def _encode_inside(self, tokenizer: Tokenizer, piece: str) -> list[int]:
        """Encode a piece that follows other text: a start of its own would get SentencePiece's leading space."""
        newline_ids = self._encode(tokenizer, "\n", add_special_tokens=False)
        ids = self._encode(tokenizer, f"\n{piece}", add_special_tokens=False)
        if ids[: len(newline_ids)] == newline_ids:
            return ids[len(newline_ids) :]
        return self._encode(tokenizer, piece, add_special_tokens=False)

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        """A second tokenizer that takes special tokens for text. Built at need: the switch is not per call."""
        tokenizer = _load(self._json)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @classmethod
    def _encode(cls, tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        return cls._encoding(tokenizer, text, add_special_tokens).ids

    @staticmethod
    def _encoding(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Encoding:
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # what tokenizers makes of a string that is not UTF-8
            raise BadInput("text: holds half of a surrogate pair, which is no character; send valid Unicode") from None


class Stream:
    """Turns ids into text as they come. What `push` and `finish` return adds up to the decode of all the ids.

    Only text that later ids cannot change is returned: never half a character. A tokenizer's decoder looks back (a
    leading space is dropped at the start only), so each decode begins one emission earlier than it has to.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._num_context = 0  # how many of _ids were emitted already and are there to be looked back at
        self._num_sent = 0  # how many characters of the decode of _ids were emitted

    def push(self, token_id: int) -> str:
        """Take one more id; return the text that is now certain, often the empty string."""
        self._ids.append(token_id)
        decoded = self._text.decode(self._ids)
        certain = decoded.rstrip(_REPLACEMENT)  # the last bytes may still become a character
        piece = certain[self._num_sent :]
        if piece and len(certain) == len(decoded):
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._num_sent = len(self._text.decode(self._ids))
        else:
            self._num_sent += len(piece)
        return piece

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character, as U+FFFD."""
        piece = self._text.decode(self._ids)[self._num_sent :]
        self._num_sent += len(piece)
        return piece


def _cut_lengths(lengths: list[int], room: int) -> list[int]:
    """Return how much is left of one or two texts in `room` tokens, the longest cut first, as by tokenizers."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    shorter = min(lengths)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return [longer, shorter] if lengths[0] > lengths[1] else [shorter, longer]


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises bare Exception
        raise BadInput(f"tokenizer.json: cannot be read ({error}); export the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); export the model again") from None


def _inline_template(config: Mapping[str, Any]) -> str | None:
    """Older directories keep the template in tokenizer_config.json, sometimes several of them by name."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token ... as strings: in the file each is a string or an object with its `content`."""
    contents = {
        key: value.get("content") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: content for key, content in contents.items() if isinstance(content, str)}
