"""How many real tokens a second do several processes train, beside transformers' Trainer under the same launch config?

    python benchmarks/train_distributed.py [--mode zero2] [--precision fp32] [--repeats 5] [--nproc 2] [--only 9m]

Both systems are started by `accelerate launch` with the same file of configs/accelerate/, on one thread a process, and
take the same weights, texts, optimizer, precision and tokens a step. They take turns; the ratio is taken round by
round. Speeds are of wall time, since ranks wait for each other. The table goes to benchmarks/results/.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import train_work

from launch.processes import accelerate_command

BENCHMARKS = train_work.ROOT / "benchmarks"
MODES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
NAMES = {"ours": "Trivet", "trainer-best": "Trainer, grouped by length, small passes", "trainer-default": "Trainer"}
SIZES = {"2m": (6, 16, 1e-3), "9m": (6, 16, 1e-3)}  # steps of one pass, documents of a step, learning rate

Rounds = dict[str, list[dict]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, default="9m", help="the model")
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--system", choices=NAMES, action="append")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results" / "train_distributed.md")
    options = parser.parse_args()
    lines = [
        "| mode | system | real tokens/s, median (lowest to highest) | ours is faster by, median | outside forward, "
        "backward, communication, optimizer: each rank | peak memory of a rank, GB |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work, (steps, documents, lr) = Path(folder) / "work", SIZES[options.only]
        plan = train_work.prepare(
            work, options.only, steps=steps, documents=documents, max_length=512, joined=False, lr=lr
        )
        # A model that is divided among ranks answers to none of them alone.
        (work / "plan.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(plan, held_out=False))))
        for mode in options.mode or MODES:
            lines += rows_of(mode, take_turns(mode, work, options))
            print("\n".join(lines), flush=True)
    options.output.write_text(report(lines, options))


def take_turns(mode: str, work: Path, options: argparse.Namespace) -> Rounds:
    """Return what each system measured in each round."""
    rounds: Rounds = {system: [] for system in options.system or ("ours", "trainer-best", "trainer-default")}
    for seed in range(options.repeats):
        for system in [*rounds][:: -1 if seed % 2 else 1]:
            rounds[system].append(run(system, mode, work, seed, options))
            print(f"{mode} {seed + 1}: {system}: {rounds[system][-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
    return rounds


def run(system: str, mode: str, work: Path, seed: int, options: argparse.Namespace) -> dict:
    """Return what the ranks of one launch measured together. Raises RuntimeError, with its last words, if it failed."""
    options_of_run = ["--precision", options.precision, "--seed", str(1000 * MODES.index(mode) + seed)]
    command, environment = accelerate_command(
        Path(system), [str(work), *options_of_run], nproc=options.nproc, parallel=mode, module="train_systems"
    )
    here = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}",
    }
    environment = {**os.environ, **environment, **here}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"steps"')]
    if done.returncode or len(ranks) != options.nproc:
        raise RuntimeError(f"{mode}, {system}: {done.stdout[-500:]} {done.stderr[-3000:]}")
    return {
        "tokens_per_s": sum(rank["tokens_per_s"] for rank in ranks),
        "outside": [rank["outside"] for rank in ranks],
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
    }


def rows_of(mode: str, rounds: Rounds) -> list[str]:
    """Return the rows of one mode: medians over the rounds."""
    lines = []
    for system, runs in rounds.items():
        speeds = sorted(each["tokens_per_s"] for each in runs)
        speed = f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"
        pairs = zip(rounds["ours"], runs, strict=True)
        ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        shares = zip(*(each["outside"] for each in runs), strict=True)
        outside = ", ".join(f"{statistics.median(rank):.1%}" for rank in shares) if system == "ours" else "-"
        peak = statistics.median(each["peak_bytes"] for each in runs) / 1e9
        lines.append(f"| {mode} | {NAMES[system]} | {speed} | {ratio:.2f} | {outside} | {peak:.2f} |")
    return lines


def report(lines: list[str], options: argparse.Namespace) -> str:
    command = f"python benchmarks/train_distributed.py --only {options.only} --precision {options.precision}"
    return (
        f"# Training speed of {options.nproc} processes\n\n`{command} --repeats {options.repeats} --nproc "
        f"{options.nproc}`; {train_work.conditions()}.\n\n" + "\n".join(lines) + "\n\nEach process has one thread and "
        "they talk over gloo. A token counts where it is predicted, so padding never does. What is outside is the wall "
        "time of a rank\nthat is in none of the objective's forward pass, `backward` (with its communication) and "
        "`finish_step` (clipping, optimizer).\n"
    )


if __name__ == "__main__":
    main()
