"""A tiny run on one GPU: its loss falls, in every precision. None of it has run on a GPU yet."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "pretrain_tiny.yaml"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls(trivet, tmp_path, precision):
    overrides = [f"run.dir={tmp_path}", f"precision.type={precision}", "run.steps=30", "run.name=tiny"]
    torch.cuda.reset_peak_memory_stats()
    code, _, err = trivet("train", CONFIG, *overrides)
    assert code == 0, err
    assert torch.cuda.max_memory_allocated() > 0, "it was not the GPU that trained"
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 1


def test_the_doctor_finds_nothing_wrong(trivet):
    code, out, err = trivet("doctor", "--json")
    assert code == 0, out + err
