"""How fast does the engine decode beside transformers' `generate`, on the same model, prompts and machine?

    python benchmarks/decode_speed.py runs/sft_lora/model onnx/assistant [--rounds 5]

The systems take turns, so that a machine whose speed drifts is as unfair to one as to the other; the table has medians
over the rounds and the ratio to `generate` round by round. Prompts are part of the time.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from launch.evidence import generate, held_out_prompts
from serving.engine import Engine
from serving.request import Sampling
from serving.text import Text

NUM_PROMPTS = 16
BASELINE = "generate, one padded batch"


def systems(model_dir: Path, onnx_dir: Path, num_new_tokens: int) -> dict[str, Callable[[], object]]:
    """Return what is compared: each call decodes every prompt greedily, end token ignored."""
    prompts = held_out_prompts(Text.open(onnx_dir), NUM_PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=num_new_tokens, eos_token_id=None, pad_token_id=0
    )
    sampling = Sampling(max_new_tokens=num_new_tokens, ignore_end=True)
    engines = {slots: Engine.open(onnx_dir, slots=slots) for slots in (1, 8, 16)}
    return {
        BASELINE: lambda: generate(model, prompts),
        "generate, one by one": lambda: [generate(model, [prompt]) for prompt in prompts],
        **{
            f"engine, {slots} slot{'s' if slots > 1 else ''}": lambda engine=engine: engine.generate(prompts, sampling)
            for slots, engine in engines.items()
        },
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model_dir", type=Path)
    arguments.add_argument("onnx_dir", type=Path)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--new-tokens", type=int, default=32)
    options = arguments.parse_args()
    compared = systems(options.model_dir, options.onnx_dir, options.new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(options.rounds + 1):
        for name, run in compared.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    print(f"{_conditions()}; {NUM_PROMPTS} prompts, {options.new_tokens} new tokens each, {options.rounds} rounds\n")
    print("| system | new tokens/s, median (lowest to highest) | times the baseline, median |")
    print("|---|---|---|")
    for name, taken in seconds.items():
        speeds = sorted(NUM_PROMPTS * options.new_tokens / each for each in taken)
        ratio = statistics.median(base / each for base, each in zip(seconds[BASELINE], taken, strict=True))
        print(f"| {name} | {statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | {ratio:.2f} |")


def _conditions() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "onnxruntime")]
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, {', '.join(versions)}, commit {commit or 'unknown'}"


if __name__ == "__main__":
    main()
