"""Groups of processes over gloo, started as `trivet train --nproc N --parallel X` starts them, and what they left.

A launch costs some twenty seconds of imports, so there is one for each mode, which does everything the mode has to
show; each test looks at one side of it. `Modes` holds what was launched in this session.
"""

import json
import os
import runpy
import shutil
import string
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from launch import config_file, processes

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
LONGEST_LAUNCH_S = 1200  # a hang, however slow the machine: nobody asserts on the time
CLOCKED = ("tokens_per_s", "flops_per_s", "data_wait_s", "memory_bytes", "elapsed_s")

MODES = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
OBJECTIVES = ("causal_lm", "masked_lm", "sft", "classification")
DECODERS = ("causal_lm", "sft")
STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {},
    "linear_probe": {},
    "partial": {"train": ["*layer*.1.*"]},
    "adapter": {"size": 3},
    "lora": {"rank": 3},
}
ALL = [(objective, strategy) for objective in OBJECTIVES for strategy in STRATEGIES]
STEPS, SAVED_AT = 3, 2  # of the runs that are compared, one for each objective and strategy
WHOLE_STEPS = 5  # of the run that is stopped and gone on with
# The sums run in another order: seen are 1.3e-7 for losses. A wrong share of a gradient or a stale weight gives 1e-3.
ROUNDING = 1e-5


def fast_cases(mode: str) -> list[tuple[str, str]]:
    """Each strategy once, the objectives in turn: over six modes every pair of mode, objective, strategy is there."""
    first = MODES.index(mode)
    return [(OBJECTIVES[(first + i) % len(OBJECTIVES)], strategy) for i, strategy in enumerate(STRATEGIES)]


def pytest_generate_tests(metafunc):
    """A test of a mode is one of every mode."""
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES)


class Modes:
    """Runs by name, trained in one process or by a group of a mode, each once a session."""

    all_cases, fast_cases = ALL, staticmethod(fast_cases)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._launched: dict[str, dict[str, Any]] = {}
        self._alone: set[str] = set()
        self._write_data()
        self._silenced = runpy.run_path(str(FOLDER / "silent.py"))["silenced"]

    # --- runs

    def config(self, name: str, objective: str = "sft", strategy: str = "full", **changes: dict[str, Any]) -> Path:
        """Write the config of a tiny run and return its path. Odd sizes: no tensor divides evenly among the ranks."""
        base = self.folder / ("decoder" if objective in DECODERS else "encoder")
        values = {
            "run": {"name": name, "dir": str(self.folder / "runs"), "steps": STEPS},
            "objective": {"type": objective},
            "model": {"type": "pretrained", "path": str(base)},
            "data": {
                "type": "files", "train": str(self.folder / "train.jsonl"),
                "validation": str(self.folder / "held-out.jsonl"),
            },
            "strategy": {"type": strategy, **STRATEGIES[strategy]},
            "optim": {"lr": 1e-2, "warmup_steps": 1, "max_grad_norm": 0.3},
            "batch": {"rows": 4, "micro_rows": 1, "max_length": 48},
            # Five rows for the ranks: one of them has nothing left to evaluate.
            "evaluation": {"max_rows": 5},
            "checkpoint": {"every": SAVED_AT, "keep": 9},
            "log": {"tensorboard": False},
        }  # fmt: skip
        for section, change in changes.items():
            values[section] = values.get(section, {}) | change
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def checkpoint(self, name: str, step: int) -> Path:
        return self.run_folder(name) / "checkpoints" / f"step-{step:08}"

    def alone(self, name: str, *arguments: Any, **changes: dict[str, Any]) -> str:
        """Train a run in this process, once; return its name."""
        from launch.train import main

        if name not in self._alone:
            path = self.config(name, *arguments, **changes)
            with self._silenced(name.startswith("silent")):
                assert main([str(path)]) == 0, name
            self._alone.add(name)
        return name

    def gone_on(self, name: str, origin: str, step: int, *arguments: Any, **changes: dict[str, Any]) -> str:
        """Train a run in this process from the checkpoint that another left at `step`; return its name."""
        self.as_if_killed_after(step, name, origin)
        return self.alone(name, *arguments, **changes, checkpoint={"reshard": True, "every": SAVED_AT})

    def as_if_killed_after(self, step: int, name: str, origin: str) -> None:
        """Make the folder of a run what a kill a little after the checkpoint at `step` would leave of another's."""
        folder = self.run_folder(name)
        shutil.copytree(self.checkpoint(origin, step), self.checkpoint(name, step))
        shutil.copy(self.run_folder(origin) / "metrics.jsonl", folder)
        status = {"format_version": 2, "state": "running", "code": None, "step": step, "reason": ""}
        (folder / "status.json").write_text(json.dumps(status))
        saved = config_file.read_yaml(self.folder / f"{origin}.yaml")
        saved["run"]["name"] = name
        (folder / "config.yaml").write_text(json.dumps(saved))

    def lines(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind in a run's metrics.jsonl, without what depends on the clock or the machine."""
        found = map(json.loads, (self.run_folder(name) / "metrics.jsonl").read_text().splitlines())
        kept = [line for line in found if line["kind"] == kind]
        return [{key: value for key, value in line.items() if key not in CLOCKED} for line in kept]

    def numbers(self, name: str, key: str) -> list[float]:
        """What a run logged under a name: `loss` and `grad_norm` of each step, `eval_loss` of each evaluation."""
        return [line[key] for line in self.lines(name, "eval" if key.startswith("eval_") else "train")]

    def check_same_numbers(self, name: str, expected: str) -> None:
        """Compare losses and norms of two runs, from the first step on."""
        for key in ("loss", "grad_norm", "eval_loss"):
            assert self.numbers(name, key) == pytest.approx(self.numbers(expected, key), rel=ROUNDING), (name, key)
        seen = [[line["total_tokens"] for line in self.lines(each, "train")] for each in (name, expected)]
        assert seen[0] == seen[1]

    # --- groups

    def launched(self, mode: str) -> dict[str, Any]:
        """Return what the ranks of the mode's one launch saw: a dict a rank, of `codes` and of `seen` by run."""
        if mode not in self._launched:
            self._launched[mode] = {}  # until it has worked
            self.alone("alone-whole", run={"steps": WHOLE_STEPS})
            paths: list[str | Path] = [self.config(f"{mode}-{o}-{s}", o, s) for o, s in fast_cases(mode)]
            paths.append(self.config(f"{mode}-whole", run={"steps": WHOLE_STEPS}))
            stopped = self.config(f"{mode}-stopped", run={"steps": WHOLE_STEPS}, checkpoint={"every": 100})
            paths += [f"{stopped}@2", stopped]
            self.as_if_killed_after(SAVED_AT, f"{mode}-from-alone", "alone-whole")
            paths.append(self.config(
                f"{mode}-from-alone", run={"steps": WHOLE_STEPS}, checkpoint={"reshard": True, "every": 4}
            ))  # fmt: skip
            silent = {"data": {"train": str(self.folder / "silent.jsonl")}, "run": {"steps": WHOLE_STEPS}}
            paths.append(self.config(f"silent-{mode}", **silent))
            # At this rate the first step is the best, and the model goes back to it.
            best = {"optim": {"lr": 0.5, "max_grad_norm": 50}, "evaluation": {"every": 1}, "checkpoint": {"best": True}}
            paths.append(self.config(f"{mode}-best", **best))
            self._launched[mode] = self.launch(mode, *paths)
        assert self._launched[mode], f"the launch of {mode} failed, as another test shows"
        return self._launched[mode]

    def launch(self, mode: str, *configs: str | Path, nproc: int = 2, expected: int = 0) -> dict[str, Any]:
        """Train configs one after the other in a world of `nproc`; return its log, and what each rank left."""
        return self.launch_script(mode, "worker.py", *configs, nproc=nproc, expected=expected)

    def launch_script(
        self, mode: str, name: str, *configs: str | Path, nproc: int = 2, expected: int = 0
    ) -> dict[str, Any]:
        """Run a script of this folder on configs in a world of `nproc`; return its log, and what each rank left."""
        results = self.folder / f"{mode}-{nproc}-{name.removesuffix('.py')}"
        argv, added = processes.accelerate_command(Path("CONFIG"), [], nproc=nproc, parallel=mode)
        assert argv[-3:] == ["-m", "launch.train", "CONFIG"]
        log = self.run([*argv[:-3], str(self.script(name)), str(results), *map(str, configs)], added, expected)
        noise = [line for line in log.splitlines() if "warning" in line.lower() or "mismatch" in line]
        assert expected or not noise, noise
        files = [Path(f"{results}.{rank}") for rank in range(nproc)]
        return {"log": log, "ranks": [json.loads(file.read_text()) for file in files if not expected]}

    @staticmethod
    def script(name: str) -> Path:
        """Return the path of what ranks run instead of `launch.train`."""
        return FOLDER / name

    @staticmethod
    def environment() -> dict[str, str]:
        """Return what every rank has in its environment."""
        inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
        return {"PYTHONPATH": os.pathsep.join([str(ROOT), *inherited]), "OMP_NUM_THREADS": "1"}

    def run(self, argv: list[str], added: dict[str, str], expected: int = 0) -> str:
        """Run a command in a group of its own until it ends with the expected code; return what it said."""
        log = self.folder / "launch.log"
        env = {**added, **self.environment()}
        with log.open("wb") as output, processes.Group(argv, env, output=output) as group:
            deadline = time.monotonic() + LONGEST_LAUNCH_S
            while group.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            code = group.poll()
        assert code == expected, f"ended with {code} (None: hung): {log.read_text()[-4000:]}"
        return log.read_text()

    # --- what they are made of

    def _write_data(self) -> None:
        random, words = Random(0), ["the", "quick", "brown", "fox", "returns", "a", "list", "of", "lines"]

        def said(low: int, high: int) -> str:
            return " ".join(random.choices(words, k=random.randint(low, high)))

        def rows(count: int) -> list[dict[str, str]]:
            kinds = ["noun", "verb", "other"]
            return [
                {"prompt": said(3, 3), "completion": said(1, 20), "text": said(2, 30), "label": random.choice(kinds)}
                for _ in range(count)
            ]

        self.folder.mkdir(exist_ok=True)
        for name, part in (("train", rows(37)), ("held-out", rows(5)), ("silent", rows(12))):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (self.folder / f"{name}.jsonl").write_text(text)
        _write_decoder(self.folder / "decoder")
        _write_encoder(self.folder / "encoder", words)


@pytest.fixture(scope="session")
def modes(tmp_path_factory):
    """What was launched in this session."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Modes(tmp_path_factory.mktemp("modes"))
    torch.set_num_threads(threads)


def _write_decoder(folder: Path) -> None:
    """A random Llama with tied embeddings and a tokenizer with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(["the quick brown fox returns a list of lines in every file"], 301, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=65, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_encoder(folder: Path, words: list[str]) -> None:
    """A random BERT without dropout, and its tokenizer: the words, and letters for all others."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(word for word in words if len(word) > 1)]
    numbered = {entry: number for number, entry in enumerate(entries)}
    tokenizer = BertTokenizer(vocab=numbered, eos_token="[SEP]", model_max_length=64)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
