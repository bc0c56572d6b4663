"""How far is the memory that `trivet plan` foretells from what real runs take?

    python benchmarks/plan_error.py [--repeats 3] [--only full-ddp-large] [--measured FILE] [--output FILE]

Each setting is a real `trivet train` of a few steps with a model of random weights, on this machine's CPU: built or
loaded, evaluated, trained, saved. Both figures are its main rank's, without what the process takes before data and
model are there: libraries, and the connection between ranks. Runs differ, so the median of several counts. `--measured`
keeps what they took, so that a changed plan is compared with them without running them again. The table goes to
benchmarks/results/.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import train_work

from launch import config_file
from trainer.config import RunConfig
from trainer.plan import glibc
from trainer.plan.outlook import outlook
from trainer.plan.plan import Plan

STEPS = 2
MOST_ERROR = 0.15
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
LARGE = {"hidden_size": 896, "intermediate_size": 2432, "num_layers": 6, "num_heads": 14, "num_kv_heads": 7}


@dataclass(frozen=True)
class Setting:
    """One run. `parallel` of two processes, or single; `shape` of the model; `changes` to the config."""

    strategy: str
    parallel: str
    shape: str
    changes: tuple[str, ...] = ()
    note: str = ""

    @property
    def ranks(self) -> int:
        return 1 if self.parallel == "single" else 2

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.strategy, self.parallel, self.shape, self.note)))


LONG = ("batch.rows=16", "batch.max_length=512")
AGAIN = (*LONG, "optim.type=adafactor", "batch.activation_checkpointing=true")
SETTINGS = (
    Setting("scratch", "single", "small"),
    Setting("scratch", "single", "small", (*LONG, "precision.type=bf16"), "long bf16"),
    Setting("full", "ddp", "small", LONG, "long"),
    Setting("full", "zero2", "small", (*LONG, "batch.micro_rows=2"), "long accumulated"),
    Setting("adapter", "single", "small", LONG, "long"),
    Setting("linear_probe", "fsdp2", "small"),
    Setting("lora", "zero3", "small"),
    Setting("full", "single", "large"),
    Setting("full", "single", "large", AGAIN, "long again"),
    Setting("lora", "single", "large", LONG, "long"),
    Setting("lora", "ddp", "large", (*LONG, "batch.micro_rows=4"), "long accumulated"),
    Setting("partial", "ddp", "large"),
    Setting("full", "ddp", "large"),
    Setting("full", "zero1", "large"),
    Setting("full", "zero2", "large"),
    Setting("full", "zero3", "large"),
    Setting("full", "fsdp2", "large"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[setting.name for setting in SETTINGS], action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measured", type=Path, help="A JSON file: setting -> the bytes of each run that was made.")
    parser.add_argument("--output", type=Path, default=train_work.ROOT / "benchmarks" / "results" / "plan_error.md")
    options = parser.parse_args()
    has_some = options.measured is not None and options.measured.exists()
    measured: dict[str, list[int]] = json.loads(options.measured.read_text()) if has_some else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, sizes in (("small", SMALL), ("large", LARGE)):
            make_base(Path(folder), shape, sizes)
        for setting in SETTINGS:
            if setting.name in (options.only or [setting.name]):
                taken = measured.setdefault(setting.name, [])
                while len(taken) < options.repeats:
                    taken.append(measure(setting, Path(folder)))
                    if options.measured:
                        options.measured.write_text(json.dumps(measured))
                rows.append(row_of(setting, plan(setting, Path(folder)), taken))
                print(rows[-1], flush=True)
                options.output.write_text(page(rows))


def make_base(folder: Path, shape: str, sizes: dict[str, int]) -> None:
    """Write the config of a model of this shape, and a run of one step that makes it."""
    lines = [f"model: {{type: new, context_length: 512, {', '.join(f'{k}: {v}' for k, v in sizes.items())}}}"]
    common = (
        "objective: {type: causal_lm}\ndata: {type: embedded, max_rows: 400}\nevaluation: {max_rows: 4}\n"
        "batch: {rows: 4, max_length: 128}\nlog: {tensorboard: false}\n"
    )
    new = common + "\n".join([*lines, "tokenizer: {type: train, vocab_size: 4096}", "strategy: {type: scratch}"])
    (folder / f"{shape}-scratch.yaml").write_text(f"run: {{name: base-{shape}, dir: {folder}, steps: 1}}\n{new}\n")
    old = f"model: {{type: pretrained, path: {folder / f'base-{shape}' / 'model'}}}\nstrategy: {{type: full}}\n"
    (folder / f"{shape}.yaml").write_text(f"run: {{name: x, dir: {folder}, steps: {STEPS}}}\n{common}{old}")
    train([str(folder / f"{shape}-scratch.yaml")])


def words_of(setting: Setting, folder: Path) -> tuple[Path, list[str]]:
    """Return the config of a setting and what it overrides."""
    from_scratch = setting.strategy == "scratch"
    config = folder / f"{setting.shape}{'-scratch' if from_scratch else ''}.yaml"
    words = [f"run.name={setting.name.replace(' ', '-')}", f"run.steps={STEPS}", f"strategy.type={setting.strategy}"]
    if setting.strategy == "partial":
        words.append("strategy.train=[model.layers.4.*, model.layers.5.*]")
    return config, [*words, *setting.changes]


def measure(setting: Setting, folder: Path) -> int:
    """Return the most bytes that the run of a setting took, on top of the program."""
    config, words = words_of(setting, folder)
    shutil.rmtree(folder / setting.name.replace(" ", "-"), ignore_errors=True)
    train([str(config), *words, *(["--nproc", "2", "--parallel", setting.parallel] if setting.ranks > 1 else [])])
    result = json.loads((folder / setting.name.replace(" ", "-") / "result.json").read_text())
    return result["peak_memory_bytes"] - result["program_memory_bytes"]


def plan(setting: Setting, folder: Path) -> int:
    """Return the most bytes that a setting is planned to take, from its config alone."""
    config, words = words_of(setting, folder)
    loaded = config_file.load(config, words, RunConfig)
    found = outlook(loaded, world_size=setting.ranks, on_gpu=False).plans[setting.parallel]
    assert isinstance(found, Plan), found
    return glibc.taken_bytes(found)


def train(words: list[str]) -> None:
    """Run `trivet train` on one thread a process. Raises RuntimeError, with its last words, if it failed."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(train_work.ROOT),
    }  # fmt: skip
    command = [sys.executable, str(train_work.ROOT / "trivet.py"), "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=train_work.ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {' '.join(done.stderr.strip().splitlines()[-3:])}")


def row_of(setting: Setting, planned: int, measured: list[int]) -> str:
    median, least, most = statistics.median(measured), min(measured), max(measured)
    error = planned / median - 1
    mark = "" if abs(error) <= MOST_ERROR else " **beyond 15 %**"
    return (
        f"| {setting.strategy} | {setting.parallel} | {setting.shape} | {setting.note} | {planned / 1e9:.3f} "
        f"| {median / 1e9:.3f} ({least / 1e9:.3f} to {most / 1e9:.3f}) | {error:+.1%}{mark} |"
    )


NOTE = """
Where the error is beyond 15 %, it is the guess of what malloc keeps of its heap (trainer/plan/glibc.py), as far as is
known: too much where many small blocks come and go (adapter, activations computed again). That guess was one of four,
chosen with a first table in view, and is the same for every run; what DeepSpeed and FSDP2 take beside tensors was found
with the small runs, and holds for the large. The same run takes more or less from one time to the next, as the range
shows: no plan can be nearer.
"""


def page(rows: list[str]) -> str:
    sizes = "; ".join(
        f"{name}: {', '.join(f'{key} {value}' for key, value in shape.items())}"
        for name, shape in (("small", SMALL), ("large", LARGE))
    )
    names = ("strategy", "mode", "model", "note", "planned, GB", "measured, GB: median (least to most)", "error")
    header = f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
    return (
        f"# Planned and measured peak memory\n\n`python benchmarks/plan_error.py`; {train_work.conditions()}, "
        f"deepspeed {importlib.metadata.version('deepspeed')}.\n\n{header}" + "\n".join(rows) + "\n\n"
        f"Real runs of {STEPS} steps on the CPU, two processes but where the mode is single, one thread each. GB are "
        "10^9 bytes of the main rank's peak of resident memory, both without what the same process took before data "
        f"and model were there (about 0.45 GB). Llama in fp32, vocabulary 4,096; {sizes}. 4 rows of 128 tokens a step; "
        "long: 16 of 512; accumulated: 2 or 4 rows a pass; again: activations computed again, and Adafactor.\n" + NOTE
    )


if __name__ == "__main__":
    main()
