"""`trivet generate` and the key file of `trivet serve`."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from serving import batch
from serving.directory import BadInput
from serving.engine import Engine
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
) -> None:
    """Answer one prompt (its text to standard output) or the rows of a file (JSONL rows, in order)."""
    if (prompt is None) == (input is None):
        raise BadInput("--prompt, --input: give exactly one of them")
    if output is not None and not output.parent.is_dir():
        raise BadInput(f"--output: {output.parent}: no such folder; make it first")
    rows = [{"prompt": prompt}] if input is None else batch.read_rows(input)
    engine = Engine.open(onnx_dir, provider=provider, slots=slots)
    text = Text.open(onnx_dir)
    is_chat_model = engine.manifest["source"].get("objective") == "sft" and text.has_chat_template
    with Progress(console=Console(stderr=True), transient=True, disable=len(rows) == 1) as progress:
        task = progress.add_task("rows", total=len(rows))
        answers = batch.generate(
            engine, text, rows, sampling,
            prompts_are_chats=is_chat_model and not prompts_are_plain,
            on_finish=lambda finished: progress.update(task, completed=finished),
        )  # fmt: skip
        lines = [answer if input is not None else answer["text"] for answer in answers]
    _write(lines, output)


def _write(lines: list[Any], output: Path | None) -> None:
    whole = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    if output is None:
        sys.stdout.write(whole)
        return
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(whole, encoding="utf-8")
    partial.replace(output)


def read_keys(path: Path | None) -> list[str] | None:
    """Return the API keys in a file, one a line, blank lines apart. Raises BadInput if it is missing or holds none."""
    if path is None:
        return None
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--api-key-file: {path} cannot be read ({error.__class__.__name__}); check the path") from None
    if not keys:
        raise BadInput(f"--api-key-file: {path} holds no key; write one a line")
    return keys
