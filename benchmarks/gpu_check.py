"""What only a machine with a GPU can show, as one table to paste back: every `gpu` test, decoding and training speed.

    make gpu-check          (or: python benchmarks/gpu_check.py [--output FILE] [--skip-speed])

Ends with 2, and one line that says why, where there is no GPU that can be used; with 1 where a test failed.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
FORMATS = ("fp32", "fp16", "bf16")
SLOTS = (1, 8, 32)
NUM_PROMPTS, NUM_NEW_TOKENS, ROUNDS = 32, 64, 3
TRAIN = ROOT / "configs" / "pretrain_tiny.yaml"

Row = tuple[str, str, str]  # what, how it went, figures or the reason


def why_no_gpu() -> str | None:
    """Return what keeps this machine from using a GPU, None where nothing does."""
    import torch

    from serving.export.providers import reason_against

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if reason := reason_against("fp32", "cuda"):
        return f"torch finds {torch.cuda.get_device_name()}, but {reason}"
    return None


def tests(report: Path) -> list[Row]:
    """Run every test marked `gpu`; return a row for each."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", str(ROOT / "tests")]
    subprocess.run(command, cwd=ROOT, check=False)
    return rows_of(report)


def rows_of(report: Path) -> list[Row]:
    """Return a row for each test of a JUnit report: passed, or how it ended and the first line of why."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        why = "" if ended is None else (ended.get("message") or "").strip().partition("\n")[0]
        outcome = "passed" if ended is None else {"failure": "FAILED", "error": "FAILED"}.get(ended.tag, "skipped")
        rows.append((f"test: {case.get('name', '?').replace('_', ' ')}", outcome, why))
    return rows or [("test", "FAILED", "no test ran")]


def decoding(folder: Path) -> Iterator[Row]:
    """Export the small model in every format for CUDA, and yield how fast each decodes beside `generate`."""
    if not MODEL.is_dir():
        subprocess.run([sys.executable, "-m", "launch.pretrained"], cwd=ROOT, check=True)
    yield tried("decode: transformers generate, bf16, one padded batch", _generate)
    for dtype in FORMATS:
        onnx_dir = folder / dtype
        yield tried(
            f"export and proof on cuda: {dtype}", lambda dtype=dtype, onnx_dir=onnx_dir: _export(dtype, onnx_dir)
        )
        for slots in SLOTS:
            if onnx_dir.is_dir():
                yield tried(f"decode: engine, {dtype}, {slots} slots", lambda d=onnx_dir, s=slots: _decode(d, s))


def tried(what: str, measure: Callable[[], str]) -> Row:
    """Return a row with what `measure` finds, or with its error: one that fails must not cost the others."""
    print(f"gpu-check: {what}", file=sys.stderr, flush=True)
    try:
        return what, "done", measure()
    except Exception as error:
        return what, "FAILED", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _export(dtype: str, onnx_dir: Path) -> str:
    from serving.export import Options, export_model

    record = export_model(MODEL, onnx_dir, Options(dtype=dtype, optimize_for="cuda"))
    assert record["provider"] == "cuda", f"proven on {record['provider']}"
    check = record["checks"]["logits_one_by_one"]
    return f"logits differ by {check['max_abs_diff']:.2e}, accepted {check['tolerance']:.2e}; {record['seconds']} s"


def _decode(onnx_dir: Path, slots: int) -> str:
    from launch.evidence import held_out_prompts
    from serving.engine import Engine
    from serving.request import Sampling
    from serving.text import Text

    prompts = held_out_prompts(Text.open(onnx_dir), NUM_PROMPTS)
    engine = Engine.open(onnx_dir, provider="cuda", slots=slots)
    return _speed(lambda: engine.generate(prompts, Sampling(max_new_tokens=NUM_NEW_TOKENS, ignore_end=True)))


def _generate() -> str:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from launch.evidence import generate, held_out_prompts
    from serving.text import Text

    prompts = held_out_prompts(Text.open(MODEL), NUM_PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval().cuda()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    return _speed(lambda: generate(model, prompts))


def _speed(run: Callable[[], object]) -> str:
    """Return the new tokens per second: the median of a few rounds after one that warms up."""
    speeds = []
    for number in range(ROUNDS + 1):
        started = time.perf_counter()
        run()
        if number:
            speeds.append(NUM_PROMPTS * NUM_NEW_TOKENS / (time.perf_counter() - started))
    return f"{statistics.median(speeds):,.0f} new tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})"


def training(folder: Path) -> Iterator[Row]:
    """Train the tiny config in fp32 and bf16; yield how fast that went."""
    for precision in ("fp32", "bf16"):
        yield tried(f"train: {TRAIN.name}, {precision}", lambda precision=precision: _train(folder, precision))


def _train(folder: Path, precision: str) -> str:
    overrides = [f"run.dir={folder}", f"run.name={precision}", f"precision.type={precision}", "run.steps=50"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(TRAIN), *overrides], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]
    result = json.loads((folder / precision / "result.json").read_text())
    return f"{result['tokens_per_s']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, with what they were found on."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    names = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if _is_installed(name)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    where = f"{device}, {platform.machine()}, Python {platform.python_version()}, {', '.join(versions)}"
    lines = [f"{where}, commit {commit.strip() or 'unknown'}", "", "| what | outcome | found |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)])


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="where the table goes too")
    parser.add_argument("--skip-speed", action="store_true", help="the tests alone")
    arguments = parser.parse_args()
    if reason := why_no_gpu():
        print(f"gpu-check: no GPU here: {reason}; nothing was run", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        rows = tests(Path(scratch) / "report.xml")
        if not arguments.skip_speed:
            rows += [*decoding(Path(scratch)), *training(Path(scratch))]
    shown = table(rows)
    print(shown)
    if arguments.output:
        arguments.output.write_text(shown + "\n", encoding="utf-8")
    return int(any(outcome == "FAILED" for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
