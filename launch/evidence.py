"""What the quickstart measures: ONNX decoding beside transformers' generate, and answers before and after tuning."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from launch.export import check_rows
from launch.report import Section
from launch.report_plots import bar_plot
from serving.engine import NEAR_TIE, Engine
from serving.export.trace import quiet
from serving.request import Sampling
from serving.text import Text
from trainer import corpus
from trainer.tokenizers import load_tokenizer

ANSWER_TOKENS = 48
_CODE_PROMPT_CHARS = (40, 90, 160, 250, 350, 460, 580, 700)

Advance = Callable[[str], None]


@dataclass
class Comparison:
    """Engine against `generate` on the same prompts: which tokens, how fast."""

    rows: list[list[str]] = field(default_factory=list)
    num_equal: int = 0
    mismatches: list[str] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    near_ties: int = 0
    tokens_per_s: dict[str, float] = field(default_factory=dict)

    def section(self) -> Section:
        note = f"Greedy, fp32, end token ignored. Near ties (best two logits within {NEAR_TIE:g}): {self.near_ties}."
        return Section("Decoded against transformers' generate", ["prompt tokens", "prompt ends in", "output", "equal"],
                       self.rows, note)  # fmt: skip

    def speed_section(self) -> Section:
        rows = [[name, f"{speed:,.0f}"] for name, speed in self.tokens_per_s.items()]
        figure = bar_plot("Decoding speed", list(self.tokens_per_s.items()), x="new tokens/s")
        return Section("Decoding speed, this machine, this run", ["system", "new tokens/s"], rows,
                       "Prompts included; one timed pass, not repeated.", [figure])  # fmt: skip


def compare_with_generate(
    model_dir: Path, onnx_dir: Path, num_prompts: int, num_new_tokens: int, advance: Advance, *, warm_up: bool = True
) -> Comparison:
    """Decode held-out prompts with the engine and with the untouched model; return what differed, and the speeds."""
    text = Text.open(onnx_dir)
    engine = Engine.open(onnx_dir, slots=8)
    prompts = [prompt[: engine.max_length - num_new_tokens] for prompt in held_out_prompts(text, num_prompts)]
    found = Comparison()
    sampling = Sampling(max_new_tokens=num_new_tokens, ignore_end=True)
    total = num_prompts * num_new_tokens

    def by_engine() -> list[list[int]]:
        return [request.output_ids for request in engine.generate(prompts, sampling)]

    model = _load(str(model_dir), num_new_tokens, end=None)
    systems: dict[str, Callable[[], list[list[int]]]] = {
        "trivet, continuous batches of 8": by_engine,
        "transformers generate, one by one": lambda: [generate(model, [prompt])[0] for prompt in prompts],
        f"transformers generate, one padded batch of {num_prompts}": lambda: generate(model, prompts),
    }
    outputs = {}
    for name, run in systems.items():
        advance(name)
        if warm_up:
            run()
        started = time.perf_counter()
        outputs[name] = run()
        found.tokens_per_s[name] = total / (time.perf_counter() - started)
    ours, theirs, _ = outputs.values()
    for i, (prompt, output, expected) in enumerate(zip(prompts, ours, theirs, strict=True)):
        _compare(found, model, i, prompt, output, expected)
        shown = [
            str(len(prompt)),
            text.decode(prompt)[-60:],
            text.decode(output),
            "yes" if output == expected else "NO",
        ]
        found.rows.append(shown)
        found.num_equal += output == expected
    return found


def _compare(
    found: Comparison, model: PreTrainedModel, i: int, prompt: list[int], output: list[int], expected: list[int]
) -> None:
    if len(set(output)) == 1:
        found.repeats.append(i)
    at = next((at for at, pair in enumerate(zip(output, expected, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return
    with torch.no_grad():
        best = model(torch.tensor([prompt + expected[:at]])).logits[0, -1].topk(2).values
    margin = float(best[0] - best[1])
    if margin < NEAR_TIE:
        found.near_ties += 1
    else:
        found.mismatches.append(f"prompt {i} at token {at} (margin {margin:.1e})")


def generate(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Return transformers' greedy continuations of the prompts, left-padded into one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    return model.generate(ids, attention_mask=mask)[:, width:].tolist()


def answers(model: str, chat_template: Path | None, questions: list[str], advance: Advance) -> list[str]:
    """Return the greedy answers of a model (a folder or hub name) to single questions, by transformers."""
    tokenizer = load_tokenizer(model, chat_template)
    loaded = _load(model, ANSWER_TOKENS, end=tokenizer.eos_token_id)
    found = []
    for question in questions:
        advance(question[:40])
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        answer = generate(loaded, [ids[-_room_for_prompt(loaded) :]])[0]
        found.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return found


def _room_for_prompt(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", 2048) - ANSWER_TOKENS


def _load(model: str, num_new_tokens: int, *, end: int | None) -> PreTrainedModel:
    """Return a model in fp32 that decodes greedily, whatever its own settings say."""
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    loaded.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=num_new_tokens, eos_token_id=end, pad_token_id=0
    )
    return loaded


def held_out_prompts(text: Text, count: int) -> list[list[int]]:
    """Return half chats and half beginnings of documents, all held out, of different lengths."""
    lengths = _CODE_PROMPT_CHARS[:: 2 * len(_CODE_PROMPT_CHARS) // count]
    questions = held_out_questions(count - len(lengths))
    documents = corpus.split(corpus.documents(corpus.read_items()))[1]
    long_enough = [row["text"] for row in documents if len(row["text"]) > max(_CODE_PROMPT_CHARS)]
    chats = [text.chat([{"role": "user", "content": question}]) for question in questions]
    assert len(long_enough) >= len(lengths), "the held-out part has too few long documents"
    pairs = zip(lengths, long_enough, strict=False)
    return chats + [text.encode(document[:length]) for length, document in pairs]


def held_out_questions(count: int) -> list[str]:
    """Return questions about held-out modules, spread over them."""
    rows = corpus.split(corpus.instructions(corpus.read_items()))[1]
    return [row["messages"][0]["content"] for row in rows[:: max(1, len(rows) // count)][:count]]


def read_result(run: Path) -> dict[str, Any]:
    """Return a run's result.json."""
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def verification_section(record: dict[str, Any]) -> Section:
    """Return the evidence of an export as a table."""
    title = f"Verified on {record['provider']}, onnxruntime {record['onnxruntime']}"
    return Section(title, ["check", "evidence", "passed"], check_rows(record))
