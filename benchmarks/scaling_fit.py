"""Fit the scaling model on one and two processes here, hold it against two machines with a slow cable, draw it further.

    sudo python benchmarks/scaling_fit.py [--steps 12] [--mode ddp] [--mbit 400]

Two network namespaces stand for the machines, and `tc tbf` throttles what joins them. From one process: seconds a token
and a step. From two, over the loopback: what a mode costs besides its traffic. From `trivet doctor --nproc 2`: the
loopback's bandwidth and latency. Nothing is fitted on the throttled runs. Table and plot go to benchmarks/results/.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import scaling_plot
import train_work
import two_machines
from scaling_model import Device, Job, Link, step_s

SHAPE, MAX_LENGTH, ROWS = "2m", 256, 4
WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--mode", choices=("ddp", "zero2", "zero3", "fsdp2"), action="append")
    parser.add_argument("--mbit", type=int, action="append", help="of the cable, each way; again for more")
    parser.add_argument("--output", type=Path, default=train_work.ROOT / "benchmarks" / "results" / "scaling_model.md")
    options = parser.parse_args()
    rates, modes = options.mbit or [100, 200, 400], options.mode or ["ddp", "zero2", "zero3", "fsdp2"]
    with tempfile.TemporaryDirectory() as folder, two_machines.joined():
        runs = Runs(Path(folder), options.steps)
        device, weights = fit_one(runs), runs.weights
        loopback = fit_loopback()
        lines = ["| mode | cable, Mbit/s | bytes of a step by the cable, MB: theory, seen | step, s: predicted | "
                 "measured | error |", "|---|---|---|---|---|---|"]  # fmt: skip
        for mode in modes:
            job = Job(mode, weights, ROWS * MAX_LENGTH, over_gloo=True)
            here_s = runs.step_s(f"{mode}-here", "--nproc", "2", "--parallel", mode)
            besides_s = here_s - step_s(job, 2, Device(device.s_per_token), loopback)
            fitted = Device(device.s_per_token, besides_s)
            print(f"{mode}: {here_s:.3f} s a step on two processes, of it besides work and traffic: {besides_s:.3f} s")
            lines.append(f"| {mode} | loopback, fitted | {job.num_bytes / 2e6:.1f}, - | - | {here_s:.3f} | - |")
            for mbit in rates:
                link = Link(mbit / 8 * 1e6 * two_machines.PAYLOAD, loopback.latency_s)
                lines.append(row(runs, job, mbit, step_s(job, 2, fitted, link)))
                print(lines[-1], flush=True)
    plot = options.output.with_suffix(".png")
    scaling_plot.draw(plot)
    options.output.write_text(report(options, lines, device, loopback, weights))
    print(options.output.read_text())


class Runs:
    """Short runs of the same model on the same texts."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        train_work.prepare(
            folder / "work", SHAPE, steps=steps, documents=ROWS, max_length=MAX_LENGTH, joined=True, lr=1e-4
        )
        work = folder / "work"
        values = {
            "run": {"name": "run", "dir": str(folder / "runs"), "steps": steps},
            "objective": {"type": "causal_lm"},
            "model": {"type": "pretrained", "path": str(work / "model")},
            "data": {"type": "files", "train": f"{work}/train.jsonl", "validation": f"{work}/held_out.jsonl"},
            "strategy": {"type": "full"},
            "batch": {"rows": ROWS, "max_length": MAX_LENGTH},
            "evaluation": {"max_rows": 1},
            "log": {"tensorboard": False},
        }
        self.config = folder / "run.yaml"
        self.config.write_text(json.dumps(values))  # JSON is YAML

    @property
    def weights(self) -> int:
        return json.loads((self.folder / "runs" / f"one-{ROWS}" / "result.json").read_text())["total_parameters"]

    def step_s(self, name: str, *flags: str) -> float:
        """Train here; return the median seconds of a step."""
        command = two_machines.trivet("train", self.config, f"run.name={name}", *flags)
        subprocess.run(command, env=two_machines.environment(), check=True, capture_output=True, text=True)
        return self.measured_s(name)

    def measured_s(self, name: str) -> float:
        lines = [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["tokens"] / line["tokens_per_s"] for line in lines if line["kind"] == "train"]
        return statistics.median(steps[WARM_UP_STEPS:])


def fit_one(runs: Runs) -> Device:
    """Return one process's seconds a token, from steps of two sizes."""
    small_s, large_s = (runs.step_s(f"one-{rows}", f"batch.rows={rows}") for rows in (ROWS // 2, ROWS))
    s_per_token = (large_s - small_s) / (ROWS / 2 * MAX_LENGTH)
    return Device(s_per_token, large_s - s_per_token * ROWS * MAX_LENGTH)


def fit_loopback() -> Link:
    found = two_machines.doctor()
    # The doctor's bytes are those that a ring sends; its latency is of both passes of an all-reduce.
    return Link(found["bytes_per_s"], found["latency_s"] / 2)


def row(runs: Runs, job: Job, mbit: int, predicted_s: float) -> str:
    """Train on both machines over a cable of that rate; return the table's row."""
    two_machines.throttle(None)
    before, name = two_machines.bytes_sent(), f"{job.mode}-{mbit}"
    two_machines.throttle(mbit)
    two_machines.run_on_both("train", runs.config, f"run.name={name}", "--parallel", job.mode)
    seen_mb = (two_machines.bytes_sent() - before) / runs.steps / 1e6
    measured_s = runs.measured_s(name)
    return (
        f"| {job.mode} | {mbit} | {job.num_bytes / 2e6:.1f}, {seen_mb:.1f} | {predicted_s:.3f} | {measured_s:.3f} | "
        f"{predicted_s / measured_s - 1:+.0%} |"
    )


def report(options: argparse.Namespace, lines: list[str], device: Device, loopback: Link, weights: int) -> str:
    return (
        f"# Scaling: predicted and measured\n\n`python benchmarks/scaling_fit.py --steps {options.steps}`; "
        f"{train_work.conditions()}.\n\n{weights / 1e6:.1f}M weights in fp32, {ROWS * MAX_LENGTH} tokens a step, one "
        f"thread a process. Fitted on one process: {device.s_per_token * 1e6:.0f} µs a token and "
        f"{device.s_per_step * 1e3:.0f} ms a step besides; between two on the loopback "
        f"{loopback.bytes_per_s / 1e6:,.0f} MB/s, {loopback.latency_s * 1e6:.0f} µs a pass; then what each mode costs "
        "besides, from one run on the loopback. Nothing was fitted on the rows with a rate.\n\n"
        + "\n".join(lines)
        + "\n\nBytes seen are all that left the first machine in the run, start and end included, over the steps. Two "
        "ranks share this machine with all else that runs on it, so single rows stray.\n\n" + scaling_plot.ASSUMPTIONS
    )


if __name__ == "__main__":
    main()
