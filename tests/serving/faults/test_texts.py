"""Faults of the tokenizer and of the chat template: refused with the first text that differs."""

import pytest


def another_tokenizer(tokenizer, folder, make_tokenizer) -> None:
    make_tokenizer(text="a wholly other text about llamas, ducks and geese").save_pretrained(folder)


def another_template(tokenizer, folder, make_tokenizer) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    type(tokenizer).save_pretrained(tokenizer, folder)


@pytest.mark.parametrize(
    ("saved", "evidence"), [(another_tokenizer, "texts, chats and decodings differ, first encode"),
                            (another_template, "texts, chats and decodings differ, first chat")],
    ids=["another tokenizer", "another chat template"],
)  # fmt: skip
def test_a_fault_of_the_text_is_refused_with_the_first_text(
    saved, evidence, model_dir, refused, monkeypatch, make_tokenizer
):
    from serving.export.source import Source

    load = Source.load_tokenizer

    def faulty(source):
        tokenizer = load(source)
        tokenizer.save_pretrained = lambda folder: saved(tokenizer, folder, make_tokenizer)
        return tokenizer

    monkeypatch.setattr(Source, "load_tokenizer", faulty)
    refused(model_dir("llama"), evidence)
