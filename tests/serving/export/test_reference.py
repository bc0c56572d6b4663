"""What is kept of the source's answers: made in batches where that is quicker, and the same as one text at a time."""

import pytest
import torch

from serving.export import reference
from serving.export.source import open_source
from serving.verify_decoder import Reference


def alone(model, prompt: list[int]) -> list[int]:
    """Return what transformers generates for a prompt that is not padded."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **settings)[0].tolist()


@pytest.fixture
def written(model_dir, tmp_path):
    """The function that writes the reference of a kind of model; returns it and the model."""

    def of(kind: str):
        source = open_source(model_dir(kind))
        model = source.load()
        reference.write_reference(model, source.load_tokenizer(), source, {}, tmp_path)
        return Reference.load(tmp_path), model

    return of


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_continuation_is_that_of_its_prompt_alone(written, kind):
    kept, model = written(kind)
    assert kept.ids == [alone(model, prompt) for prompt in kept.prompts]


def test_a_continuation_that_padding_changed_is_made_again_alone(written, monkeypatch):
    generate, asked = reference._generate, []

    def spoilt(model, prompts):
        asked.append(len(prompts))
        rows = generate(model, prompts)
        return rows if len(prompts) == 1 else [[*row[:-2], row[-2] ^ 1, row[-1]] for row in rows]

    monkeypatch.setattr(reference, "_generate", spoilt)
    kept, model = written("llama")
    assert kept.ids == [alone(model, prompt) for prompt in kept.prompts]
    assert asked == [6, 1, *[1] * 6]
