"""Draw what the scaling model says of more devices than anybody here has: python benchmarks/scaling_plot.py OUT.png"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scaling_model import Device, Job, Link, efficiency, step_s

WORLDS = [2**power for power in range(14)] + [10_000]
WEIGHTS, TOKENS, NODE = 7e9, 8192, 8
FLOPS = 0.4 * 989e12  # 40 % of an H100's dense bf16
INSIDE, BETWEEN = Link(300e9, 5e-6), Link(50e9, 10e-6)  # NVLink as a collective sees it; 400 Gbit/s a GPU
GLOBAL_TOKENS = 4 * 2**20  # of the batch that does not grow
CREDIBLE = 1024

ASSUMPTIONS = f"""## To 10,000 GPUs, on paper

![scaling_model.png](scaling_model.png)

Never measured: 7B weights in bf16, GPUs at 40 % of an H100's 989 TFLOP/s, {NODE} of them a node at 300 GB/s and 5 µs
inside, 50 GB/s a GPU and 10 µs between nodes, rings everywhere, 32 messages a pass. The band goes from no traffic
hidden behind work to as much as there is work; on CPUs, where both take the same cores, nothing is hidden.
Left: {TOKENS:,} tokens a GPU, so the batch grows with the GPUs. Right: a batch of 4M tokens, shared by all.

Credible up to about {CREDIBLE:,} GPUs, the dotted line. Beyond it the model leaves out what then decides: the slowest
of all ranks sets the pace, links are shared and congested, rings give way to trees, failures come daily, and a batch
that grows with the GPUs stops teaching in proportion. Attention's operations and the memory of a GPU are left out
everywhere: `trivet plan` says what fits.
"""


def draw(path: Path) -> None:
    """Write the plot: efficiency at a growing batch, and step time at a fixed one, against the number of GPUs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for color, mode in zip(("C0", "C1"), ("zero2", "zero3"), strict=True):
        job = Job(mode, WEIGHTS, TOKENS, bytes_each=2, messages=32)
        shared = Job(mode, WEIGHTS, GLOBAL_TOKENS, bytes_each=2, messages=32)
        none, all_of_it = (Device.of_flops(WEIGHTS, FLOPS, overlap=overlap) for overlap in (0.0, 1.0))
        bands = [[100 * efficiency(job, n, d, BETWEEN, INSIDE, NODE) for n in WORLDS] for d in (none, all_of_it)]
        name = "DDP, ZeRO-1, ZeRO-2" if mode == "zero2" else "ZeRO-3, FSDP2"
        left.fill_between(WORLDS, *bands, color=color, alpha=0.3, label=name)
        left.plot(WORLDS, bands[0], color=color, linewidth=1)
        bands = [[step_s(shared, n, d, BETWEEN, INSIDE, NODE) for n in WORLDS] for d in (none, all_of_it)]
        right.fill_between(WORLDS, *bands, color=color, alpha=0.3, label=name)
        right.plot(WORLDS, bands[0], color=color, linewidth=1)
    right.plot(WORLDS, [step_s(shared, 1, none, BETWEEN) / n for n in WORLDS], "k--", linewidth=0.8, label="ideal")
    left.set(title=f"{TOKENS:,} tokens a GPU", ylabel="speed of a GPU beside one alone, %", ylim=(0, 105))
    right.set(title="4M tokens a step, shared", ylabel="seconds a step", yscale="log")
    for axes in (left, right):
        axes.axvline(CREDIBLE, color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="GPUs")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
