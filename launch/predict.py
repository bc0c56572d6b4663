"""`trivet predict`: the answer to one text, or to each row of a file."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from launch.output_file import writing
from serving import batch
from serving.directory import BadInput
from serving.tasks import MaskFiller, TextTask, open_task


def predict(
    onnx_dir: Path,
    text: str | None,
    input: Path | None,
    output: Path | None,
    *,
    provider: str,
    text_pair: str | None = None,
    top_k: int | None = None,
) -> int:
    """Answer about one text, or a pair of them, or the rows of a file; each answer is a JSON row, in order.

    Returns 0, or 1 when the model failed on a row, which then has an `error` for its answer.
    """
    if (text is None) == (input is None):
        raise BadInput("--text, --input: give exactly one of them")
    if text_pair is not None and text is None:
        raise BadInput("--text-pair: goes with --text; in a file it is each row's `text_pair`")
    rows = [{"text": text, "text_pair": text_pair}] if input is None else batch.read_rows(input, batch.check_text)
    num_failed, first = 0, ""
    with writing(output, input) as file:
        task = _opened(onnx_dir, top_k, provider=provider)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("rows", total=len(rows))
            for answer in batch.predict(task, rows, on_finish=lambda done: progress.update(bar, completed=done)):
                if "error" in answer:
                    num_failed, first = num_failed + 1, first or answer["error"]
                if input is None:
                    del answer["id"]
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    if num_failed:
        print(f"error: {num_failed} of {len(rows)} rows failed: {first}", file=sys.stderr)
    return 1 if num_failed else 0


def _opened(onnx_dir: Path, top_k: int | None, **settings: Any) -> TextTask:
    task = open_task(onnx_dir, **settings)
    if top_k is not None:
        if not isinstance(task, MaskFiller):
            raise BadInput(f"--top-k: {top_k} found, but the task of {onnx_dir} is {task.task}; it is for masked_lm")
        task.top_k = top_k
    return task
