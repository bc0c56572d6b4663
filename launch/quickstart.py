"""`trivet quickstart`: the whole path on this machine, from raw text to a served answer, with evidence at each step."""

import contextlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch import evidence, quickstart_base, served_answer
from launch.quickstart_base import Tuned
from launch.report import Section, write_report
from trainer.config import RunConfig

Advance = Callable[[str], None]


@dataclass
class Outcome:
    """What the quickstart found: one line per claim, and the sections of its report."""

    folder: Path
    failures: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def claim(self, holds: bool, text: str) -> None:
        """Print a claim with its verdict; a claim that does not hold makes the quickstart exit 1."""
        _say(f"  {'ok  ' if holds else 'FAIL'}  {text}")
        if not holds:
            self.failures.append(text)


console = Console(stderr=True)


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def quickstart(folder: Path, *, tiny: bool = False, base: str | None = None) -> int:
    """Run every stage in `folder`; return 0, 1 if a claim failed, 75 if training was stopped (run again to go on).

    What is fine-tuned is the model just trained from scratch (`tiny`), else `base`, a folder or hub name of any causal
    language model, else SmolLM2-135M-Instruct; where its package cannot be had that is said, and it goes on as `tiny`.
    Raises BadInput, before any training, for a `base` that cannot be trained or exported.
    """
    outcome = Outcome(folder)
    pretrain = quickstart_base.config("pretrain_tiny.yaml", folder, "pretrain")
    with _stage(outcome, 1, "text and model: the Python standard library of this interpreter, and what is fine-tuned"):
        _show_corpus()
        tuned = _choose(folder, tiny=tiny, base=base)
    with _stage(outcome, 2, "pre-training: a tokenizer and a small Llama, from scratch"):
        if code := _train(outcome, pretrain):
            return code
    with _stage(outcome, 3, f"fine-tuning: LoRA on questions and answers, of {tuned.what}"):
        if code := _fine_tune(outcome, tuned):
            return code
    with _stage(outcome, 4, "export: to ONNX with an in-place KV cache, and the proof"):
        proven = _export(outcome, tuned)
    if proven:
        with _stage(outcome, 5, f"decoding: {tuned.num_prompts} held-out prompts in continuous batches"):
            _decode(outcome, tuned)
        with _stage(outcome, 6, "serving: one chat question over HTTP"):
            _serve(outcome, tuned.onnx_dir)
    with _stage(outcome, 7, "report"), _bar("drawing", None):
        page = _report(outcome, [pretrain.run.folder, tuned.config.run.folder])
    _say_what_next(outcome, tuned.onnx_dir, page)
    return 1 if outcome.failures else 0


@contextlib.contextmanager
def _stage(outcome: Outcome, number: int, title: str) -> Iterator[None]:
    console.print(f"[{number}/7] {title}", style="bold", highlight=False, markup=False)
    started = time.perf_counter()
    yield
    outcome.seconds[title.partition(":")[0]] = time.perf_counter() - started


@contextlib.contextmanager
def _bar(title: str, total: int | None) -> Iterator[Advance]:
    """Show a progress bar; the yielded function says what comes next and moves it on by one."""
    columns = TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)

        def advance(text: str = "") -> None:
            progress.update(task, advance=1, description=f"{title}: {text}" if text else title)

        yield advance


def _show_corpus() -> None:
    from trainer.config import EmbeddedData
    from trainer.sources import read_splits

    with _bar("reading", 2) as advance:
        for objective, what in (("causal_lm", "documents"), ("sft", "question-answer chats")):
            advance(what)
            splits = read_splits(EmbeddedData(type="embedded"), objective)
            _say(
                f"  {len(splits.train):,} {what} to learn from, {len(splits.held_out):,} held out by module; "
                f"fingerprint {splits.fingerprint[:12]}"
            )


def _choose(folder: Path, *, tiny: bool, base: str | None) -> Tuned:
    with _bar("the model", None) as advance:
        if base is not None:
            return quickstart_base.of(base, folder)
        if not tiny:
            try:
                return quickstart_base.smollm2(folder, advance)
            except quickstart_base.Unavailable as error:
                _say(f"  no real model: {error}\n  going on as --tiny: the model trained from scratch is fine-tuned")
    return quickstart_base.tiny(folder)


def _fine_tune(outcome: Outcome, tuned: Tuned) -> int:
    """Train; where the base could answer before, show its answers and those after, side by side."""
    questions = evidence.held_out_questions(tuned.num_answers) if tuned.num_answers else []
    before = _answers("before", tuned, tuned.base, questions)
    if code := _train(outcome, tuned.config):
        return code
    after = _answers("after", tuned, str(tuned.model_dir), questions)
    if questions:
        section = Section("Answers before and after", ["question", "before", "after"],
                          [list(row) for row in zip(questions, before, after, strict=True)],
                          "Held-out questions; greedy, by transformers.")  # fmt: skip
        console.print(_table(section))
        outcome.sections.append(section)
    return 0


def _answers(when: str, tuned: Tuned, model: str, questions: list[str]) -> list[str]:
    if not questions:
        return []
    with _bar(f"answering, {when}", len(questions)) as advance:
        return evidence.answers(model, tuned.chat_template, questions, advance)


def _table(section: Section) -> Table:
    table = Table(title=section.title, title_justify="left", show_lines=True)
    for name in section.columns:
        table.add_column(name, ratio=1, overflow="fold")
    for row in section.rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _train(outcome: Outcome, config: RunConfig) -> int:
    from launch.train import train

    code = train(config)
    if code == 0:
        result = evidence.read_result(config.run.folder)
        before, after = result["initial_metrics"]["eval_loss"], result["metrics"]["eval_loss"]
        outcome.claim(after < before, f"held-out loss {before:.3f} before, {after:.3f} after")
        if config.strategy.type == "scratch":
            unigram = result["baseline"]["unigram_loss"]
            outcome.claim(after < unigram, f"beats a unigram model, whose held-out loss is {unigram:.3f}")
    return code


def _export(outcome: Outcome, tuned: Tuned) -> bool:
    from serving.export import VerificationFailed, export_model

    try:
        with _bar("export", None) as advance:
            record = export_model(tuned.config.run.folder, tuned.onnx_dir, progress=advance)
    except VerificationFailed as error:
        outcome.claim(False, str(error))
        return False
    outcome.sections.append(evidence.verification_section(record))
    checks = ", ".join(name.replace("_", " ") for name in record["checks"])
    outcome.claim(record["passed"], f"verified on {record['provider']}: {checks}")
    return True


def _decode(outcome: Outcome, tuned: Tuned) -> None:
    num_prompts, num_new_tokens = tuned.num_prompts, tuned.num_new_tokens
    with _bar("decoding", None) as advance:
        found = evidence.compare_with_generate(
            tuned.model_dir, tuned.onnx_dir, num_prompts, num_new_tokens, advance, warm_up=tuned.warm_up
        )
    outcome.sections += [found.section(), found.speed_section()]
    ties = f"near ties excused: {found.near_ties}"
    outcome.claim(
        not found.mismatches and len(found.rows) == num_prompts,
        f"{found.num_equal} of {num_prompts} prompts give the same {num_new_tokens} tokens as transformers' generate "
        f"({'; '.join([*found.mismatches, ties])})",
    )
    outcome.claim(not found.repeats, f"no answer is one token repeated {found.repeats or ''}".rstrip())
    for name, speed in found.tokens_per_s.items():
        _say(f"        {name}: {speed:,.0f} tokens/s")


def _serve(outcome: Outcome, onnx_dir: Path) -> None:
    question = evidence.held_out_questions(1)[0]
    with _bar("serving", 3) as advance:
        answer = served_answer.ask_server(onnx_dir, question, advance)
    _say(f"  asked: {question}")
    _say(f"  answered: {answer.text!r}")
    outcome.claim(bool(answer.text.strip()), f"{answer.pieces} pieces streamed, the first after {answer.first_s:.2f} s")
    outcome.claim(answer.exit_code == 0, f"server stopped cleanly (exit code {answer.exit_code})")
    outcome.sections.append(Section("Served answer", ["question", "answer"], [[question, answer.text]]))


def _report(outcome: Outcome, runs: list[Path]) -> Path:
    stages: list[list[Any]] = [[name, f"{seconds:.1f}"] for name, seconds in outcome.seconds.items()]
    sections = [*outcome.sections, Section("Time by stage", ["stage", "seconds"], stages)]
    return write_report(runs, outcome.folder / "report.html", sections=sections)


def _say_what_next(outcome: Outcome, onnx_dir: Path, page: Path) -> None:
    total = sum(outcome.seconds.values())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    verdict = f"{len(outcome.failures)} claims FAILED" if outcome.failures else "every claim holds"
    _say(f"\n{verdict}; {total:.0f} s, peak memory {peak:.1f} GiB. Report: {page}")
    trivet = "trivet" if shutil.which("trivet") else sys.argv[0]
    _say(
        "\nTry next:\n"
        f"  {trivet} serve {onnx_dir}     # then open http://127.0.0.1:8000\n"
        f"  {trivet} generate {onnx_dir} --prompt 'What does `textwrap.dedent` do?'\n"
        f"  {trivet} init my-task --from DATA     # a config for your own csv, jsonl or folder\n"
        f"  {trivet} init                         # the example configs, to train and sweep with"
    )
