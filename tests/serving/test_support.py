"""The support table: every architecture with every task, in every number format: verified, or refused with the reason.

`benchmarks/support_tables.py` makes the table of docs/export.md from what these tests record.
"""

import random
import shutil

import pytest
from test_architectures import DECODERS, save_decoder

from serving.directory import BadInput
from serving.export import HeldOutRows, Options, export_model

FORMATS = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"quantization": "int8"},
    "int8-weights": {"quantization": "int8-weights"},
    "int4": {"quantization": "int4"},
}
DECODER_TASKS = {
    "text": "AutoModelForCausalLM",
    "label": "AutoModelForSequenceClassification",
    "tags": "AutoModelForTokenClassification",
}
ENCODERS = ("bert", "roberta", "distilbert", "electra")
ENCODER_TASKS = ("label", "pair", "labels", "number", "tags", "masks", "vector")


def held_out() -> HeldOutRows:
    """Return texts of random words of the small tokenizers."""
    random.seed(0)
    words = ["the", "quick", "brown", "fox", "returns", "the", "list", "of", "the", "lines", "in", "the", "file"]
    texts = [" ".join(random.choices(words, k=30)) for _ in range(40)]
    return HeldOutRows([{"text": text} for text in texts], "words at random")


def outcomes(model, tmp_path, record_property) -> dict[str, str]:
    """Export in every format; return what came of each, and record it."""
    found = {}
    for name, asked in FORMATS.items():
        try:
            rows = held_out() if "quantization" in asked else None
            export_model(model, tmp_path / name, Options(**asked), held_out=rows)
            found[name] = "verified"
        except BadInput as error:
            found[name] = str(error).replace(str(model), "").lstrip(": ")
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        record_property(name, found[name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [(name, task) for name in DECODERS for task in DECODER_TASKS if (name, task) != ("opt", "tags")],  # no such head
)
def test_a_decoder(name, task, tmp_path, save_with_tokenizer, record_property):
    model = save_decoder(tmp_path / "model", save_with_tokenizer, name, DECODER_TASKS[task])
    found = outcomes(model, tmp_path, record_property)
    assert found["fp32"] == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("task", ENCODER_TASKS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder(name, task, tmp_path, save_text_model, record_property):
    found = outcomes(save_text_model(tmp_path / "model", name, task), tmp_path, record_property)
    assert found["fp32"] == "verified"
