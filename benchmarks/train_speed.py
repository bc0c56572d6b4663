"""How many real tokens a second does training take in, beside transformers' Trainer, TRL's SFTTrainer and a bare loop?

    python benchmarks/train_speed.py [--only 9m] [--precision fp32] [--system ours] [--repeats 5] [--threads 1]

Same weights, texts, optimizer and precision, and as many tokens a step (documents of up to 512 tokens, 140 on
average). Every run is a process of its own, and the systems take turns, so that a machine whose speed drifts is as
unfair to one as to the other. Speeds are per second of CPU time, which a busy neighbour changes least, and the ratio to
ours is taken round by round. The rows of SFTTrainer need TRL: pip install trl. The table goes to benchmarks/results/.
"""

import argparse
import importlib.util
import statistics
import tempfile
from pathlib import Path

import train_work

NAMES = {
    "ours": "Trivet",
    "bare": "a bare loop, the same work",
    "trainer-best": "Trainer at its best: grouped by length, small passes",
    "trainer-best-compiled": "Trainer at its best, compiled",
    "trainer-default": "Trainer, default: random batches",
    "sft-packed-best": "SFTTrainer's packing at its best: no checkpointing, small passes",
    "sft-packed": "SFTTrainer, packing, default",
    "sft-padded": "SFTTrainer, no packing, default",
}
BY_DEFAULT = [name for name in NAMES if name != "trainer-best-compiled"]  # to compile takes minutes
# Steps of one pass, documents of a step, learning rate.
SIZES = {"9m": (6, 16, 1e-3), "smollm2": (2, 8, 3e-4)}
# Products of weights and the tokens' states, forward and back; attention comes on top and is left out.
FLOPS_PER_WEIGHT = 6

Rounds = dict[str, list[dict]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, action="append", help="a model, again for more; default all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--system", choices=NAMES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of one pass over the texts; fewer give a quicker, rougher answer")
    parser.add_argument("--output", type=Path, default=train_work.ROOT / "benchmarks" / "results" / "train_speed.md")
    options = parser.parse_args()
    systems = options.system or BY_DEFAULT
    if importlib.util.find_spec("trl") is None and any(system.startswith("sft") for system in systems):
        print("TRL is not installed, so SFTTrainer is left out; pip install trl")
        systems = [system for system in systems if not system.startswith("sft")]
    tables = []
    for shape in options.only or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            steps, documents, lr = SIZES[shape]
            plan = train_work.prepare(
                Path(folder) / shape,
                shape,
                steps=options.steps or steps,
                documents=documents,
                max_length=512,
                joined=False,
                lr=lr,
            )
            for precision in options.precision or ("fp32", "bf16"):
                rounds = take_turns(systems, Path(folder) / shape, precision, options)
                tables.append(table(f"{shape}, {precision}", rounds, plan))
                print(tables[-1], flush=True)
    options.output.write_text(report(tables, options))


def take_turns(systems: list[str], work: Path, precision: str, options: argparse.Namespace) -> Rounds:
    """Return what each system measured in each round."""
    rounds: Rounds = {system: [] for system in systems}
    for seed in range(options.repeats):
        for system in systems[seed % len(systems) :] + systems[: seed % len(systems)]:
            measured = train_work.run(system, work, precision=precision, seed=seed, threads=options.threads)
            rounds[system].append(measured)
            print(f"{seed + 1}: {system}: {measured['tokens_per_cpu_s']:,.0f} tokens/CPU s", flush=True)
    return rounds


def table(title: str, rounds: Rounds, plan: train_work.Plan) -> str:
    """Return one table as Markdown: medians over the rounds; the ratio and the loss beside ours of the same round."""
    lines = [
        f"## {title}\n",
        "| system | real tokens/CPU s, median (lowest to highest) | ours is faster by, median | held-out loss beside "
        "ours | share of the GEMM rate | outside forward, backward, optimizer | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = rounds.get("ours")
    for system, runs in rounds.items():
        speeds = sorted(run["tokens_per_cpu_s"] for run in runs)
        speed = f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"
        ratio = loss = "-"
        if ours:
            pairs = list(zip(ours, runs, strict=True))
            ratio = f"{statistics.median(a['tokens_per_cpu_s'] / b['tokens_per_cpu_s'] for a, b in pairs):.2f}"
            loss = f"{statistics.median(b['loss'] / a['loss'] - 1 for a, b in pairs):+.2%}"
        used = statistics.median(
            run["tokens_per_cpu_s"] * run["weights"] * FLOPS_PER_WEIGHT / statistics.mean(run["gemm_per_cpu_s"])
            for run in runs
        )
        outside = [run["outside"] for run in runs if run["outside"] is not None]
        shown = f"{statistics.median(outside):.1%}" if outside else "-"
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        lines.append(f"| {NAMES[system]} | {speed} | {ratio} | {loss} | {used:.0%} | {shown} | {peak:.2f} |")
    rates = [rate / 1e9 for runs in rounds.values() for run in runs for rate in run["gemm_per_cpu_s"]]
    tokens = rounds[next(iter(rounds))][0]["tokens"]
    losses = {system: [run["loss"] for run in runs] for system, runs in rounds.items()}
    spread = ", ".join(
        f"{system} {min(found) / statistics.mean(found) - 1:+.1%} to {max(found) / statistics.mean(found) - 1:+.1%}"
        for system, found in losses.items()
    )
    lines.append(f"\nThe losses of one system, by the order of the texts alone: {spread}.")
    lines.append(
        f"\n{tokens:,.0f} tokens in about {plan.steps} steps; GEMM rate {statistics.median(rates):.0f} GFLOP/CPU s "
        f"({min(rates):.0f} to {max(rates):.0f}), measured before and after every run.\n"
    )
    return "\n".join(lines)


def report(tables: list[str], options: argparse.Namespace) -> str:
    chosen = [f"--only {shape}" for shape in options.only or ()]
    chosen += [f"--precision {precision}" for precision in options.precision or ()]
    chosen += [f"--system {system}" for system in options.system or ()]
    chosen += [f"--steps {options.steps}"] if options.steps else []
    command = " ".join(["python benchmarks/train_speed.py", *chosen])
    return (
        f"# Training speed\n\n`{command} --repeats {options.repeats} --threads {options.threads}`; "
        f"{train_work.conditions()}.\n\n" + "\n".join(tables) + "\n"
        "Each run makes one pass over the same texts; the clock starts where the first batch is asked for. Trainer\n"
        "and SFTTrainer use torch's fused AdamW and SDPA, as they come, in passes of 8 documents or rows by default,\n"
        "at their best in those of benchmarks/train_peers.py. A token counts where it is predicted, so padding never\n"
        "does. The share of the GEMM rate counts 6 operations a weight and token, and no attention, against a product\n"
        "of two 2048 x 2048 matrices in the same precision. Grouped by length, texts come sorted, not at random.\n"
        "The losses are those of one pass from random weights, so another order alone moves them.\n"
    )


if __name__ == "__main__":
    main()
