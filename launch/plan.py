"""`trivet plan`: which parallel modes fit on so many GPUs, the cheapest that does, and how much there is to compute."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from serving.directory import BadInput
from trainer.config import RunConfig
from trainer.out_of_memory import in_words
from trainer.plan import glibc
from trainer.plan.advice import advice
from trainer.plan.outlook import Outlook, outlook
from trainer.plan.plan import Plan

_RESERVED_BYTES = 2**30  # of a GPU: CUDA, its libraries' work space and NCCL; assumed
_SHOWN = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "evaluation")


@dataclass(frozen=True)
class Asked:
    """What the run is planned for. `memory_gb` (10**9 bytes) is a GPU's, or with `on_cpu` a process's."""

    ranks: int
    memory_gb: float
    on_cpu: bool = False
    tflops: float | None = None  # of one GPU, at most
    mfu: float = 0.4

    @property
    def limit_bytes(self) -> int:
        return int(self.memory_gb * 10**9) - (0 if self.on_cpu else _RESERVED_BYTES)


def plan(path: Path, overrides: list[str], config: RunConfig, asked: Asked, *, json_output: bool = False) -> int:
    """Print the plan; return 0 where some mode fits, else 1. Raises BadInput for a run that cannot be at all."""
    _check(config, asked)
    found = outlook(config, world_size=asked.ranks, on_gpu=not asked.on_cpu)
    needed = {mode: glibc.taken_bytes(each) for mode, each in found.plans.items() if isinstance(each, Plan)}
    fitting = next((mode for mode, size in needed.items() if size <= asked.limit_bytes), None)
    if json_output:
        print(json.dumps(_as_json(found, needed, fitting, config, asked)))
    else:
        _show(path, overrides, found, needed, fitting, config, asked)
    return 0 if fitting else 1


def _check(config: RunConfig, asked: Asked) -> None:
    for option, value in (("--gpu-memory-gb", asked.memory_gb), ("--gpu-tflops", asked.tflops), ("--mfu", asked.mfu)):
        if value is not None and value <= 0:
            raise BadInput(f"{option}: {value:g} found; accepted: more than 0; give what the GPU has")
    if asked.mfu > 1:
        raise BadInput(f"--mfu: {asked.mfu:g} found; accepted: more than 0, at most 1; 0.4 is 40 % of the peak")
    if asked.limit_bytes <= 0:
        raise BadInput(
            f"--gpu-memory-gb: {asked.memory_gb:g} found; accepted: more than {_RESERVED_BYTES / 10**9:.1f}, which CUDA "
            "and its libraries take; give what one GPU has"
        )


def _time_s(found: Outlook, config: RunConfig, asked: Asked) -> float | None:
    if asked.tflops is None:
        return None
    return _flops(found, config) / (asked.ranks * asked.tflops * 1e12 * asked.mfu)


def _flops(found: Outlook, config: RunConfig) -> float:
    return found.flops_per_token * found.tokens_per_step * config.run.steps


def _as_json(found: Outlook, needed: dict[str, int], fitting: str | None, config: RunConfig, asked: Asked) -> dict:
    modes = {
        mode: {"refused": each}
        if isinstance(each, str)
        else {
            "needed_bytes": needed[mode],
            "tensor_bytes": each.total_bytes,
            "fits": needed[mode] <= asked.limit_bytes,
            "micro_rows": each.micro_rows,
            "by_term": each.by_term,
            "most_by_phase": each.most_by_phase,
        }
        for mode, each in found.plans.items()
    }
    return {
        "modes": modes,
        "recommended": fitting,
        "learning": found.learning,
        "total": found.total,
        "tokens_per_step": found.tokens_per_step,
        "steps": config.run.steps,
        "flops_per_token": found.flops_per_token,
        "flops": _flops(found, config),
        "time_s": _time_s(found, config, asked),
    }


def _show(
    path: Path, overrides: list[str], found: Outlook, needed: dict[str, int], fitting: str | None, config: RunConfig,
    asked: Asked,
) -> None:  # fmt: skip
    what = f"process{'es' if asked.ranks > 1 else ''}" if asked.on_cpu else f"GPU{'s' if asked.ranks > 1 else ''}"
    print(
        f"{config.objective.type}, {config.strategy.type}: {found.learning:,} of {found.total:,} weights learn; "
        f"{config.precision.type}; {asked.ranks} {what} of {asked.memory_gb:g} GB"
    )
    Console(width=120).print(_table(found, needed, asked))
    for mode, each in found.plans.items():
        if isinstance(each, str):
            print(f"{mode}: {each}")
        elif each.host_bytes:
            print(f"{mode}: and {in_words(each.host_bytes)} of the machine's memory for each process")
    if found.doubt:
        print(f"warning: {found.doubt}")
    print(_recommendation(path, overrides, found, needed, fitting, config, asked))
    print(_work(found, config, asked))


def _table(found: Outlook, needed: dict[str, int], asked: Asked) -> Table:
    table = Table("mode", *_SHOWN, "most at once", "fits", box=box.SIMPLE_HEAD)
    for mode, each in found.plans.items():
        if isinstance(each, str):
            continue
        shown = [in_words(each.by_term[term]) if each.by_term[term] else "" for term in _SHOWN]
        table.add_row(mode, *shown, in_words(needed[mode]), "yes" if needed[mode] <= asked.limit_bytes else "no")
    return table


def _recommendation(
    path: Path, overrides: list[str], found: Outlook, needed: dict[str, int], fitting: str | None, config: RunConfig,
    asked: Asked,
) -> str:  # fmt: skip
    words = shlex.join([str(path), *overrides])
    if fitting is not None:
        options = "" if fitting == "single" else f" --nproc {asked.ranks} --parallel {fitting}"
        return f"recommended: {fitting}, the cheapest that fits: trivet train {words}{options}"
    if not needed:
        return "no mode goes with this config"
    smallest = min(needed, key=lambda mode: needed[mode])
    least = found.plans[smallest]
    assert isinstance(least, Plan)
    return (
        f"nothing fits: {smallest} needs least, {in_words(needed[smallest])} of {in_words(asked.limit_bytes)}; more GPUs, "
        f"or {advice(least, config, asked.limit_bytes)}"
    )


def _work(found: Outlook, config: RunConfig, asked: Asked) -> str:
    steps, seconds = config.run.steps, _time_s(found, config, asked)
    a_step = found.flops_per_token * found.tokens_per_step
    time = "give --gpu-tflops for the time it takes"
    if seconds is not None:
        time = f"{_duration(seconds)} at {asked.mfu:.0%} of {asked.ranks} x {asked.tflops:g} TFLOP/s"
    return (
        f"a step: {found.tokens_per_step:,.0f} tokens, {a_step:.3g} FLOP; {steps:,} steps: {found.reads}, "
        f"{a_step * steps:.3g} FLOP; {time}"
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.0f} h {minutes:.0f} min" if hours else f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
