"""What the quickstart measures: ONNX decoding beside transformers' generate, and a question to a real server."""

import json
import signal
import subprocess
import sys
import threading
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
from serving.request import Sampling
from serving.text import Text
from trainer import corpus

START_TIMEOUT_S = 60.0
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
                       "Prompts included; one timed pass after one to warm up.", [figure])  # fmt: skip


def compare_with_generate(
    model_dir: Path, onnx_dir: Path, num_prompts: int, num_new_tokens: int, advance: Advance
) -> Comparison:
    """Decode held-out prompts with the engine and with the untouched model; return what differed, and the speeds."""
    text = Text.open(onnx_dir)
    prompts = held_out_prompts(text, num_prompts)
    found = Comparison()
    engine = Engine.open(onnx_dir, slots=8)
    sampling = Sampling(max_new_tokens=num_new_tokens, ignore_end=True)
    total = num_prompts * num_new_tokens

    def by_engine() -> list[list[int]]:
        return [request.output_ids for request in engine.generate(prompts, sampling)]

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=num_new_tokens, eos_token_id=None, pad_token_id=0
    )
    systems: dict[str, Callable[[], list[list[int]]]] = {
        "trivet, continuous batches of 8": by_engine,
        "transformers generate, one by one": lambda: [generate(model, [prompt])[0] for prompt in prompts],
        "transformers generate, one padded batch of 16": lambda: generate(model, prompts),
    }
    outputs = {}
    for name, run in systems.items():
        advance(name)
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
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(ids, attention_mask=mask)[:, width:].tolist()


def held_out_prompts(text: Text, count: int) -> list[list[int]]:
    """Return half chats and half beginnings of documents, all held out, of different lengths."""
    questions = held_out_questions(count - len(_CODE_PROMPT_CHARS))
    documents = corpus.split(corpus.documents(corpus.read_items()))[1]
    long_enough = [row["text"] for row in documents if len(row["text"]) > max(_CODE_PROMPT_CHARS)]
    chats = [text.chat([{"role": "user", "content": question}]) for question in questions]
    assert len(long_enough) >= len(_CODE_PROMPT_CHARS), "the held-out part has too few long documents"
    pairs = zip(_CODE_PROMPT_CHARS, long_enough, strict=False)
    return chats + [text.encode(document[:length]) for length, document in pairs]


def held_out_questions(count: int) -> list[str]:
    """Return questions about held-out modules, spread over them."""
    rows = corpus.split(corpus.instructions(corpus.read_items()))[1]
    return [row["messages"][0]["content"] for row in rows[:: max(1, len(rows) // count)][:count]]


@dataclass(frozen=True)
class ServedAnswer:
    """What came back from a real server process, and how it ended."""

    text: str
    pieces: int
    first_s: float
    exit_code: int


def ask_server(onnx_dir: Path, question: str, advance: Advance) -> ServedAnswer:
    """Start `trivet serve` on a free port, ask one chat question through the openai client, streaming, and stop it."""
    from openai import OpenAI

    advance("starting")
    command = [sys.executable, "-m", "launch.cli", "serve", str(onnx_dir), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    too_late = threading.Timer(START_TIMEOUT_S, server.kill)
    too_late.start()
    try:
        client = OpenAI(base_url=f"{_url(server)}/v1", api_key="none", max_retries=0, timeout=START_TIMEOUT_S)
        advance("asking")
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            stream=True,
        )
        pieces, first_s = [], 0.0
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                first_s = first_s or time.perf_counter() - started
                pieces.append(event.choices[0].delta.content)
        advance("stopping")
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=START_TIMEOUT_S)
        return ServedAnswer("".join(pieces), len(pieces), first_s, server.returncode)
    finally:
        too_late.cancel()
        server.kill()
        server.wait()


def _url(server: subprocess.Popen[str]) -> str:
    """Wait for the line that says where the server listens."""
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("serving "):
            return line.split()[-1]
    raise RuntimeError(f"the server ended before it was ready: {''.join(lines)[-500:]}")


def read_result(run: Path) -> dict[str, Any]:
    """Return a run's result.json."""
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def verification_section(record: dict[str, Any]) -> Section:
    """Return the evidence of an export as a table."""
    title = f"Verified on {record['provider']}, onnxruntime {record['onnxruntime']}"
    return Section(title, ["check", "evidence", "passed"], check_rows(record))
