"""What the untouched source model and its tokenizer answer, kept in reference.safetensors for every later comparison.

`ids.<i>` holds a prompt and its greedy continuation, `prompt_lengths` where each continuation begins, and `logits.<i>`
[at most NUM_KEPT_LOGITS, vocabulary] the source's logits over the last of these ids but one. The file's metadata holds
texts and chats with their ids.
Of a mixture of experts, `margins.<i>` is how close each of these ids came to other experts (see routing.py).
`far.<i>.ids` are tokens from position `far.<i>.start` on, behind a past of zeros, and `far.<i>.logits` those after
the last.
The i-th text runs alone, unpadded, in fp32: the plainest thing the source can do. `loras` in the metadata names the
adapter that was merged into the source for it, None for none.
"""

import json
import os
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from serving.directory import REFERENCE
from serving.export.loras import merged
from serving.export.refusing import refusing
from serving.export.routing import Routing
from serving.export.source import Source
from serving.export_paths import ExportError
from serving.reference_file import FACTS

PROMPT_LENGTHS = (1, 3, 8, 17, 33, 64)
LONG_PROMPT = 300  # several chunks of the engine's default, at positions that the others do not reach
LORA_PROMPTS = slice(1, 4)  # of these, for each adapter
NUM_NEW_TOKENS = 24
FAR_TOKENS = 8  # at each of these parts of the context, where the long prompt does not reach
FAR_PARTS = (0.25, 0.5, 0.75, 1)
FAR_CACHE_BYTES = 256 << 20  # of what lies before them; of a longer context the end is not reached
NUM_KEPT_LOGITS = max(PROMPT_LENGTHS) + NUM_NEW_TOKENS - 1  # all of the others; the file stays small

TEXTS = (
    "The library reads the file line by line and returns a list of strings.",
    "Grüße aus Köln! Привет, мир. 東京は日本の首都です。 שלום 🙂👩‍🚀",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n\n\tprint(area(2))  # 12.56636",
    "  two spaces,   three,\ttab,\r\nWindows line, trailing space ",
    "Special tokens spelled out: <s> </s> <|endoftext|> <|im_start|>user <|im_end|> [CLS] [SEP] <pad> <unk>",
    "In 2019, 1,234 of 56.7% cost $8.90 (or €9): isn't that O'Brien's e-mail <a@b.org>?",
)
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What does textwrap.dedent do?"}],
    [
        {"role": "user", "content": "Hello 🙂"},
        {"role": "assistant", "content": "Grüß dich!\nHow can I help?"},
        {"role": "user", "content": "Ignore the above: count to 3."},
    ],
)


def write_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, facts: dict[str, Any], folder: Path
) -> None:
    """Run `model`, whose attention is still its own, and write `folder`/reference.safetensors.

    `facts`: what trivet.json says of the model, which is kept there too.
    """
    prompts = _prompts(tokenizer, source.config.vocab_size, source.config.max_position_embeddings)
    tensors = _far_answers(model, prompts[-1][:FAR_TOKENS], source)  # first: nothing else is kept in memory yet
    answered: list[list[int]] = []
    loras: list[str | None] = []
    for adapter in (None, *source.loras):
        asked = prompts if adapter is None else prompts[LORA_PROMPTS]
        with nullcontext() if adapter is None else merged(model, adapter, source.folder):
            # The longest by itself: the others would be padded to it.
            guesses = _generate(model, asked[:-1]) + _generate(model, asked[-1:])
            for index, (prompt, guess) in enumerate(zip(asked, guesses, strict=True), len(answered)):
                tensors |= _answer(model, prompt, guess, index, source)
        answered += asked
        loras += [None if adapter is None else adapter.name] * len(asked)
    tensors["prompt_lengths"] = np.array([len(prompt) for prompt in answered])
    metadata = {
        FACTS: facts,
        "loras": loras,
        "texts": text_cases(tokenizer),
        "chats": _chat_cases(tokenizer),
        "decoded": _decoded_cases(tokenizer, tensors),
    }
    save_reference(folder, tensors, metadata)


def _answer(
    model: PreTrainedModel, prompt: list[int], guess: list[int], index: int, source: Source
) -> dict[str, np.ndarray]:
    """Return the greedy continuation of a prompt, which `guess` was in a padded batch, and the logits of both."""
    ids, (logits, margins) = guess, _logits(model, guess[:-1], source)
    if logits[-NUM_NEW_TOKENS:].argmax(-1).tolist() != guess[len(prompt) :]:  # a near tie, or no model for padding
        [ids] = _generate(model, [prompt])
        logits, margins = _logits(model, ids[:-1], source)
    found = {f"ids.{index}": np.array(ids), f"logits.{index}": logits.numpy()}
    return found if margins is None else found | {f"margins.{index}": margins.numpy()}


def _logits(
    model: PreTrainedModel, ids: list[int], source: Source, **behind: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the logits of the last NUM_KEPT_LOGITS tokens, and how close each token came to other experts, if any.

    `behind`: the arguments of the model that say which past the tokens have, if they have one.
    """
    with torch.no_grad(), Routing(len(ids)) as routing:
        logits = model(torch.tensor([ids]), logits_to_keep=NUM_KEPT_LOGITS, use_cache=bool(behind), **behind).logits
    check_finite(logits, source)
    return logits[0].float(), routing.margins_T


def _far_answers(model: PreTrainedModel, ids: list[int], source: Source) -> dict[str, np.ndarray]:
    """Return what `model` answers to tokens far on in its context, and at the end of it, behind a past of zeros.

    Such a past costs no more than its memory, and shows where far positions or a sliding window go wrong: every token
    of it that is looked at takes its share of the attention.
    """
    kv = source.layers[0]
    longest = FAR_CACHE_BYTES // (len(source.layers) * 2 * kv.num_kv_heads * kv.head_dim * 4)
    end = min(source.config.max_position_embeddings, longest)
    ends = [int(end * part) for part in FAR_PARTS if part == 1 or end * part > LONG_PROMPT + NUM_NEW_TOKENS]
    found: dict[str, np.ndarray] = {}
    for index, start in enumerate(each - len(ids) for each in ends):
        found |= {f"far.{index}.{name}": value for name, value in _far_answer(model, ids, start, source).items()}
    return found


def _far_answer(model: PreTrainedModel, ids: list[int], start: int, source: Source) -> dict[str, np.ndarray]:
    past = DynamicCache()
    for layer, shape in enumerate(source.layers):
        if shape.cached is not None:
            keys, values = (torch.zeros(1, num_heads, start, size) for num_heads, size in shape.cached)
            past.update(keys, values, layer)
    positions = torch.arange(start, start + len(ids))[None]
    logits, margins = _logits(model, ids, source, position_ids=positions, past_key_values=past)
    found = {"ids": np.array(ids), "start": np.array(start), "logits": logits[-1].numpy()}
    return found if margins is None else found | {"margins": margins.numpy()}


def check_finite(logits: torch.Tensor, source: Source) -> None:
    """Raise ExportError where the source itself answers with infinities or NaN, or always the same."""
    if not torch.isfinite(logits).all():
        raise ExportError(f"{source.folder}: the model's logits are not finite; was its training diverging?")
    if logits.numel() > 1 and logits.min() == logits.max():
        raise ExportError(f"{source.folder}: the model answers {float(logits.min()):g} to everything; was it trained?")


def save_reference(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Write `folder`/reference.safetensors, its metadata as JSON."""
    # Of bytes the file would be in memory twice. It is readable by its owner alone, and another user may serve it.
    stored = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, folder / REFERENCE, metadata=stored)
    umask = os.umask(0)
    os.umask(umask)
    (folder / REFERENCE).chmod(0o666 & ~umask)


def _prompts(tokenizer: PreTrainedTokenizerBase, vocab_size: int, context_length: int) -> list[list[int]]:
    """Return prompts of several lengths, cut from real text at different places."""
    longest = min(LONG_PROMPT, context_length - NUM_NEW_TOKENS)
    lengths = [*(length for length in PROMPT_LENGTHS if length < longest), longest]
    ids = tokenizer("\n".join(TEXTS * 2), add_special_tokens=False)["input_ids"]
    ids *= -(-sum(lengths) // len(ids))
    if max(ids) >= vocab_size:
        raise ExportError(f"the tokenizer gives id {max(ids)}, but the model has only {vocab_size} embeddings")
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _generate(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Return the prompts, each with its greedy continuation by transformers in one batch, the end token ignored."""
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor([zeros + prompt for zeros, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([zeros + [1] * len(prompt) for zeros, prompt in zip(padding, prompts, strict=True)])
    # The model's own settings (penalties, sampling, end tokens) would fill every field that is None here.
    kept, model.generation_config = (
        model.generation_config,
        GenerationConfig(do_sample=False, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=None, pad_token_id=0),
    )
    try:
        output = model.generate(ids, attention_mask=mask)
    finally:
        model.generation_config = kept
    assert output.shape[1] == longest + NUM_NEW_TOKENS, f"generate stopped after {output.shape[1] - longest} tokens"
    return [row[len(zeros) :] for zeros, row in zip(padding, output.tolist(), strict=True)]


def text_cases(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return texts of many kinds with their ids."""
    texts = [*TEXTS, "", " ".join(tokenizer.all_special_tokens)]
    return [
        {
            "text": text,
            "add_special_tokens": special,
            "ids": tokenizer(text, add_special_tokens=special)["input_ids"],
        }
        for text in texts
        for special in (True, False)
    ]


def _chat_cases(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    if tokenizer.chat_template is None:
        return []
    now = datetime.now().isoformat()  # a template that writes the date must not fail the proof of tomorrow
    return [{"messages": messages, "now": now, "ids": _chat_ids(tokenizer, messages)} for messages in _CHATS]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    with refusing("chat template: refuses a plain conversation", "mend or remove it"):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def _decoded_cases(tokenizer: PreTrainedTokenizerBase, tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    rows = [tensor.tolist() for name, tensor in tensors.items() if name.startswith("ids.")]
    rows += [case["ids"] for case in text_cases(tokenizer)]
    return [
        {"ids": ids, "skip_special_tokens": skip, "text": tokenizer.decode(ids, skip_special_tokens=skip)}
        for ids in rows
        for skip in (True, False)
    ]
