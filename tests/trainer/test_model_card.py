"""The card of every kind of model has Python that runs as it is, in a process of its own, and answers as the model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from serving import directory, exportable
from serving.directory import DirectoryError
from serving.export.source import open_source
from trainer import model_dir
from trainer.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "quick", "brown", "fox", "returns", "a", "list", "of", "lines", "in", "every", "file"]
CASES = {
    "causal_lm": {"type": "causal_lm"},
    "sft": {"type": "sft"},
    "masked_lm": {"type": "masked_lm"},
    "classification": {"type": "classification"},
    "multi_label": {"type": "classification", "problem": "multi_label"},
    "regression": {"type": "classification", "problem": "regression"},
    "pairs": {"type": "classification"},
    "pairs-of-a-decoder": {"type": "classification"},
    "token_classification": {"type": "token_classification"},
    "adapter": {"type": "classification"},
}
# A fresh process takes 10 s to import transformers: of cards that hardly differ one is asked each time.
ASKED_EACH_TIME = ("causal_lm", "pairs", "token_classification")
ASKED = [case if case in ASKED_EACH_TIME else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def row(case: str, random: Random) -> dict:
    words = random.choices(WORDS, k=random.randint(1, 9))
    if case == "sft":
        return {"messages": [{"role": "user", "content": "the file"}, {"role": "assistant", "content": words[0]}]}
    several = random.sample(["a", "b", "c"], random.randint(0, 2))
    label = {"multi_label": several, "regression": random.random()}.get(case, random.choice(["noun", "verb"]))
    tags = [random.choice(["O", "B-X", "I-X"]) for _ in words]
    return {"text": " ".join(words), "pair": words[0], "label": label, "tokens": words, "tags": tags}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_model):
    """Return a function that gives the run folder of a tiny trained model of a case, each made once."""
    from launch.train import train

    folder, made = tmp_path_factory.mktemp("cards"), {}

    def run(case: str) -> Path:
        if case not in made:
            random, rows = Random(0), folder / f"{case}.jsonl"
            rows.write_text("".join(json.dumps(row(case, random)) + "\n" for _ in range(24)))
            made[case] = config_of(case, folder, rows, base_model)
            assert train(made[case]) == 0
        return made[case].run.folder

    return run


def config_of(case: str, folder: Path, rows: Path, base_model: str) -> RunConfig:
    decoder = case in ("causal_lm", "sft", "pairs-of-a-decoder")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "context_length": 128}
    new = {"type": "new", "architecture": "decoder" if decoder else "encoder", **sizes}
    pretrained = case == "adapter"
    return RunConfig.model_validate({
        "run": {"name": case, "dir": str(folder), "steps": 2},
        "objective": CASES[case],
        "model": {"type": "pretrained", "path": base_model} if pretrained else new,
        "tokenizer": {"type": "pretrained"} if pretrained else {"type": "train", "vocab_size": 300},
        "data": {"type": "files", "train": str(rows), "validation": str(rows)}
        | ({"text_pair": "pair"} if case.startswith("pairs") else {}),
        "strategy": {"type": "adapter", "size": 4} if pretrained else {"type": "scratch"},
        "batch": {"rows": 4, "max_length": 64},
        "log": {"tensorboard": False},
    })  # fmt: skip


def python_of(card: Path) -> str:
    [found] = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return found


def answer(folder: Path) -> list[str]:
    """Run the card's Python as a user would, in the model directory; return the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", python_of(folder / "README.md")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", ASKED)
def test_the_python_of_the_card_runs_in_a_fresh_process(trained, case):
    lines = answer(trained(case) / "model")
    labels = directory.read_manifest(trained(case) / "model", "model")["labels"]
    if case in ("causal_lm", "sft"):
        return  # a random model may well say nothing
    if case == "token_classification":
        assert [line.split(" ")[0] for line in lines] == ["The", "words", "of", "a", "sentence", "."]
        assert {line.split(" ")[1] for line in lines} <= set(labels)
    elif case == "masked_lm":
        assert len(lines) == 5
    elif case == "regression":
        float(*lines)
    else:
        assert [line.rpartition(": ")[0] for line in lines] == labels


def numbers(lines: list[str]) -> torch.Tensor:
    return torch.tensor([float(line.rpartition(" ")[2]) for line in lines])


@pytest.mark.parametrize(
    "case", ["pairs", *(pytest.param(case, marks=pytest.mark.slow) for case in ("pairs-of-a-decoder", "adapter"))]
)
def test_what_it_prints_is_what_the_model_gives_for_the_tokens_of_training(trained, case):
    from transformers import AutoTokenizer

    from trainer.objectives.classification import _tokens

    folder = trained(case) / "model"
    model = model_dir.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base" if case == "adapter" else folder)
    text = ("A text to judge.", None) if case == "adapter" else ("A text.", "The text beside it.")
    [(ids, types)] = _tokens([text], tokenizer, 64)
    more = {} if types is None else {"token_type_ids": torch.tensor([types.tolist()])}
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids.tolist()]), **more).logits[0].softmax(-1)
    torch.testing.assert_close(numbers(answer(folder)), expected, rtol=0, atol=6e-4)


@pytest.mark.parametrize("case", CASES)
def test_where_an_onnx_directory_is_wanted_every_model_is_one_to_export(trained, case):
    folder = trained(case)
    for given in (folder, folder / "model"):
        with pytest.raises(DirectoryError) as wanted:
            directory.read_manifest(given, "onnx")
        assert str(wanted.value).endswith("; make one with: trivet export")
    assert open_source(folder, model_dir.load).folder == folder / "model"


def test_where_an_export_is_refused_the_card_is_named(trained):
    folder = trained("masked_lm") / "model"
    refused = exportable.refusal(folder, {"objective": "of a later Trivet"})
    assert refused is not None
    assert refused.endswith(f"; the Python in {folder / 'README.md'} asks this one")
