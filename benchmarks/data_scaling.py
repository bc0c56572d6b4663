"""How do time and memory grow with the data: the first run on it, a later one from the cache, and a stream?

    python benchmarks/data_scaling.py [--sizes 10,100,1000] [--steps 20] [--folder FOLDER]

Text is the embedded corpus again and again, each time with other names in it, so that no document comes twice. The
model and the batches are tiny: what is measured is everything around them. Each figure is of a process of its own.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARATIONS = ("first run", "cached run", "stream")


def write_text(path: Path, size_mb: int) -> None:
    """Write about so many megabytes of documents as JSON lines."""
    from trainer import corpus

    texts = [row["text"] for _, row in corpus.documents(corpus.read_items())]
    words = sorted({word for text in texts for word in re.findall(r"[a-z]{4,9}", text)})[:1009]
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            copy = number // len(texts)
            name = f"{words[number % len(words)]}_{words[copy % len(words)]}"
            renamed = re.sub(r"\bself\b|\bname\b|\bvalue\b|\bThe\b|\bthe\b", name, text)
            file.write(json.dumps({"text": f"{renamed}\n# {name} {copy}"}) + "\n")
            if file.tell() >= size_mb * 10**6:
                return


def config_of(data: Path, folder: Path, *, streaming: bool, steps: int):
    """The config of a tiny run on the data, with the tokenizer that lies in the folder."""
    from trainer.config import RunConfig

    return RunConfig.model_validate({
        "run": {"name": f"{data.stem}-{streaming}", "dir": str(folder / "runs"), "steps": steps},
        "objective": {"type": "causal_lm"},
        "model": {"type": "new", "hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2,
                  "num_kv_heads": 2, "context_length": 256},
        "tokenizer": {"type": "pretrained", "path": str(folder / "tokenizer")},
        "data": {"type": "files", "train": str(data), "streaming": streaming, "leaks": "off"},
        "strategy": {"type": "scratch"},
        "batch": {"rows": 16, "max_length": 256},
        "evaluation": {"max_rows": 16},
    })  # fmt: skip


def measure(data: Path, folder: Path, *, streaming: bool, steps: int) -> dict[str, float]:
    """Prepare the data, read the batches of so many steps spread over the data, and say what it took."""
    started = time.perf_counter()
    import torch  # noqa: F401

    from trainer import dataset, distributed

    config = config_of(data, folder, streaming=streaming, steps=steps)
    world = distributed.start(config)
    imported = time.perf_counter()
    prepared = dataset.prepare_data(config)
    read = time.perf_counter()
    feed = dataset.make_feed(config, prepared, world)
    made = time.perf_counter()
    next(feed.micro_batches(0))
    first = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(1, steps):
        list(feed.micro_batches(step))
    return {
        "imports_s": imported - started,
        "rows_s": read - imported,
        "examples_s": made - read,
        "first_batch_s": first - started,
        "batch_ms": 1e3 * (time.perf_counter() - first) / max(1, steps - 1),
        "rss_mb": memory / 1024,
        "rss_after_steps_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": len(feed.train),
    }


def in_a_process(data: Path, folder: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(data), "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", default="1,10", help="megabytes of text")
    arguments.add_argument("--steps", type=int, default=200, help="batches of 16 rows to read after the first")
    arguments.add_argument("--folder", type=Path, help="where data and cache go; by default a temporary folder")
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, streaming=options.streaming, steps=options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare([int(size) for size in options.sizes.split(",")], options.folder or Path(temporary), options.steps)


def compare(sizes_mb: list[int], folder: Path, steps: int) -> None:
    os.environ["TRIVET_CACHE"] = str(folder / "cache")
    make_tokenizer(folder / "tokenizer")
    print(f"{_conditions()}; {steps} batches of 16 rows of 256 tokens\n")
    print(
        "| text | | rows read, s | examples made, s | first batch after, s | ms a batch | peak RSS at it, MB | later |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes_mb:
        data = folder / f"{size}.jsonl"
        if not data.exists():
            write_text(data, size)
        for what in PREPARATIONS:
            extra = ["--streaming"] if what == "stream" else []
            found = in_a_process(data, folder, "--steps", str(steps), *extra)
            print(
                f"| {size} MB | {what} | {found['rows_s']:.1f} | {found['examples_s']:.1f} | "
                f"{found['first_batch_s']:.1f} | {found['batch_ms']:.1f} | {found['rss_mb']:,.0f} | "
                f"{found['rss_after_steps_mb']:,.0f} |",
                flush=True,
            )
    kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    print(f"\nThe cache holds {kept / 1e6:,.0f} MB for {sum(sizes_mb):,} MB of text.")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 4,096 entries, trained on the corpus once."""
    from trainer import corpus
    from trainer.tokenizers import train_tokenizer

    if not folder.exists():
        texts = [row["text"] for _, row in corpus.documents(corpus.read_items())]
        train_tokenizer(texts, 4096, 256).save_pretrained(folder)


def _conditions() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")]
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, {', '.join(versions)}, commit {commit or 'unknown'}"


if __name__ == "__main__":
    main()
