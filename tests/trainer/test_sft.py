"""Chats: exactly what the assistant says carries loss, or the run is refused."""

import numpy as np
import pytest

from serving.directory import BadInput
from trainer.config import SFT, FileData
from trainer.dataset import make_rows
from trainer.objectives import OBJECTIVES
from trainer.objectives.sft import encode_chat
from trainer.packing import IGNORED
from trainer.sources import DataError, read_rows

COLUMNS = FileData(type="files", train="data.jsonl")
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "a file?"},
    {"role": "assistant", "content": "yes, lines"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def objective():
    return OBJECTIVES["sft"](SFT(type="sft"), COLUMNS, [])


@pytest.fixture
def with_template(tokenizer):
    """Return a function that gives a copy of the tokenizer another chat template."""
    import copy

    def change(template: str | None):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return change


def spoken(targets, tokenizer) -> str:
    return tokenizer.decode([token for token in targets if token != IGNORED])


def test_only_the_assistant_s_turns_and_their_end_carry_loss(objective, tokenizer):
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # Worked by hand from the template: <|role|>, a new line, the content, <|end|>.
    silent = ids("<|system|>\nbe kind<|end|><|user|>\na file?<|end|><|assistant|>\n")
    first = ids("yes, lines<|end|>")
    between = ids("<|user|>\nmore<|end|><|assistant|>\n")
    last = ids("no<|end|>")
    whole = [*silent, *first, *between, *last]
    mask = [0] * len(silent) + [1] * len(first) + [0] * len(between) + [1] * len(last)

    [example] = objective.encode([{"messages": CHAT}], tokenizer, 128)
    assert example.input_ids.tolist() == whole[:-1]
    assert example.targets.tolist() == [
        token if said else IGNORED for token, said in zip(whole[1:], mask[1:], strict=True)
    ]
    assert tokenizer.eos_token_id == example.targets[-1]


def test_the_ids_are_those_of_the_template_s_text(tokenizer):
    ids, _ = encode_chat(CHAT, tokenizer)
    assert ids.tolist() == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


def test_an_answer_that_starts_with_white_space_is_masked_too(objective, tokenizer):
    """Its first space may share a token with the prompt's last new line: that token is the prompt's."""
    chat = [{"role": "user", "content": "code"}, {"role": "assistant", "content": "\n\n    return a list"}]
    [example] = objective.encode([{"messages": chat}], tokenizer, 128)
    assert spoken(example.targets, tokenizer).lstrip() == "return a list<|end|>"


def test_text_after_the_end_token_carries_no_loss(objective, with_template):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = with_template(template)
    [example] = objective.encode([{"messages": CHAT}], tokenizer, 128)
    assert spoken(example.targets, tokenizer) == "yes, lines<|end|>no<|end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # Says how many turns there are, first: a later turn changes earlier text.
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "not prefix-preserving"),
        # The generation prompt is not what stands before the assistant's turn.
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}Answer:{% endif %}",
            "not prefix-preserving",
        ),
        # Forgets what the assistant said before its last turn.
        (
            "{% for m in messages %}<|{{ m.role }}|>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
            "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "not prefix-preserving",
        ),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "does not end a turn with '<|end|>'"),
        (None, "no chat template"),
    ],
    ids=["counts turns", "other generation prompt", "forgets", "no end token", "no template"],
)
def test_a_template_that_would_be_masked_wrongly_is_refused(objective, with_template, template, said):
    with pytest.raises(BadInput) as caught:
        objective.encode([{"messages": CHAT}], with_template(template), 128, 6)
    assert said in str(caught.value)
    assert template is None or str(caught.value).endswith("(seen at row 7)"), "few rows may have what shows it"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|end|>"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}"
    "[{{ m.role }}]\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MODEL_ROLE = (
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


@pytest.mark.parametrize(
    "template", [CHATML, INST, HEADERS, MODEL_ROLE], ids=["chatml", "inst", "headers", "model role"]
)
def test_with_any_usual_template_the_model_learns_what_the_assistant_says_and_to_stop(
    objective, with_template, template
):
    """Stop tokens that are not trained, templates that are not found, and masks of all ones or all zeros, are silent
    elsewhere."""
    tokenizer = with_template(template)
    [example] = objective.encode([{"messages": CHAT}], tokenizer, 256)
    turns = spoken(example.targets, tokenizer).split("<|end|>")
    assert [turn.strip() for turn in turns] == ["yes, lines", "no", ""]
    stops = np.flatnonzero(example.targets == tokenizer.eos_token_id)
    assert len(stops) == 2, "the end of every assistant turn is learned, that of no other turn is"
    learned = int((example.targets != IGNORED).sum())
    assert 0 < learned < len(example.targets) / 2


def test_the_template_is_saved_with_the_model(make_config, train, tmp_path):
    from transformers import AutoTokenizer

    template = tmp_path / "template.jinja"
    template.write_text(CHATML, encoding="utf-8")
    config = make_config(
        "sft", "full", tokenizer={"type": "pretrained", "chat_template": str(template)}, run={"steps": 1}
    )
    assert train(config) == 0
    saved = AutoTokenizer.from_pretrained(config.run.folder / "model")
    assert saved.chat_template == CHATML
    assert "<|im_start|>user\na file?<|end|>" in saved.apply_chat_template(CHAT, tokenize=False)


def test_a_template_that_raises_names_the_row(objective, with_template, tmp_path, write_rows):
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    [row] = read_rows(write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(DataError, match=rf"{tmp_path / 'a.jsonl'}, line 1: .*roles must alternate"):
        objective.encode([row], tokenizer, 128)


def test_a_chat_is_cut_and_left_out_where_nothing_to_learn_remains(objective, tokenizer):
    long_question = [{"role": "user", "content": "file " * 40}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": CHAT}, {"messages": long_question}]
    [kept] = objective.encode(rows, tokenizer, 24)
    assert len(kept.input_ids) == len(kept.targets) == 24
    [whole] = objective.encode(rows[:1], tokenizer, 128)
    assert np.array_equal(kept.targets, whole.targets[:24])


def test_chats_that_give_no_example_are_counted_and_it_is_said_why(objective, tokenizer):
    long_question = [{"role": "user", "content": "file " * 40}, {"role": "assistant", "content": "yes"}]
    examples = objective.encode(
        [{"messages": chat} for chat in (CHAT, long_question, CHAT, long_question)], tokenizer, 24
    )
    assert (len(examples), examples.left_out) == (2, 2)
    assert objective.why_left_out(24) == (
        "the assistant says nothing within their first 24 tokens; raise batch.max_length to learn it"
    )


def test_chats_that_all_lose_their_answers_are_refused(objective, tokenizer):
    with pytest.raises(DataError, match=r"batch\.max_length: no chat keeps an assistant token within 8 tokens"):
        make_rows(objective, [{"messages": CHAT}], tokenizer, 8)


def test_prompt_and_completion_are_a_chat_of_two_turns(objective, tokenizer):
    turns = [{"role": "user", "content": "a file?"}, {"role": "assistant", "content": "yes"}]
    [pair] = objective.encode([{"prompt": "a file?", "completion": "yes"}], tokenizer, 64)
    [chat] = objective.encode([{"messages": turns}], tokenizer, 64)
    assert np.array_equal(pair.input_ids, chat.input_ids)
    assert np.array_equal(pair.targets, chat.targets)


def test_context_follows_the_prompt_after_a_blank_line_and_the_system_turn_comes_first(tokenizer):
    data = FileData(type="files", train="a.jsonl", context="input", system="be kind")
    rows = [{"prompt": "sum", "input": "1 2", "completion": "3"}, {"prompt": "hi", "input": "", "completion": "yes"}]
    turns = [
        [{"role": "user", "content": "sum\n\n1 2"}, {"role": "assistant", "content": "3"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    ]
    chats = [{"messages": [{"role": "system", "content": "be kind"}, *chat]} for chat in turns]
    objective = OBJECTIVES["sft"](SFT(type="sft"), data, [])
    assert list(objective.texts(rows)) == ["be kind\nsum\n\n1 2\n3", "be kind\nhi\nyes"]
    for pair, chat in zip(objective.encode(rows, tokenizer, 64), objective.encode(chats, tokenizer, 64), strict=True):
        assert np.array_equal(pair.input_ids, chat.input_ids)
        assert np.array_equal(pair.targets, chat.targets)


def test_triples_of_prompt_context_and_completion_learn_the_completion_only(tokenizer):
    data = FileData(type="files", train="a.jsonl", prompt="instruction", context="input", completion="output")
    objective = OBJECTIVES["sft"](SFT(type="sft"), data, [])
    row = {"instruction": "read every line", "input": "a file", "output": "it has lines"}
    [example] = objective.encode([row], tokenizer, 128)
    assert spoken(example.targets, tokenizer) == "it has lines<|end|>"
    assert tokenizer.decode(example.input_ids).startswith("<|user|>\nread every line\n\na file<|end|><|assistant|>\n")


def test_turns_written_as_from_and_value_are_the_same_chat(objective, tokenizer):
    other = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": other[turn["role"]], "value": turn["content"]} for turn in CHAT]
    [a], [b] = (objective.encode([{"messages": turns}], tokenizer, 128) for turns in (CHAT, shared))
    assert np.array_equal(a.input_ids, b.input_ids)
    assert np.array_equal(a.targets, b.targets)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "completion": "b"}, "data.prompt: row 1 has no 'prompt'; it has: question, completion"),
        ({"prompt": "a"}, "data.completion: row 1 has no 'completion'"),
        ({"prompt": "a", "completion": ["b"]}, "data.completion: row 1 holds a list"),
        ({"messages": "hello"}, "data.messages: row 1 holds no list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "data.messages: row 1 holds no list of {role, content}"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "data.messages: row 1 has no assistant turn"),
        ({"messages": [{"from": "tool", "value": "hi"}]}, "data.messages: row 1 holds no list of {role, content}"),
        ({"messages": []}, "data.messages: row 1 has no assistant turn"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_row_that_is_no_chat_is_refused(objective, tokenizer, row, said):
    with pytest.raises(DataError) as caught:
        objective.encode([row], tokenizer, 64)
    assert said in str(caught.value)
