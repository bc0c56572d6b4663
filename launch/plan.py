"""`trivet plan`: which parallel modes fit on so many GPUs, the cheapest that does, and how much there is to compute."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from launch import duration
from serving.directory import BadInput
from trainer.config import RunConfig
from trainer.out_of_memory import in_words
from trainer.plan import glibc
from trainer.plan.advice import advice
from trainer.plan.outlook import Outlook, outlook
from trainer.plan.plan import Plan

_RESERVED_BYTES = 2**30  # of a GPU: CUDA, its libraries' work space and NCCL; assumed
_SHOWN = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "evaluation")
_WIDTH = 120


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


@dataclass(frozen=True)
class Answer:
    """`needed_bytes` by mode, from the cheapest, of those that the config goes with."""

    config: RunConfig
    asked: Asked
    found: Outlook
    needed_bytes: dict[str, int]

    @property
    def plans(self) -> dict[str, Plan]:
        return {mode: each for mode, each in self.found.plans.items() if isinstance(each, Plan)}

    @property
    def recommended(self) -> str | None:
        """The cheapest mode that fits."""
        return next((mode for mode in self.needed_bytes if self.fits(mode)), None)

    @property
    def step_flops(self) -> float:
        return self.found.flops_per_token * self.found.tokens_per_step

    @property
    def flops(self) -> float:
        return self.step_flops * self.config.run.steps

    @property
    def time_s(self) -> float | None:
        if self.asked.tflops is None:
            return None
        return self.flops / (self.asked.ranks * self.asked.tflops * 1e12 * self.asked.mfu)

    def fits(self, mode: str) -> bool:
        return self.needed_bytes[mode] <= self.asked.limit_bytes


def plan(path: Path, overrides: list[str], config: RunConfig, asked: Asked, *, json_output: bool = False) -> int:
    """Print the plan; return 0 where some mode fits, else 1. Raises BadInput for a run that cannot be at all."""
    _check(asked)
    found = outlook(config, world_size=asked.ranks, on_gpu=not asked.on_cpu)
    needed = {mode: glibc.taken_bytes(each) for mode, each in found.plans.items() if isinstance(each, Plan)}
    answer = Answer(config, asked, found, needed)
    if json_output:
        print(json.dumps(_as_json(answer)))
    else:
        _show(answer, shlex.join([str(path), *overrides]))
    return 0 if answer.recommended else 1


def _check(asked: Asked) -> None:
    for option, value in (("--gpu-memory-gb", asked.memory_gb), ("--gpu-tflops", asked.tflops), ("--mfu", asked.mfu)):
        if value is not None and not 0 < value < float("inf"):
            raise BadInput(f"{option}: {value:g} found; accepted: more than 0; give what the GPU has")
    if asked.mfu > 1:
        raise BadInput(f"--mfu: {asked.mfu:g} found; accepted: more than 0, at most 1; 0.4 is 40 % of the peak")
    if asked.limit_bytes <= 0:
        raise BadInput(
            f"--gpu-memory-gb: {asked.memory_gb:g} found; accepted: more than {_RESERVED_BYTES / 10**9:.1f}, which "
            "CUDA and its libraries take; give what one GPU has"
        )


def _as_json(answer: Answer) -> dict[str, Any]:
    found = answer.found
    modes: dict[str, Any] = {mode: {"refused": each} for mode, each in found.plans.items() if isinstance(each, str)}
    for mode, each in answer.plans.items():
        modes[mode] = {
            "needed_bytes": answer.needed_bytes[mode],
            "fits": answer.fits(mode),
            "tensor_bytes": each.total_bytes,
            "host_bytes": each.host_bytes,
            "micro_rows": each.micro_rows,
            "by_term": each.by_term,
            "most_by_phase": each.most_by_phase,
        }
    return {
        "modes": modes,
        "recommended": answer.recommended,
        "learning": found.learning,
        "total": found.total,
        "tokens_per_step": found.tokens_per_step,
        "steps": answer.config.run.steps,
        "flops_per_token": found.flops_per_token,
        "flops": answer.flops,
        "time_s": answer.time_s,
    }


def _show(answer: Answer, words: str) -> None:
    found, asked = answer.found, answer.asked
    print(
        f"{answer.config.objective.type}, {answer.config.strategy.type}: {found.learning:,} of {found.total:,} weights "
        f"learn; {answer.config.precision.type}; {_machines(asked)} of {asked.memory_gb:g} GB"
    )
    Console(width=_WIDTH).print(_table(answer))
    for mode, each in found.plans.items():
        if isinstance(each, str):
            print(f"{mode}: {each}")
        elif each.host_bytes:
            print(f"{mode}: and {in_words(each.host_bytes)} of the machine's memory for each process")
    if found.doubt:
        print(f"warning: {found.doubt}")
    print(_recommendation(answer, words))
    print(_work(answer))


def _machines(asked: Asked) -> str:
    one, several = ("process", "processes") if asked.on_cpu else ("GPU", "GPUs")
    return f"{asked.ranks} {one if asked.ranks == 1 else several}"


def _table(answer: Answer) -> Table:
    table = Table(Column("mode", no_wrap=True), *_SHOWN, "most at once", "fits", box=box.SIMPLE_HEAD)
    for mode, each in answer.plans.items():
        shown = [in_words(each.by_term[term]) if each.by_term[term] else "" for term in _SHOWN]
        table.add_row(mode, *shown, in_words(answer.needed_bytes[mode]), "yes" if answer.fits(mode) else "no")
    return table


def _recommendation(answer: Answer, words: str) -> str:
    if (mode := answer.recommended) is not None:
        options = "" if mode == "single" else f" --nproc {answer.asked.ranks} --parallel {mode}"
        return f"recommended: {mode}, the cheapest that fits: trivet train {words}{options}"
    if not answer.needed_bytes:
        return "no mode goes with this config"
    limit = answer.asked.limit_bytes
    least = min(answer.needed_bytes, key=lambda mode: answer.needed_bytes[mode])
    # What is taken beside the tensors is taken whatever the settings are.
    beside = answer.needed_bytes[least] - answer.plans[least].total_bytes
    lower = advice(answer.plans[least], answer.config, limit - beside)
    return (
        f"nothing fits: {least} needs least, {in_words(answer.needed_bytes[least])} of {in_words(limit)}; use more "
        f"{'processes' if answer.asked.on_cpu else 'GPUs'}, or {lower}"
    )


def _work(answer: Answer) -> str:
    found, asked, steps = answer.found, answer.asked, answer.config.run.steps
    time = "give --gpu-tflops for the time it takes"
    if answer.time_s is not None:
        time = f"{duration.in_words(answer.time_s)} at {asked.mfu:.0%} of {asked.ranks} x {asked.tflops:g} TFLOP/s"
    return (
        f"a step: {found.tokens_per_step:,.0f} tokens, {answer.step_flops:.3g} FLOP; {steps:,} steps: {found.reads}, "
        f"{answer.flops:.3g} FLOP; {time}"
    )
