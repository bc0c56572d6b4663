"""`trivet preview`: real batches of a run, coloured by what the loss does, and an error where that cannot be meant.

Needs the data and the tokenizer, not the model's weights. On a terminal the text is coloured; elsewhere each stretch
of one kind has a line of its own, as in `    learned | text`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from launch.preview_spans import LEGEND, Document, ShownRow, shown_rows
from serving.directory import BadInput
from trainer import audit, distributed, leaks
from trainer.audit import Batches, Examples
from trainer.config import PretrainedModel, PretrainedTokenizer, RunConfig
from trainer.dataset import Data, make_feed, prepare_data
from trainer.feed import Feed
from trainer.objectives import Objective

_STYLES = {"learned": "bold green", "context": "dim", "masked": "bold magenta", "padding": "on grey30"}
_LOSS_PER_TOKEN = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification")
_PER_TEXT = {
    "single_label_classification": "one label a row learned",
    "multi_label_classification": "of each row every label learned, as said or not",
    "regression": "one number a row learned",
}
_COUNTED_STEPS = 50  # batches are counted over an epoch, and at most so many steps


@dataclass(frozen=True)
class Previewed:
    """What a run learns from, without its model."""

    data: Data
    feed: Feed

    @property
    def objective(self) -> Objective:
        return self.data.objective

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.data.tokenizer


def preview(config: RunConfig, *, num_rows: int, step: int) -> int:
    """Print the first `num_rows` rows of the 1-based `step` and the counts of the data; return 0.

    Raises BadInput where the run would not start, and MaskFault where it would learn nothing, everything, or not to
    stop; what is printed before it shows where.
    """
    if step > config.run.steps:
        raise BadInput(f"--step: {step} found, but the run has {config.run.steps} steps (run.steps); take one of them")
    parts = _build(config)
    console = Console(soft_wrap=True, highlight=False)
    shown, batches = _go_through(parts, config, num_rows=num_rows, shown_step=step - 1)
    occurring = set().union(*(row.kinds for _, row in shown))
    for kind, meaning in LEGEND.items():
        if kind in occurring:
            console.print(Text("legend  ") + Text(kind, _STYLES[kind]) + Text(f" {meaning}"))
    for title, row in shown:
        _show(console, row, title)
    examples = audit.count_examples(parts.objective, parts.data.splits.train, parts.tokenizer, config.batch.max_length)
    for line in _summary(parts, config, examples, batches):
        console.print(Text(line))
    audit.check(parts.objective, examples, batches, parts.tokenizer)
    return 0


def _build(config: RunConfig) -> Previewed:
    _check_tokenizer_is_there(config)
    data = prepare_data(config)
    return Previewed(data, make_feed(config, data, distributed.start(config)))


def _check_tokenizer_is_there(config: RunConfig) -> None:
    model, tokenizer = config.model, config.tokenizer
    own = isinstance(tokenizer, PretrainedTokenizer) and tokenizer.path is None
    if own and isinstance(model, PretrainedModel) and model.made_by is not None and not Path(model.path).is_dir():
        raise BadInput(
            f"model.path: {model.path} is not there yet, and its tokenizer comes with it; `trivet train` with this "
            f"config makes it first ({model.made_by})"
        )


def _go_through(
    parts: Previewed, config: RunConfig, *, num_rows: int, shown_step: int
) -> tuple[list[tuple[str, ShownRow]], Batches]:
    """Return the first rows of a 0-based step with a title each, and the counts of the first epoch, or of some steps.

    One pass over the steps, in their order: streams are read in no other.
    """
    feed, total = parts.feed, Batches()
    shown: list[tuple[str, ShownRow]] = []
    epoch = -(-len(feed.train) // config.batch.rows)
    num_counted = min(epoch, config.run.steps, _COUNTED_STEPS)
    for step in range(max(num_counted, shown_step + 1)):
        number = 0
        for drawn, batch in zip(feed.parts_at(step), feed.micro_batches(step), strict=True):
            rows = [each.row for each in drawn]
            if step < num_counted:
                total += audit.count_batch(batch, rows, config.batch.max_length, parts.tokenizer.eos_token_id)
            if step == shown_step:
                for each, row in zip(drawn, shown_rows(batch, rows, parts.objective, parts.tokenizer), strict=True):
                    number += 1
                    if number <= num_rows:
                        shown.append((f"step {step + 1}, row {number} (row {each.place} of the data)", row))
    return shown, total


def _summary(parts: Previewed, config: RunConfig, examples: Examples, batches: Batches) -> Iterator[str]:
    length, objective = config.batch.max_length, parts.objective
    yield ""
    window = " in its first window" if parts.data.splits.streaming else ""
    more = f", counted on its first {audit.MOST_ROWS:,} rows" if examples.data_rows == audit.MOST_ROWS else ""
    yield (
        f"data      {examples.data_rows:,} training rows{more}: {examples.examples:,} examples of "
        f"{examples.tokens:,} tokens; {len(parts.feed.train):,} rows of a batch{window}"
    )
    for line in parts.data.left_out(config) or ["nothing"]:
        yield f"left out  {line.removeprefix('left out ')}"
    if parts.data.splits.leaks:
        yield f"leaks     {leaks.tell(parts.data.splits.leaks)}"
    if not examples.longer:
        yield f"cut       nothing: no example is longer than batch.max_length {length}"
    elif not examples.are_cut:
        yield f"cut       nothing: {examples.longer:,} texts longer than batch.max_length {length} go on in other rows"
    for remark in audit.remarks(objective, examples, length):
        yield f"note      {remark}"
    per_token = objective.head in _LOSS_PER_TOKEN
    learned = (
        f"{batches.learned / batches.tokens:.1%} of tokens learned"
        if per_token
        else _PER_TEXT[objective.problem_type or "single_label_classification"]
    )
    packed = f", rows {batches.tokens / batches.room:.1%} full" if objective.packs else ""
    yield (
        f"batches   {batches.rows:,} rows of {batches.tokens:,} tokens looked at: {learned}, "
        f"{1 - batches.tokens / batches.slots:.1%} padding{packed}"
    )
    if objective.labels:
        shown = ", ".join(objective.labels[:20]) + (", ..." if len(objective.labels) > 20 else "")
        yield f"labels    {len(objective.labels)}: {shown}"


def _show(console: Console, row: ShownRow, title: str) -> None:
    several = f"{len(row.documents)} documents, " if len(row.documents) > 1 else ""
    console.print(Text(f"\n{title}: {several}{row.tokens} tokens, {row.padding} of padding"))
    for number, document in enumerate(row.documents, start=1):
        console.print(Text(f"  document {number}") if several else Text("  document"))
        _show_document(console, document)
    if row.padding:
        console.print(Text("    padding | ", _STYLES["padding"]) + Text(f"{row.padding} tokens"))


def _show_document(console: Console, document: Document) -> None:
    if console.is_terminal:
        whole = Text("    ")
        for span in document.spans:
            whole.append(
                _printable(span.text).replace("\n", "↵\n    ") + " " * (" = " in span.text), _STYLES[span.kind]
            )
        console.print(whole)
    else:
        for span in document.spans:
            console.print(Text(f"    {span.kind} | {_printable(span.text)}".replace("\n", "\\n")))
    if document.label is not None:
        console.print(Text(f"    learned | {document.label_kind} {_printable(document.label)}", _STYLES["learned"]))


def _printable(text: str) -> str:
    """The text with what a terminal would obey, other than a new line, written out."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
