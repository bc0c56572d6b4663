"""`trivet predict`: the label of one text, or of each row of a file."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from launch.output_file import writing
from serving import batch
from serving.directory import BadInput
from serving.tasks import Classifier


def predict(onnx_dir: Path, text: str | None, input: Path | None, output: Path | None, *, provider: str) -> int:
    """Classify one text or the rows of a file; each answer is a JSON row, in order.

    Returns 0, or 1 when the model failed on a row, which then has an `error` for its label.
    """
    if (text is None) == (input is None):
        raise BadInput("--text, --input: give exactly one of them")
    rows = [{"text": text}] if input is None else batch.read_rows(input, batch.check_text)
    num_failed, first = 0, ""
    with writing(output, input) as file:
        classifier = Classifier.open(onnx_dir, provider=provider)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("rows", total=len(rows))
            for answer in batch.predict(classifier, rows, on_finish=lambda done: progress.update(task, completed=done)):
                if "error" in answer:
                    num_failed, first = num_failed + 1, first or answer["error"]
                if input is None:
                    del answer["id"]
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    if num_failed:
        print(f"error: {num_failed} of {len(rows)} rows failed: {first}", file=sys.stderr)
    return 1 if num_failed else 0
