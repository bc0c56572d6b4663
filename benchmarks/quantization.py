"""What the quantised formats cost and gain: a decoder on Wikipedia articles, a classifier on reviews it has not seen.

    python benchmarks/quantization.py DATA [--classifier RUN] [--ways]

DATA is the folder with the data sets wikitext and sst2. The decoder is models/SmolLM2-135M-Instruct (`make models`),
the classifier all-MiniLM-L6-v2, trained on sst2 for 240 steps unless a finished RUN is given. --ways adds what other
choices of layers and blocks would cost. Prints tables and writes benchmarks/results/quantization.md. About 15 minutes
on two CPU cores, and 8 more for the training. What is missing (data, a model) is skipped with a word.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minilm

RESULT = Path(__file__).parent / "results" / "quantization.md"
DECODER = Path("models/SmolLM2-135M-Instruct")
FORMATS = ("int8", "int8-weights", "int4")
COSTS = {"ratio": "perplexity / source's", "same": "likeliest answer the same", "accuracy": "accuracy"}


def main() -> None:
    """Measure what is there and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--ways", action="store_true")
    asked = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as scratch:
        for measure in (decoder, classifier, *([ways] if asked.ways else [])):
            try:
                sections.append(measure(asked, Path(scratch)))
            except FileNotFoundError as missing:
                print(f"skipped: {missing}")
                continue
            print(sections[-1], flush=True)
            RESULT.write_text(_page(sections), encoding="utf-8")


def decoder(asked: argparse.Namespace, scratch: Path) -> str:
    """Return the table of the decoder on held-out articles."""
    text = _there(asked.data / "wikitext" / "test.txt.gz")
    lines = _compared(_there(DECODER), scratch / "decoder", text)
    return f"## {DECODER.name}, WikiText test (4,096 tokens)\n\n{_table(lines)}"


def classifier(asked: argparse.Namespace, scratch: Path) -> str:
    """Return the table of the classifier on reviews that it was not trained on."""
    folder = _there(asked.data / "sst2")
    run = asked.classifier or _trained(folder, scratch)
    lines = _compared(run, scratch / "classifier", folder / "test.jsonl.gz", rename={"label_name": "label"})
    return f"## all-MiniLM-L6-v2 trained on SST-2, its 872 validation sentences\n\n{_table(lines)}"


def ways(asked: argparse.Namespace, scratch: Path) -> str:
    """Return what other choices would cost the decoder: limits do not apply."""
    from launch.comparison import exported
    from launch.held_out import held_out_rows
    from serving.export import Options

    held_out = held_out_rows(_there(DECODER), _there(asked.data / "wikitext" / "test.txt.gz"))
    rows = ["| format | way | perplexity / source's | likeliest token the same |", "|---|---|---|---|"]
    for name, way, is_delicate, block in _ways():
        with _changed(is_delicate, block):
            line = exported(DECODER, scratch / "way", Options(quantization=name), held_out)
        found = line.quality or {}
        rows.append(f"| {name} | {way} | x{found['ratio']:.3f} | {found['same']:.1%} |")
    return "## Other choices for SmolLM2-135M-Instruct, same text\n\n" + "\n".join(rows)


def _ways() -> Iterator[tuple[Any, str, Callable[[Any], bool], int]]:
    from serving.export.quantize import _is_delicate

    yield "int8", "every layer by rows", lambda linear: False, 16
    yield "int8", "only what narrows in blocks of int8", lambda linear: linear.narrows, 16
    yield "int4", "every layer in 4 bits, blocks of 32", lambda linear: False, 32
    yield "int4", "every layer in 4 bits, blocks of 16", lambda linear: False, 16
    yield "int4", "head and what narrows in int8, blocks of 32", _is_delicate, 32


@contextmanager
def _changed(is_delicate: Callable[[Any], bool], block: int) -> Iterator[None]:
    """Quantise in another way for a while."""
    from serving.export import quantize, quantize_blocks

    former, quantize._is_delicate = quantize._is_delicate, is_delicate
    quantize_blocks.BLOCK[4] = block
    try:
        yield
    finally:
        quantize._is_delicate, quantize_blocks.BLOCK[4] = former, 16


def _compared(model: Path, folder: Path, text: Path, rename: dict[str, str] | None = None) -> list[Any]:
    from launch.comparison import exported, measure
    from launch.held_out import held_out_rows
    from serving.export import HeldOutRows, Options

    held_out = held_out_rows(model, text)
    names = rename or {}
    rows = [{name: row[name] for name in row if name not in names.values()} for row in held_out.rows]
    held_out = HeldOutRows([{names.get(name, name): row[name] for name in row} for row in rows], text.parent.name)
    asked = {"fp32": Options(), **{name: Options(quantization=name) for name in FORMATS}}  # type: ignore[arg-type]
    lines = [exported(model, folder / name, options, held_out) for name, options in asked.items()]
    measure(lines, folder)
    return lines


def _trained(data: Path, scratch: Path) -> Path:
    """Return a run: the encoder, all weights of it, on the training part."""
    from launch.train import train
    from trainer.config import RunConfig

    files = {"train": str(data / "train.jsonl.gz"), "validation": str(data / "test.jsonl.gz"), "label": "label_name"}
    train(RunConfig.model_validate({
        "run": {"name": "sst2", "dir": str(scratch), "steps": 240},
        "objective": {"type": "classification"},
        "model": {"type": "pretrained", "path": str(minilm.fetch())},
        "data": {"type": "files", **files},
        "strategy": {"type": "full"},
        "optim": {"lr": 2e-4, "warmup_steps": 24},
        "batch": {"rows": 32, "max_length": 64},
        "evaluation": {"max_rows": 872},
        "log": {"tensorboard": False},
    }))  # fmt: skip
    return scratch / "sst2"


def _table(lines: list[Any]) -> str:
    """Return a Markdown table with a line for each format."""
    from launch.comparison import columns

    names, base = columns(lines), lines[0].figures
    costs = [kind for kind in COSTS if any(kind in (line.quality or {}) for line in lines)]
    head = ["format", *(COSTS[kind] for kind in costs), "limit", *names]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        quality = line.quality or {}
        figures = [_figure(line, name, base) for name in names]
        limit = f"{quality['limit']:g}, {'refused' if line.refused else 'kept'}" if quality else ""
        rows.append([line.name, *(_cost(kind, quality, lines) for kind in costs), limit, *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cost(kind: str, quality: dict[str, Any], lines: list[Any]) -> str:
    if not quality:
        [source, *_] = [
            line.quality["source_accuracy"] for line in lines if "source_accuracy" in (line.quality or {})
        ] or [1]
        return {"ratio": "1 (the source)", "same": "100.0%", "accuracy": f"{source:.2%}"}[kind]
    return f"x{quality[kind]:.3f}" if kind == "ratio" else f"{quality[kind]:.2%}"


def _figure(line: Any, name: str, base: dict[str, float]) -> str:
    value = line.figures.get(name)
    if value is None:
        return "-"
    times = "" if line.figures is base or name == "export s" or name not in base else f" (x{value / base[name]:.2f})"
    return f"{value:,.1f}{times}"


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    return path


def _page(sections: list[str]) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "torch", "transformers")
    )
    command = "python benchmarks/quantization.py DATA " + " ".join(arg for arg in sys.argv[2:] if arg.startswith("--"))
    facts = (
        f"`{command.strip()}`, commit {commit.strip()}, {_processor()}, {versions}, Python {platform.python_version()}"
    )
    notes = (
        "Speeds are medians of 5 rounds in which all formats take turns, each in its own process; batches are of 32 "
        "tokens in, 32 out, prompts included, through the engine. Ratios count: the machine was shared with other "
        "work. `peak MB` is the most memory of the process that serves. A format past its limit is refused: nothing of "
        "it is published."
    )
    return "\n\n".join(["# Quantised formats", facts, notes, *sections]) + "\n"


def _processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} cores of {names[0]}"


if __name__ == "__main__":
    main()
