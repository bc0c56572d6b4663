"""Offline batches: rows of a JSONL file -> rows with the generated text or the answer, in the order of the input."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from serving.engine import Engine
from serving.request import QueueFull, Request, Sampling
from serving.tasks import TextTask
from serving.text import Text

Row = dict[str, Any]


class RowError(BadInput):
    """An input row that cannot be answered; says which one and why."""


def check_prompt(row: Row, where: str) -> None:
    """Raise RowError unless the row has a `prompt` or `messages`."""
    if not {"prompt", "messages"} & row.keys():
        raise RowError(f"{where}: has neither `prompt` nor `messages`; add one")
    if "messages" in row:
        _check_messages(row["messages"], where)
    elif not isinstance(row["prompt"], str):
        raise RowError(f"{where}: `prompt` is a {type(row['prompt']).__name__}; expected text")


def check_text(row: Row, where: str) -> None:
    """Raise RowError unless the row has a `text`, and maybe a `text_pair`."""
    if not isinstance(row.get("text"), str):
        found = f"`text` is a {type(row['text']).__name__}" if "text" in row else "has no `text`"
        raise RowError(f"{where}: {found}; expected the text to answer about in it")
    if not isinstance(pair := row.get("text_pair"), str | None):
        raise RowError(f"{where}: `text_pair` is a {type(pair).__name__}; expected the text that is judged with `text`")


def read_rows(path: Path, check: Callable[[Row, str], None] = check_prompt) -> list[Row]:
    """Return the rows of a JSONL file, each passed by `check`. Raises RowError naming the first bad line."""
    if path.suffix in (".csv", ".tsv", ".xlsx", ".parquet"):
        raise RowError(f'--input: {path} is a table; expected JSONL, an object such as {{"text": ...}} on each line')
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line separators as they are
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RowError(f"--input: {path} cannot be read ({why}); expected a UTF-8 JSONL file") from None
    rows = [
        _parse(line, f"--input: {path}, line {number}", check) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not rows:
        raise RowError(f"--input: {path} has no rows; expected one JSON object a line")
    return rows


def prompt_ids(row: Row, text: Text, *, prompts_are_chats: bool) -> list[int]:
    """Return the token ids of a row: `messages` through the chat template, `prompt` as a user's turn or plain."""
    if "messages" in row:
        return text.chat(row["messages"])
    if prompts_are_chats:
        return text.chat([{"role": "user", "content": row["prompt"]}])
    return text.encode(row["prompt"])


def generate(
    engine: Engine,
    text: Text,
    rows: list[Row],
    sampling: Sampling,
    *,
    prompts_are_chats: bool,
    lora: str | None = None,
    on_finish: Callable[[int], None] | None = None,
) -> Iterator[Row]:
    """Decode all rows in continuous batches; yield `{id, text, finish_reason, ..._tokens}` in the order of the rows.

    `lora` names the adapter that answers. `on_finish` is called with the number of finished rows whenever that grows. A
    row that the model failed on becomes `{id, error}`. Raises RowError before any decoding if a row cannot run.
    """
    requests = []
    for number, row in enumerate(rows, 1):
        try:
            ids = prompt_ids(row, text, prompts_are_chats=prompts_are_chats)
            engine.check(request := Request(str(row.get("id", number)), ids, sampling, lora))
        except BadInput as error:
            raise RowError(f"row {number}: {error}") from None
        requests.append(request)
    _run(engine, requests, on_finish or (lambda finished: None))
    for row, request in zip(rows, requests, strict=True):
        row_id = row.get("id", request.id)
        if request.error:
            yield {"id": row_id, "error": request.error}
            continue
        yield {
            "id": row_id,
            "text": text.decode(request.output_ids),
            "finish_reason": request.finish_reason,
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(request.output_ids),
        }


def predict(task: TextTask, rows: list[Row], *, on_finish: Callable[[int], None] | None = None) -> Iterator[Row]:
    """Answer all rows one by one; yield `{id, ...}` with the answer of the task in the order of the rows.

    `on_finish` is called with the number of finished rows. A row that the model failed on becomes `{id, error}`.
    Raises RowError before any answer if a row is nothing that the model can be asked.
    """
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(task.encode(row["text"], row.get("text_pair")))
        except BadInput as error:
            raise RowError(f"row {number}: {error}") from None
    for number, (row, question) in enumerate(zip(rows, questions, strict=True), 1):
        try:
            answer = task.answer(question)
        except FloatingPointError as error:
            answer = {"error": str(error)}
        yield {"id": row.get("id", str(number)), **answer}
        if on_finish is not None:
            on_finish(number)


def _run(engine: Engine, requests: list[Request], on_finish: Callable[[int], None]) -> None:
    waiting = list(reversed(requests))
    finished = 0
    while waiting or not engine.idle:
        while waiting:
            try:
                engine.add(waiting[-1])
            except QueueFull:
                break
            waiting.pop()
        done = sum(request.is_finished for request in engine.step())
        if done:
            finished += done
            on_finish(finished)


def _parse(line: str, where: str, check: Callable[[Row, str], None]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: not JSON ({error}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise RowError(f"{where}: is a {type(row).__name__}; expected an object, {{...}}")
    check(row, where)
    return row


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RowError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                raise RowError(f"{where}: a message's `{key}` is {found}; expected text")
