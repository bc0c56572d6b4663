"""How long does an export take, and how much memory, beside onnxruntime-genai's builder and transformers' exporter?

    python benchmarks/export_speed.py [--genai PYTHON] [--shape NAME ...] [--rounds 3]

PYTHON is an interpreter that has onnxruntime-genai beside torch and transformers; without it that peer is left out.
Each export is a process of its own, from start to files on disk, in fp32 on the CPU; the systems take turns. Neither
peer proves anything, so ours is timed twice: the graph alone, which is what they write, and the whole command with its
proof. The table goes to benchmarks/results/export_speed.md.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES = {  # Llama: layers, hidden size, heads, KV heads, MLP, vocabulary, tied
    "100M: 12 layers of 768": (12, 768, 12, 4, 2048, 32000, False),
    "135M: 12 layers of 896": (12, 896, 14, 7, 2400, 32000, True),
    "135M: 30 layers of 576": (30, 576, 9, 3, 1536, 49152, True),
    "540M: 18 layers of 1536": (18, 1536, 12, 4, 4096, 32000, False),
}
GRAPH_ALONE = """
import sys
from pathlib import Path
from launch import collecting
collecting.rarely()  # as the command does
from serving.export import Options, decoder
from serving.export.source import open_source
source = open_source(Path(sys.argv[1]))
source.load_tokenizer()
Path(sys.argv[2]).mkdir()
decoder.write_graph(source.load(), source, Options(), Path(sys.argv[2]) / "model.onnx")
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.ones(2, 8, dtype=torch.long)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
runner = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True), multi_token_decode=True)
runner.save_pretrained(sys.argv[2])
"""

GENAI = """
import runpy, sys
model, out = sys.argv[1:]
sys.argv = ["builder", "-i", model, "-o", out, "-p", "fp32", "-e", "cpu", "-c", out + "-cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


def systems(genai: str | None) -> dict[str, list[str]]:
    """Return the command of each, which is given the model and where the export goes."""
    found = {
        "ours, the graph alone": [sys.executable, "-c", GRAPH_ALONE],
        "ours, proven and published": [sys.executable, "-m", "launch.cli", "export"],
        "transformers' exporter": [sys.executable, "-c", TRANSFORMERS],
    }
    if genai:
        found["onnxruntime-genai's builder"] = [genai, "-c", GENAI]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "export_speed.md")
    options = parser.parse_args()
    lines = [
        "| Llama in fp32 | system | seconds, median (lowest to highest) | peak memory, GB | of the weights |",
        "|---|---|---|---|---|",
    ]
    for shape in options.shape or SHAPES:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            weights = save_model(Path(folder) / "model", shape)
            lines += rows_of(shape, weights, take_turns(systems(options.genai), Path(folder), options.rounds))
        print("\n".join(lines), flush=True)
    options.output.write_text(report(lines, options.rounds))


def save_model(folder: Path, shape: str) -> int:
    """Save a random Llama with a small tokenizer to `folder`; return how many bytes its weights have in fp32."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layers, hidden, heads, kv_heads, mlp, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def take_turns(commands: dict[str, list[str]], folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds and the peak memory in GB of each system in each round."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            measured[name].append(measure([*command, str(folder / "model"), str(folder / "out")]))
            shutil.rmtree(folder / "out")
    return measured


def measure(command: list[str]) -> tuple[float, float]:
    """Return the seconds that a command took, and the most memory that one of its processes held, in GB."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said.decode()[-2000:])
    return time.perf_counter() - started, used.ru_maxrss * 1024 / 1e9


def rows_of(shape: str, weights: int, measured: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Return a line of the table for each system."""
    rows = []
    for name, each in measured.items():
        seconds, memory = [one[0] for one in each], statistics.median(one[1] for one in each)
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        rows.append(
            f"| {shape}, {weights / 1e9:.2f} GB | {name} | {spread} | {memory:.2f} | {memory * 1e9 / weights:.2f}x |"
        )
    return rows


def report(lines: list[str], rounds: int) -> str:
    """Return the table with what it was measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    names = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    about = (
        f"`python benchmarks/export_speed.py --rounds {rounds} --genai PYTHON` at commit {commit}, "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}."
    )
    caveat = (
        "The machine is shared: compare within a table, not between runs. Peak memory is that of the largest process, "
        "file pages of the weights included; a proof of a large model is a process of its own."
    )
    return "\n\n".join(["# Exports beside the peers", about, "\n".join(lines), caveat]) + "\n"


if __name__ == "__main__":
    main()
