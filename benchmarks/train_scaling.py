"""How do speed and memory of training grow with the model and with the length of the texts?

    python benchmarks/train_scaling.py [--repeats 3] [--precision fp32]

Every run trains a few steps of about `--tokens` tokens in a process of its own, rounds alternate, and the table has
medians. Growth with the size of the data is measured by benchmarks/data_scaling.py. The table goes to
benchmarks/results/.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import train_work

# Model, length of a text in tokens: one axis at a time around the second.
POINTS = [("2m", 512), ("9m", 512), ("37m", 512), ("smollm2", 512), ("9m", 128), ("9m", 1024), ("9m", 2048)]
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=train_work.ROOT / "benchmarks" / "results" / "train_scaling.md")
    options = parser.parse_args()
    runs: dict[tuple[str, int], list[dict]] = {point: [] for point in POINTS}
    with tempfile.TemporaryDirectory() as folder:
        for shape, length in POINTS:
            train_work.prepare(
                Path(folder) / f"{shape}-{length}", shape, steps=STEPS, documents=options.tokens // length,
                max_length=length, joined=True, lr=1e-4,
            )  # fmt: skip
        for seed in range(options.repeats):
            for shape, length in POINTS:
                work = Path(folder) / f"{shape}-{length}"
                runs[shape, length].append(
                    train_work.run("ours", work, precision=options.precision, seed=seed, threads=options.threads)
                )
    command = f"python benchmarks/train_scaling.py --repeats {options.repeats} --precision {options.precision}"
    text = (
        f"# Training speed and memory by model size and text length\n\n`{command} --tokens {options.tokens}`; "
        f"{train_work.conditions()}.\n\n{table(runs)}\n\nSpeeds are per second of CPU time on one thread. Memory is "
        "the highest resident set of the process: the libraries, 0.6 GB, included.\n"
    )
    options.output.write_text(text)
    print(text)


def table(runs: dict[tuple[str, int], list[dict]]) -> str:
    lines = [
        "| model | weights | tokens of a text | tokens/CPU s, median (range) | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for (shape, length), measured in runs.items():
        speeds = sorted(run["tokens_per_cpu_s"] for run in measured)
        speed = f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"
        peak = statistics.median(run["peak_bytes"] for run in measured) / 1e9
        lines.append(f"| {shape} | {measured[0]['weights'] / 1e6:.1f} M | {length} | {speed} | {peak:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
