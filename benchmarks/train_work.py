"""What the training benchmarks share: a model folder and texts to train it on, and runs in processes of their own."""

import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from trainer import corpus
from trainer.tokenizers import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BPE_ENTRIES = 4096  # of the tokenizer; a larger vocabulary only makes the model's head larger
PACKAGES = ("torch", "transformers", "accelerate", "trl")

# Small Llamas, and the shape of SmolLM2-135M: its weights change no timing, so random ones do.
SHAPES = {
    "2m": {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
           "num_attention_heads": 3, "num_key_value_heads": 3},
    "9m": {"vocab_size": 4096, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6,
           "num_attention_heads": 5, "num_key_value_heads": 5},
    "9m-49k": {"vocab_size": 49152, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6,
               "num_attention_heads": 5, "num_key_value_heads": 5},
    "37m": {"vocab_size": 4096, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 7,
            "num_attention_heads": 10, "num_key_value_heads": 5},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip
HELD_OUT = {shape: 8 if shape == "smollm2" else 40 for shape in SHAPES}  # documents, each read alone


@dataclass(frozen=True)
class Plan:
    """One pass over the texts: `rows` packed rows of `max_length` tokens a step, or as many `documents` padded."""

    steps: int
    rows: int
    documents: int
    max_length: int
    lr: float
    held_out: bool


def prepare(work: Path, shape: str, *, steps: int, documents: int, max_length: int, joined: bool, lr: float) -> Plan:
    """Write the model, the texts and the plan into `work`; return the plan.

    The texts are documents of this Python's standard library, cut at `max_length` tokens; `joined`: as many of them
    joined as give each text that length.
    """
    items = corpus.read_items()
    train, held_out = ([row["text"] for row in rows] for rows in corpus.split(corpus.documents(items)))
    tokenizer = train_tokenizer(train, BPE_ENTRIES, max_length + 1)
    rng = random.Random(0)
    rng.shuffle(train), rng.shuffle(held_out)
    train = ["\n".join(train[i : i + 60]) for i in range(0, len(train), 60)] if joined else train
    chosen = [_cut(text, tokenizer, max_length) for text in train[: steps * documents]]
    num_tokens = sum(len(ids) for ids in tokenizer(chosen)["input_ids"])
    rows = max(1, round(num_tokens / steps / max_length))
    plan = Plan(
        max(2, math.ceil(num_tokens / (rows * max_length))), rows, documents, max_length, lr, held_out=not joined
    )
    work.mkdir(parents=True)
    for name, texts in (
        ("train", chosen),
        ("held_out", [_cut(text, tokenizer, max_length) for text in held_out[: HELD_OUT[shape]]]),
    ):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (work / "plan.json").write_text(json.dumps(asdict(plan)))
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return plan


def run(system: str, work: Path, *, precision: str, seed: int, threads: int, python: str = sys.executable) -> dict:
    """Return what one run of `train_systems.py` measured. Raises RuntimeError, with its last words, if it failed."""
    command = [python, str(ROOT / "benchmarks" / "train_systems.py"), system, str(work), "--precision", precision]
    command += ["--seed", str(seed), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{system}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def conditions() -> str:
    """Return a line that says on what and with what a table was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"{_cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}, "
        f"commit {commit.strip() or 'unknown'}"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The text up to `max_length` - 1 tokens: with the end token after it no reader has to cut."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) < max_length else text[: offsets[max_length - 2][1]]
