"""`trivet generate`: one prompt, or the rows of a file."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from launch.output_file import writing
from serving import batch
from serving.directory import BadInput
from serving.engine import Engine
from serving.loras import lora_index
from serving.request import Sampling
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
        engine = Engine.open(onnx_dir, provider=provider, slots=slots)
        lora_index(engine.manifest, lora)
        answers = _answer(engine, Text.open(onnx_dir), rows, sampling, lora, prompts_are_plain=prompts_are_plain)
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


def _answer(
    engine: Engine,
    text: Text,
    rows: list[batch.Row],
    sampling: Sampling,
    lora: str | None,
    *,
    prompts_are_plain: bool,
) -> list[batch.Row]:
    # One that Trivet went on training on plain text keeps its base's template, and has unlearned chats.
    is_chat_model = engine.manifest["source"].get("objective") in (None, "sft") and text.has_chat_template
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=len(rows) == 1 or not console.is_terminal) as progress:
        task = progress.add_task("rows", total=len(rows))
        answers = batch.generate(
            engine, text, rows, sampling,
            lora=lora,
            prompts_are_chats=is_chat_model and not prompts_are_plain,
            on_finish=lambda finished: progress.update(task, completed=finished),
        )  # fmt: skip
        return list(answers)


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
