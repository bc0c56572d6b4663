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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from launch import config_file, evidence
from launch.report import Section, write_report
from launch.shipped import example_configs
from trainer.config import RunConfig

NUM_PROMPTS = 16
NUM_NEW_TOKENS = 32

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


def quickstart(folder: Path) -> int:
    """Run every stage in `folder`; return 0, 1 if a claim failed, 75 if training was stopped (run again to go on)."""
    outcome = Outcome(folder)
    pretrain = _config("pretrain_tiny.yaml", folder, "pretrain")
    sft = _config("sft_lora.yaml", folder, "sft", f"model.path={folder}/pretrain/model", "model.made_by=null")
    onnx_dir = folder / "onnx"
    with _stage(outcome, 1, "corpus: the Python standard library of this interpreter"):
        _show_corpus()
    for number, title, config in (
        (2, "pre-training: a tokenizer and a small Llama, from scratch", pretrain),
        (3, "fine-tuning: LoRA on questions and answers", sft),
    ):
        with _stage(outcome, number, title):
            if code := _train(outcome, config):
                return code
    with _stage(outcome, 4, "export: to ONNX with an in-place KV cache, and the proof"):
        proven = _export(outcome, sft.run.folder, onnx_dir)
    if proven:
        with _stage(outcome, 5, f"decoding: {NUM_PROMPTS} held-out prompts in continuous batches"):
            _decode(outcome, sft.run.folder / "model", onnx_dir)
        with _stage(outcome, 6, "serving: one chat question over HTTP"):
            _serve(outcome, onnx_dir)
    with _stage(outcome, 7, "report"), _bar("drawing", None):
        page = _report(outcome, [pretrain.run.folder, sft.run.folder])
    _say_what_next(outcome, page)
    return 1 if outcome.failures else 0


def _config(name: str, folder: Path, run: str, *overrides: str) -> RunConfig:
    return config_file.load(example_configs() / name, [f"run.name={run}", f"run.dir={folder}", *overrides], RunConfig)


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


def _train(outcome: Outcome, config: RunConfig) -> int:
    from launch.train import train

    code = train(config)
    if code == 0:
        result = evidence.read_result(config.run.folder)
        before, after = result["initial_metrics"]["eval_loss"], result["metrics"]["eval_loss"]
        outcome.claim(after < before, f"held-out loss {before:.3f} before, {after:.3f} after")
        if config.objective.type == "causal_lm":
            unigram = result["baseline"]["unigram_loss"]
            outcome.claim(after < unigram, f"beats a unigram model, whose held-out loss is {unigram:.3f}")
    return code


def _export(outcome: Outcome, run: Path, onnx_dir: Path) -> bool:
    from serving.export import VerificationFailed, export_model

    try:
        with _bar("export", None) as advance:
            record = export_model(run, onnx_dir, progress=advance)
    except VerificationFailed as error:
        outcome.claim(False, str(error))
        return False
    outcome.sections.append(evidence.verification_section(record))
    checks = ", ".join(name.replace("_", " ") for name in record["checks"])
    outcome.claim(record["passed"], f"verified on {record['provider']}: {checks}")
    return True


def _decode(outcome: Outcome, model_dir: Path, onnx_dir: Path) -> None:
    with _bar("decoding", None) as advance:
        found = evidence.compare_with_generate(model_dir, onnx_dir, NUM_PROMPTS, NUM_NEW_TOKENS, advance)
    outcome.sections += [found.section(), found.speed_section()]
    ties = f"near ties excused: {found.near_ties}"
    outcome.claim(
        not found.mismatches and len(found.rows) == NUM_PROMPTS,
        f"{found.num_equal} of {NUM_PROMPTS} prompts give the same {NUM_NEW_TOKENS} tokens as transformers' generate "
        f"({'; '.join([*found.mismatches, ties])})",
    )
    outcome.claim(not found.repeats, f"no answer is one token repeated {found.repeats or ''}".rstrip())
    for name, speed in found.tokens_per_s.items():
        _say(f"        {name}: {speed:,.0f} tokens/s")


def _serve(outcome: Outcome, onnx_dir: Path) -> None:
    question = evidence.held_out_questions(1)[0]
    with _bar("serving", 3) as advance:
        answer = evidence.ask_server(onnx_dir, question, advance)
    _say(f"  asked: {question}")
    _say(f"  answered: {answer.text!r}")
    outcome.claim(bool(answer.text.strip()), f"{answer.pieces} pieces streamed, the first after {answer.first_s:.2f} s")
    outcome.claim(answer.exit_code == 0, f"server stopped cleanly (exit code {answer.exit_code})")
    outcome.sections.append(Section("Served answer", ["question", "answer"], [[question, answer.text]]))


def _report(outcome: Outcome, runs: list[Path]) -> Path:
    stages: list[list[Any]] = [[name, f"{seconds:.1f}"] for name, seconds in outcome.seconds.items()]
    sections = [*outcome.sections, Section("Time by stage", ["stage", "seconds"], stages)]
    return write_report(runs, outcome.folder / "report.html", sections=sections)


def _say_what_next(outcome: Outcome, page: Path) -> None:
    total = sum(outcome.seconds.values())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    verdict = f"{len(outcome.failures)} claims FAILED" if outcome.failures else "every claim holds"
    _say(f"\n{verdict}; {total:.0f} s, peak memory {peak:.1f} GiB. Report: {page}")
    trivet = "trivet" if shutil.which("trivet") else sys.argv[0]
    _say(
        "\nTry next:\n"
        f"  {trivet} serve {outcome.folder}/onnx                         # then open http://127.0.0.1:8000\n"
        f"  {trivet} generate {outcome.folder}/onnx --prompt 'What does `textwrap.dedent` do?'\n"
        f"  {trivet} train configs/sft_lora.yaml optim.lr=1e-3 run.name=slower\n"
        f"  {trivet} sweep configs/sweep_strategies.yaml"
    )
