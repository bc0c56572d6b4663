"""Supervised fine-tuning on chats: by the tokenizer's template, loss on the assistant's turns and their end only."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer.columns import Messages, chat_of, place
from trainer.objectives.causal_lm import CausalLMObjective
from trainer.packing import IGNORED, Encoded, Example
from trainer.sources import DataError


class SFTObjective(CausalLMObjective):
    loses_rest = True

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise BadInput("tokenizer: has no chat template; sft needs one: use the tokenizer of a chat model")

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        for index, row in enumerate(rows):
            yield "\n".join(turn["content"] for turn in chat_of(row, index, self.columns))

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> Encoded:
        """Chats longer than `max_length` are cut; one that keeps no assistant token is left out."""
        self.use(tokenizer)
        examples = Encoded()
        for index, row in enumerate(rows, first):
            messages = chat_of(row, index, self.columns)
            try:
                ids, trained = encode_chat(messages, tokenizer)
            except TemplateError as error:
                raise DataError(f"data: {place(row, index)}: the chat template refuses it ({error}); mend it") from None
            except BadInput as error:
                raise BadInput(f"{error} (seen at {place(row, index)})") from None
            targets = np.where(trained[1:], ids[1:], IGNORED)[:max_length]
            if (targets != IGNORED).any():
                examples.append(Example(ids[:-1][:max_length], targets))
            else:
                examples.left_out += 1
        return examples

    def why_left_out(self, max_length: int) -> str:
        return f"the assistant says nothing within their first {max_length} tokens; raise batch.max_length to learn it"

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"batch.max_length: no chat keeps an assistant token within {max_length} tokens; raise it"


def encode_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of a chat, shape [T], and which of them the assistant says (its end token too), shape [T].

    A token that joins the end of a prompt with the start of an answer (white space does) counts as the prompt's.
    Raises BadInput where the template is not prefix-preserving (a later turn changes earlier text: no mask can then
    say who said what) or a turn of the assistant does not end in the tokenizer's end token (it would never stop).
    """
    text = _render(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int32)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])  # in characters of the text
    trained = np.zeros(len(ids), bool)
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, add_generation_prompt=True)
        said = _render(messages[: i + 1], tokenizer)
        if not said.startswith(prompt) or not text.startswith(said):
            raise BadInput(
                "tokenizer: its chat template is not prefix-preserving, so assistant turns cannot be masked; set "
                "tokenizer.chat_template to one that only appends"
            )
        inside = (starts >= len(prompt)) & (starts < len(said))
        ends = np.flatnonzero(inside & (ids == tokenizer.eos_token_id))
        if not len(ends):
            raise BadInput(
                f"tokenizer: its chat template does not end a turn with {tokenizer.eos_token!r} (eos_token); set "
                "tokenizer.chat_template to one that does"
            )
        trained |= inside & (np.arange(len(ids)) <= ends[-1])
    return ids, trained


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
