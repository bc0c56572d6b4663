"""`trivet generate`: one prompt, or the rows of a file."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from launch.output_file import writing
from serving import batch
from serving.directory import BadInput
from serving.engine import Engine
from serving.loras import lora_index
from serving.request import Request, Sampling
from serving.text import Text


def generate(
    onnx_dir: Path,
    prompt: str | None,
    input: Path | None,
    output: Path | None,
    *,
    sampling: Sampling,
    prompts_are_plain: bool,
    slots: int,
    provider: str,
    lora: str | None = None,
) -> int:
    """Answer one prompt (its text to standard output) or the rows of a file (JSONL rows, in order).

    Returns 0, or 1 when the model failed on a row, which then has an `error` for its text.
    """
    if (prompt is None) == (input is None):
        raise BadInput("--prompt, --input: give exactly one of them")
    rows = [{"prompt": prompt}] if input is None else batch.read_rows(input)
    with writing(output, input) as file:
        answers = _answers(
            onnx_dir, rows, sampling, lora, prompts_are_plain=prompts_are_plain, slots=slots, provider=provider
        )
        failed = [answer for answer in answers if "error" in answer]
        for answer in answers:
            is_text = input is None and "error" not in answer
            file.write((answer["text"] if is_text else json.dumps(answer, ensure_ascii=False)) + "\n")
    if input is None and not failed and not answers[0]["text"]:
        print("note: the model ended its answer at once, without a word", file=sys.stderr)
    _tell_cut(answers, sampling.max_new_tokens)
    if failed:
        print(f"error: {len(failed)} of {len(rows)} rows failed: {failed[0]['error']}", file=sys.stderr)
    return 1 if failed else 0


def _answers(
    onnx_dir: Path,
    rows: list[batch.Row],
    sampling: Sampling,
    lora: str | None,
    *,
    prompts_are_plain: bool,
    slots: int,
    provider: str,
) -> list[batch.Row]:
    """Return the answers; on a terminal, show how far they are: the tokens of one, the rows of several."""
    console, is_one = Console(stderr=True), len(rows) == 1
    with console.status("generate: loading the model") as status:

        def count(request: Request, _: np.ndarray) -> None:
            status.update(f"generate: {len(request.output_ids) + 1:,} tokens")

        observe = count if is_one and console.is_terminal else None
        engine = Engine.open(onnx_dir, provider=provider, slots=slots, observe=observe)
        lora_index(engine.manifest, lora)
        text = Text.open(onnx_dir)
        # One that Trivet went on training on plain text keeps its base's template, and has unlearned chats.
        is_chat_model = engine.manifest["source"].get("objective") in (None, "sft") and text.has_chat_template
        ask = partial(
            batch.generate, engine, text, rows, sampling,
            lora=lora, prompts_are_chats=is_chat_model and not prompts_are_plain,
        )  # fmt: skip
        if is_one:
            return list(ask())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("rows", total=len(rows))
        return list(ask(on_finish=lambda finished: progress.update(task, completed=finished)))


def _tell_cut(answers: list[batch.Row], max_new_tokens: int) -> None:
    """Say which answers ended for want of room, with fewer tokens than were asked for."""
    cut = [
        answer
        for answer in answers
        if answer.get("finish_reason") == "length" and answer["completion_tokens"] < max_new_tokens
    ]
    if not cut:
        return
    which = "the answer" if len(answers) == 1 else f"{len(cut)} of {len(answers)} answers"
    room = cut[0]["prompt_tokens"] + cut[0]["completion_tokens"]
    print(
        f"note: {which} ended before --max-new-tokens {max_new_tokens}: prompt and answer have room for {room} tokens "
        "together; shorten the prompt for a longer answer",
        file=sys.stderr,
    )
