"""Tiny data, a tiny base model and tiny runs, each made once a session; and cheap processes that may be killed."""

import json
import multiprocessing
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "returns",
    "a",
    "list",
    "of",
    "lines",
    "in",
    "every",
    "file",
    "that",
    "it",
    "has",
    "read",
    "before",
    "and",
    "after",
    "lunch",
]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_slim():
    """One thread (the machine is shared), no word from DeepSpeed, and this clone for child processes."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        if not torch.cuda.is_available():
            patch.setenv("DS_ACCELERATOR", "cpu")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """What users are refused: the scale of the loss is the same work on a CPU as on a GPU."""
    from trainer import modes

    monkeypatch.setattr(modes, "check_on_cpu", lambda config: None)


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Return a function that writes rows as a .jsonl file and returns its path."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def data_files(tmp_path_factory, write_rows) -> dict[str, dict[str, Any]]:
    """The data section of each objective: files with examples of very different lengths."""
    folder, random = tmp_path_factory.mktemp("data"), Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(random.choices(WORDS, k=random.randint(low, high)))

    def rows(objective: str, count: int) -> list[dict[str, Any]]:
        match objective:
            case "causal_lm" | "masked_lm":
                return [{"text": words(2, 30)} for _ in range(count)]
            case "sft":
                chats = [
                    [("user", words(1, 8)), ("assistant", words(1, 12))] * random.randint(1, 2) for _ in range(count)
                ]
                return [{"messages": [{"role": who, "content": text} for who, text in chat]} for chat in chats]
            case "token_classification":
                counts = [random.randint(1, 9) for _ in range(count)]
                return [
                    {"tokens": random.choices(WORDS, k=k), "tags": random.choices(["O", "B-X", "I-X"], k=k)}
                    for k in counts
                ]
            case _:
                return [{"text": words(1, 12), "label": random.choice(["noun", "verb", "other"])} for _ in range(count)]

    sections = {}
    for objective in ("causal_lm", "sft", "classification", "masked_lm", "token_classification"):
        train = write_rows(folder / f"{objective}.jsonl", rows(objective, 40))
        validation = write_rows(folder / f"{objective}-held-out.jsonl", rows(objective, 9))
        sections[objective] = {"type": "files", "train": str(train), "validation": str(validation)}
    return sections


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 entries with the project's chat template."""
    from trainer.tokenizers import train_tokenizer

    return train_tokenizer([" ".join(WORDS)], 300, 128)


@pytest.fixture(scope="session")
def wordpiece():
    """BERT's tokenizer with 76 entries: the words, and letters for all others."""
    import string

    from transformers import BertTokenizer

    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(word for word in WORDS if len(word) > 1)]
    numbered = {entry: number for number, entry in enumerate(entries)}
    return BertTokenizer(vocab=numbered, eos_token="[SEP]", model_max_length=64)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, tokenizer) -> str:
    """A folder with a random Llama (32 wide, 2 layers, tied embeddings) and its tokenizer, written by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model():
    """Return a function that makes a random model (16 wide, 2 blocks, 300 tokens) of a family, with a head."""
    import torch
    import transformers

    common = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    wide = {"intermediate_size": 32, **sizes}
    few_keys = {"num_key_value_heads": 1, **wide}
    configs: dict[str, dict[str, Any]] = {
        "Llama": {"tie_word_embeddings": True, **few_keys},
        "Mistral": few_keys,
        "Qwen2": few_keys,
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, **sizes},
        "GPTNeoX": wide,
        "Bert": wide,
        "Roberta": {**wide, "max_position_embeddings": 66},
        "DistilBert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
        "Mixtral": {"num_local_experts": 2, **few_keys},
    }

    def make(family: str, head: str) -> torch.nn.Module:
        """`head` is the end of an AutoModelFor... class of transformers; a classifier has three classes."""
        labels = {"num_labels": 3} if head.endswith("Classification") else {}
        config = getattr(transformers, f"{family}Config")(**common, **configs[family], **labels)
        torch.manual_seed(0)
        return getattr(transformers, f"AutoModelFor{head}").from_config(config).float()

    return make


@pytest.fixture
def base(base_model, tmp_path) -> Path:
    """A copy of the base model that a test may break."""
    return Path(shutil.copytree(base_model, tmp_path / "base"))


@pytest.fixture
def make_config(tmp_path, data_files, base_model):
    """Return a function that makes the config of a tiny run; `section={...}` keywords change what they name."""
    from trainer.config import RunConfig

    def make(objective: str = "causal_lm", strategy: str = "scratch", /, **changes: dict[str, Any]) -> RunConfig:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "run", "dir": str(tmp_path), "steps": 6},
            "objective": {"type": objective},
            "model": {"type": "pretrained", "path": base_model},
            "data": data_files[objective],
            "strategy": {"type": strategy},
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "batch": {"rows": 4, "max_length": 48},
            "evaluation": {"max_rows": 8},
            "checkpoint": {},
            "log": {"tensorboard": False},
        }
        if strategy == "scratch":
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
            values["model"] = {"type": "new", "context_length": 64, **sizes}
            values["tokenizer"] = {"type": "train", "vocab_size": 300}
        for section, change in changes.items():
            values[section] = {**values.get(section, {}), **change}
        return RunConfig.model_validate(values)

    return make


@pytest.fixture
def train():
    """Return a function that trains a config in this process and returns the exit code."""
    from launch.train import train

    return train


@pytest.fixture
def parts_of(monkeypatch):
    """Return a function that trains a config by the loop itself and returns what the run was made of, trained."""
    from launch import config_file
    from trainer import loop

    def train_and_keep(config, before=lambda parts: None):
        kept = []

        def build(config, *rest):
            kept.append(build_for_real(config, *rest))
            before(kept[-1])
            return kept[-1]

        build_for_real = loop.build
        monkeypatch.setattr(loop, "build", build)
        try:
            loop.train(config, config_file.to_yaml(config))
        finally:
            monkeypatch.setattr(loop, "build", build_for_real)
        return kept[0]

    return train_and_keep


@pytest.fixture
def read_lines():
    """Return a function that reads a run's metrics.jsonl, without what depends on the clock or the machine."""
    clocked = {"tokens_per_s", "flops_per_s", "data_wait_s", "memory_bytes", "elapsed_s"}

    def read(config) -> list[dict[str, Any]]:
        lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name not in clocked} for line in lines]

    return read


@pytest.fixture
def child(tmp_path):
    """Return a function that runs Python code in a process of its own, and returns its exit code and output.

    The processes are forked from a server that has imported the trainer once: a second each instead of ten. It may be
    a server that a test elsewhere started, without this folder's environment, so one thread is set here again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch.train", "trainer.loop", "deepspeed"])

    def run(code: str, *, timeout_s: float = 120) -> tuple[int, str]:
        script, output = tmp_path / "child.py", tmp_path / "child.txt"
        redirect = (
            f"import os\nos.dup2(os.open({str(output)!r}, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1); os.dup2(1, 2)\n"
            "import torch\ntorch.set_num_threads(1)\n"
        )
        script.write_text(redirect + code)
        process = context.Process(target=runpy.run_path, args=(str(script),), kwargs={"run_name": "__main__"})
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"still running after {timeout_s} s: {output.read_text()}")
        return process.exitcode, output.read_text()

    return run


@pytest.fixture
def train_child(child, tmp_path):
    """Return a function that trains a config in a process of its own, as `python -m launch.train` does.

    `act` is a statement that runs right after `step` has been logged, for example one that kills the process.
    """
    from launch import config_file

    def run(config, *, step: int = 0, act: str = "pass", timeout_s: float = 120) -> tuple[int, str]:
        (tmp_path / "child.yaml").write_text(config_file.to_yaml(config))
        return child(
            f"""
import signal, sys
from trainer.metrics import RunLog

log_for_real = RunLog.train

def log(self, step, **fields):
    log_for_real(self, step, **fields)
    if step == {step}:
        {act}

RunLog.train = log
from launch.train import main
sys.exit(main([{str(tmp_path / "child.yaml")!r}]))
""",
            timeout_s=timeout_s,
        )

    return run
