"""A classifier by hand: train, export, predict, serve; the labels are those of the PyTorch model, row by row."""

import csv
import json
import threading
from pathlib import Path
from random import Random

import httpx2 as httpx
import pytest

TINY = """
run: {name: mood, steps: 30}
objective: {type: classification}
model: {type: new, hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2,
        context_length: 128}
tokenizer: {type: train, vocab_size: 320}
data: {type: files, train: train.csv, validation: held_out.csv, text: text, label: mood}
strategy: {type: scratch}
optim: {lr: 3.0e-3, warmup_steps: 2}
batch: {rows: 8, max_length: 24}
checkpoint: {every: 30}
log: {tensorboard: false}
"""
MOODS = {"glad": ["lovely", "great", "thanks"], "cross": ["late", "awful", "never"], "plain": ["gate", "seat", "bag"]}


def write_rows(path: Path, seed: int, count: int) -> list[dict[str, str]]:
    random, rows = Random(seed), []
    for _ in range(count):
        mood = random.choice(list(MOODS))
        words = random.choices(MOODS[mood], k=random.randrange(1, 4)) + random.choices(["the", "a", "flight"], k=3)
        random.shuffle(words)
        rows.append({"text": " ".join(words), "mood": mood})
    rows[1]["text"] = " ".join(["flight"] * 60)  # is cut at batch.max_length
    rows[2]["text"] = "ends in the end token <|end|>"
    rows[3]["text"] = "ends in padding <|pad|><|pad|>"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "mood"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder to stand in, with a config and its data."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(TINY)
    write_rows(folder / "train.csv", 1, 120)
    return folder


def test_what_is_served_is_what_was_trained(work, monkeypatch, trivet):
    monkeypatch.chdir(work)
    held_out = write_rows(work / "held_out.csv", 2, 40)
    held_out.append({"text": "", "mood": "plain"})
    code, _, err = trivet("train", "tiny.yaml")
    assert code == 0, err
    assert "next: trivet export runs/mood onnx/mood" in err
    code, _, err = trivet("export", "runs/mood", "onnx/mood")
    assert code == 0, err
    assert "next: trivet serve onnx/mood" in err

    expected = labels_by_training_code(work / "runs/mood/model", held_out)
    assert len(set(expected)) > 1
    rows = [json.dumps({"id": i, "text": row["text"]}) + "\n" for i, row in enumerate(held_out)]
    (work / "in.jsonl").write_text("".join(rows))
    assert trivet("predict", "onnx/mood", "--input", "in.jsonl", "--output", "out.jsonl")[0] == 0
    answers = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == expected
    assert [answer["truncated"] for answer in answers] == [i == 1 for i in range(len(held_out))]
    assert [item["label"] for item in served_answers("onnx/mood", held_out)] == expected


def labels_by_training_code(model_dir: Path, rows: list[dict[str, str]]) -> list[str]:
    """Return the labels of a padded batch that the objective itself encodes and collates."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trainer.config import Classification, FileData
    from trainer.objectives import OBJECTIVES
    from trainer.objectives.base import model_inputs

    data = FileData(type="files", train="train.csv", text="text", label="mood")
    objective = OBJECTIVES["classification"](Classification(type="classification"), data, rows)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    examples = objective.encode(rows, tokenizer, 24)
    batch = objective.collate([[each] for each in examples], tokenizer.pad_token_id, [0] * len(examples))
    with torch.no_grad():
        numbers = model(**model_inputs(batch)).logits.argmax(-1)
    return [model.config.id2label[number] for number in numbers.tolist()]


def served_answers(onnx_dir: str, rows: list[dict[str, str]]) -> list[dict]:
    """Return what the HTTP server says to all texts in one request."""
    import asyncio

    from serving.driver import Driver
    from serving.server.app import build_app
    from serving.server.run import bind, build_server
    from serving.task_engine import TaskEngine
    from serving.text import Text

    engine = TaskEngine.open(onnx_dir)
    driver = Driver(engine)
    server = build_server(build_app(driver, Text.open(Path(onnx_dir)), engine.manifest, name="mood"))
    with bind("127.0.0.1", 0) as listener:
        driver.start()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/classify"
            return httpx.post(url, json={"input": [row["text"] for row in rows]}, timeout=30).json()["data"]
        finally:
            driver.stop()
            server.should_exit = True
            thread.join()
