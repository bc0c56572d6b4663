"""How much memory does a training step need beside transformers' Trainer, at a large vocabulary and long sequences?

    python benchmarks/train_memory.py [--only 9m-49k] [--precision fp32] [--rows 1] [--length 2048]

Each system trains in a process of its own, on the same texts of `--length` tokens, `--rows` of them a step in one pass;
the figure is the highest resident memory of that process (ru_maxrss), libraries included. The table goes to
benchmarks/results/.
"""

import argparse
import tempfile
from pathlib import Path

import train_work

SYSTEMS = ("ours", "trainer-default")
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("9m-49k", "smollm2"), action="append")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=train_work.ROOT / "benchmarks" / "results" / "train_memory.md")
    options = parser.parse_args()
    lines = ["| model | precision | ours, GB | Trainer, GB | ratio |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.only or ("9m-49k", "smollm2"):
            work = Path(folder) / shape
            train_work.prepare(
                work, shape, steps=STEPS, documents=options.rows, max_length=options.length, joined=True, lr=1e-4
            )
            for precision in options.precision or ("fp32", "bf16"):
                peaks = [
                    train_work.run(system, work, precision=precision, seed=0, threads=1)["peak_bytes"]
                    for system in SYSTEMS
                ]
                ours, peer = (peak / 1e9 for peak in peaks)
                lines.append(f"| {shape} | {precision} | {ours:.2f} | {peer:.2f} | {ours / peer:.2f} |")
                print(lines[-1], flush=True)
    command = f"python benchmarks/train_memory.py --rows {options.rows} --length {options.length}"
    text = (
        f"# Peak memory of training, texts of {options.length} tokens, {options.rows} a step\n\n`{command}`; "
        f"{train_work.conditions()}.\n\n" + "\n".join(lines) + "\n\nThe libraries alone take about 0.6 GB on both "
        "sides. Weights, gradients and AdamW's moments are fp32 on both sides: 16 bytes a weight.\n"
    )
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
