"""One training run of one system, in a process of its own; train_speed.py and train_memory.py start it.

    python benchmarks/train_systems.py SYSTEM WORK --precision fp32|bf16 [--seed N] [--threads N]

WORK is a folder that train_speed.py made: model/ (weights and tokenizer), train.jsonl, held_out.jsonl, plan.json. Each
system makes one pass over the training texts and prints one line of JSON: under a launcher one of each rank, with its
share of the tokens. A step is marked by the optimizer itself, in every system alike, and the clock starts where the
first batch is asked for.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from train_peers import PEERS, WORLD_SIZE, Documents, System, load, read_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

GEMM_SIZE, GEMM_REPEATS = 2048, 5


class Clock:
    """CPU and wall seconds at the start of training, and at the end of each optimizer step."""

    def __init__(self) -> None:
        self.cpu_s, self.wall_s = [], []
        # Steps before the first batch are no training: a plan of the memory takes one.
        register_optimizer_step_post_hook(lambda *_: self.mark() if self.cpu_s else None)

    def start(self) -> None:
        """To be called where a system takes its first batch."""
        if not self.cpu_s:
            self.mark()

    def mark(self) -> None:
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())


def ours(work: Path, plan: dict, options: argparse.Namespace, start: Callable[[], None]) -> dict:
    from launch import config_file
    from trainer import loop
    from trainer.config import RunConfig

    inside = _time_inside(loop, start)
    (work / "run.yaml").write_text(
        json.dumps(
            {
                "run": {"name": f"ours-{options.precision}-{options.seed}", "dir": str(work / "runs"),
                        "steps": plan["steps"], "seed": options.seed},
                "objective": {"type": "causal_lm"},
                "model": {"type": "pretrained", "path": str(work / "model")},
                "data": {"type": "files", "train": f"{work}/train.jsonl", "validation": f"{work}/held_out.jsonl"},
                "strategy": {"type": "full"},
                "optim": {"lr": plan["lr"], "schedule": "linear", "floor": 0.0, "weight_decay": 0.0,
                          "betas": [0.9, 0.999]},
                "batch": {"rows": plan["rows"], "max_length": plan["max_length"]},
                "precision": {"type": options.precision},
                "evaluation": {"max_rows": 1},
                "log": {"tensorboard": False},
            }
        )
    )  # fmt: skip
    config = config_file.load(work / "run.yaml", [], RunConfig)
    code = loop.train(config, "")
    assert code == 0, f"the run ended with {code}"
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens"] / WORLD_SIZE for line in lines if line["kind"] == "train"]
    model = AutoModelForCausalLM.from_pretrained(config.run.folder / "model", dtype=torch.float32)
    last = CLOCK.wall_s[-1]
    return {
        "tokens": tokens,
        "model": model,
        "inside_s": sum(min(end, last) - begin for begin, end in inside if begin < last),
    }


def _time_inside(loop, start: Callable[[], None]) -> list[tuple[float, float]]:
    """When our loop went into forward, backward and optimizer passes and came out, while the clock runs."""
    import trainer.distributed
    from trainer.feed import Feed
    from trainer.objectives import CausalLMObjective

    inside: list[tuple[float, float]] = []

    def timed(function: Callable) -> Callable:
        def run(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if CLOCK.wall_s and torch.is_grad_enabled():
                    inside.append((started, time.perf_counter()))

        return run

    micro_batches = Feed.micro_batches

    def first_batch(feed: Feed, step: int):
        start()
        return micro_batches(feed, step)

    Feed.micro_batches = first_batch
    CausalLMObjective.sums = timed(CausalLMObjective.sums)
    for name in ("backward", "finish_step"):
        setattr(trainer.distributed, name, timed(getattr(trainer.distributed, name)))
    return inside


def bare(work: Path, plan: dict, options: argparse.Namespace, start: Callable[[], None]) -> dict:
    """The same work in a loop written out here: packed documents, segments, the loss without all logits."""
    import numpy as np

    from trainer.packing import Example, collate_packed, pack
    from trainer.token_model import tried_out

    tokenizer, model = load(work)
    documents = [np.asarray(ids) for ids in read_documents(work / "train.jsonl", tokenizer, plan["max_length"])]
    rows = pack([Example(ids[:-1], ids[1:]) for ids in documents], plan["max_length"])
    generator = torch.Generator().manual_seed(options.seed)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    token_model = tried_out(model, plan["max_length"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan["lr"], weight_decay=0.0, fused=True)
    batches = [collate_packed(rows[i : i + plan["rows"]]) for i in range(0, len(rows), plan["rows"])]
    model.train()
    start()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = plan["lr"] * (1 - step / len(batches))
        targets = batch.pop("targets")
        with _autocast(options.precision):
            loss = token_model.loss_sum(model, {**batch, "use_cache": False}, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"tokens": [batch["input_ids"].numel() for batch in batches], "model": model}


SYSTEMS: dict[str, System] = {"ours": ours, "bare": bare, **PEERS}


def held_out_loss(model: torch.nn.Module, documents: Documents) -> float:
    """Mean loss of a token in nats, each document alone, in fp32."""
    model.eval()
    with torch.no_grad():
        ids = [torch.tensor(document)[None] for document in documents]
        sums = [float(model(input_ids=i, labels=i).loss) * (i.numel() - 1) for i in ids]
    return sum(sums) / sum(i.numel() - 1 for i in ids)


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating point operations per CPU second of a large matrix product: the median of a few."""
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = []
    for _ in range(GEMM_REPEATS):
        started = time.process_time()
        torch.mm(left, right)
        seconds.append(time.process_time() - started)
    return 2 * GEMM_SIZE**3 / sorted(seconds)[GEMM_REPEATS // 2]


def _autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    plan = json.loads((options.work / "plan.json").read_text())
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    before = gemm_rate(dtype)
    result = SYSTEMS[options.system](options.work, plan, options, CLOCK.start)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # DeepSpeed calls its optimizer once for each of its parts, so there may be more marks than steps.
    tokens, inside_s = result["tokens"], result.get("inside_s")
    steps = min(len(CLOCK.cpu_s) - 1, len(tokens))
    wall_s = CLOCK.wall_s[-1] - CLOCK.wall_s[0]
    held_out = read_documents(
        options.work / "held_out.jsonl", AutoTokenizer.from_pretrained(options.work / "model"), 512
    )
    print(
        json.dumps(
            {
                "steps": steps,
                "tokens": sum(tokens[:steps]),
                "tokens_per_cpu_s": sum(tokens[:steps]) / (CLOCK.cpu_s[-1] - CLOCK.cpu_s[0]),
                "tokens_per_s": sum(tokens[:steps]) / wall_s,
                "outside": None if inside_s is None else 1 - inside_s / wall_s,
                "weights": sum(parameter.numel() for parameter in result["model"].parameters()),
                "loss": held_out_loss(result["model"], held_out) if plan["held_out"] else math.nan,
                "peak_bytes": peak_bytes,
                "gemm_per_cpu_s": [before, gemm_rate(dtype)],
            }
        )
    )


CLOCK = Clock()

if __name__ == "__main__":
    main()
