"""What a run learns from is shown as it is; what would go wrong in silence is an error with its fix."""

import json

import numpy as np
import pytest

from launch.preview_spans import LEGEND
from trainer.objectives import OBJECTIVES
from trainer.packing import IGNORED

SIZES = "{type: new, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, context_length: 128%s}"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = [{"role": "user", "content": "a file?"}, {"role": "assistant", "content": "yes"}]
WORDS = "the quick brown fox returns a list of lines in every file"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(work):
    """A byte-level tokenizer in ./tokenizer, with the project's chat template."""
    from trainer.tokenizers import train_tokenizer

    tokenizer = train_tokenizer([WORDS], 300, 128)
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


@pytest.fixture
def preview(work, tokenizer, trivet):
    """Return a function that previews rows under an objective, and returns code, what was printed, and the error."""

    def run(objective: str, rows: list[dict], *arguments: str, template: str | None = None, **sections: str):
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (work / "chat.jinja").write_text(template or "")
        chosen = ", chat_template: chat.jinja" if template else ""
        values = {
            "run": "{name: run, steps: 4}",
            "objective": objective if objective.startswith("{") else f"{{type: {objective}}}",
            "model": SIZES % ("" if objective in ("causal_lm", "sft") else ", architecture: encoder"),
            "tokenizer": f"{{type: pretrained, path: tokenizer{chosen}}}",
            "data": "{type: files, train: rows.jsonl, validation: rows.jsonl}",
            "strategy": "{type: scratch}",
            "batch": "{rows: 2, max_length: 64}",
            **sections,
        }
        (work / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
        return trivet("preview", "run.yaml", *arguments)

    return run


def legend(out: str) -> list[str]:
    return [line.split()[1] for line in out.splitlines() if line.startswith("legend  ")]


def stretches(out: str, kind: str) -> list[str]:
    return [line.split(" | ", 1)[1] for line in out.splitlines() if line.startswith(f"    {kind} | ")]


def test_a_chat_is_shown_with_what_the_assistant_says_as_learned(preview):
    code, out, _ = preview("sft", [{"messages": CHAT}], "--rows", "1")
    assert code == 0
    # By hand from the template: <|role|>, a new line, the content, <|end|>.
    assert stretches(out, "context") == ["<|user|>\\na file?<|end|><|assistant|>\\n"]
    assert stretches(out, "learned") == ["yes<|end|>"]
    assert legend(out) == ["learned", "context"]


def test_the_legend_has_the_kinds_that_are_shown_and_no_others(preview):
    rows = [{"text": "the quick brown fox returns a list of lines"}] * 4
    _, out, _ = preview("classification", [{"text": "the fox", "label": "a"}, {"text": "x", "label": "b"}])
    assert "padding" in legend(out)
    assert "masked" not in legend(out)
    _, out, _ = preview("causal_lm", rows, "--rows", "1")
    assert legend(out) == [kind for kind in LEGEND if f"    {kind} | " in out]


@pytest.mark.parametrize(
    ("problem", "label", "shown", "summary"),
    [
        ("multi_label", ["a", "b"], "labels a, b", "every label learned"),
        ("regression", 7, "number 7", "one number a row learned"),
    ],
)
def test_what_a_text_is_given_is_called_by_its_name(preview, problem, label, shown, summary):
    objective = f"{{type: classification, problem: {problem}}}"
    _, out, err = preview(objective, [{"text": "the fox", "label": label}])
    assert stretches(out, "learned")[0] == shown, err
    assert summary in out
    assert "one label a row" not in out


def test_the_documents_of_a_packed_row_are_shown_apart(preview, tokenizer):
    code, out, _ = preview("causal_lm", [{"text": "the fox"}, {"text": "a file"}], "--rows", "1")
    assert code == 0
    assert "2 documents" in next(line for line in out.splitlines() if line.startswith("step 1, row 1"))
    first = {text: tokenizer.decode(tokenizer(text)["input_ids"][:1]) for text in ("the fox", "a file")}
    assert sorted(stretches(out, "context")) == sorted(first.values()), "nothing comes before it, so it is only read"
    expected = [text.removeprefix(start) + "<|end|>" for text, start in first.items()]
    assert sorted(stretches(out, "learned")) == sorted(expected)


def test_a_later_step_of_a_stream_is_shown_too(preview):
    rows = [{"text": f"the fox {i}"} for i in range(40)]
    data = "{type: files, train: rows.jsonl, validation: rows.jsonl, streaming: true, window_rows: 8}"
    code, out, _ = preview("causal_lm", rows, "--step", "3", data=data)
    assert code == 0
    assert "step 3, row 1" in out
    assert "rows of a batch in its first window" in out


def test_a_text_that_is_too_long_goes_on_in_another_row_and_nothing_of_it_is_lost(preview, tokenizer):
    code, out, _ = preview("causal_lm", [{"text": WORDS * 20}], "--rows", "2")
    assert code == 0
    assert "cut       nothing: 1 texts longer than batch.max_length 64 go on in other rows" in out
    num_tokens = len(tokenizer(WORDS * 20)["input_ids"])  # the end is learned, the first token only read
    assert f"1 training rows: {-(-num_tokens // 64)} examples of {num_tokens} tokens" in out


def test_a_classifier_s_label_is_what_it_learns(preview):
    rows = [{"text": "the quick brown fox", "label": "noun"}, {"text": "returns", "label": "verb"}]
    code, out, _ = preview("classification", rows)
    assert code == 0
    assert {"label noun", "label verb"} == set(stretches(out, "learned"))
    assert set(stretches(out, "context")) == {"the quick brown fox", "returns"}
    assert "labels    2: noun, verb" in out
    assert len(stretches(out, "padding")) == 1, "the longer text sets the length of the batch"


def test_every_word_with_a_tag_shows_it(preview):
    rows = [{"tokens": ["the", "fox"], "tags": ["O", "B-ANIMAL"]}, {"tokens": ["list"], "tags": ["O"]}]
    code, out, _ = preview("token_classification", rows, batch="{rows: 1, max_length: 64}")
    assert code == 0
    learned = stretches(out, "learned")
    assert len(learned) == 3, "three words, each with one tag"
    assert [text.rpartition(" = ")[2] for text in sorted(learned)] == ["B-ANIMAL", "O", "O"]


def test_a_masked_token_shows_what_is_read_and_what_is_to_be_found(preview, tokenizer):
    code, out, _ = preview(
        "masked_lm, mask_probability: 0.6", [{"text": WORDS}], tokenizer="{type: train, vocab_size: 300}"
    )
    assert code == 0
    masked = [text.split(" → ") for text in stretches(out, "masked")]
    assert masked
    assert all(read != found and found.strip() in WORDS for read, found in masked)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The peers' silent faults, each by a template that has it.
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + PROMPT, "does not end a turn"),
        ("{{ messages | length }}" + TEMPLATE + PROMPT, "not prefix-preserving"),
        (TEMPLATE + "{% if add_generation_prompt %}Answer:{% endif %}", "not prefix-preserving"),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|end|>{% endfor %}",
            "leaves out what the user says",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}", "does not end a turn"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}", "what the system says"),
    ],
    ids=["no stop token", "counts turns", "other prompt", "no questions", "no answers", "no system turn"],
)
def test_a_broken_template_is_one_line_with_its_fix(preview, template, said):
    chat = [{"role": "system", "content": "be kind"}, *CHAT] if "system" in said else CHAT
    code, _, err = preview("sft", [{"messages": chat}], template=template)
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith("error: tokenizer")
    assert said in line


def test_chats_of_which_everything_is_learned_are_refused(preview):
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}]
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    code, out, err = preview("sft", [{"messages": chat}], template=template)
    assert code == 2
    assert "nothing is masked: every token of every chat is learned" in err
    assert stretches(out, "learned"), "the batch is shown first, so that one sees why"


def test_a_chat_that_the_assistant_starts_is_refused_by_its_row(preview):
    code, _, err = preview("sft", [{"messages": CHAT[::-1]}])
    assert code == 2
    assert "rows.jsonl, line 1 starts with a turn of the assistant, which nothing asks for" in err


def test_answers_that_are_all_cut_away_are_refused(preview):
    rows = [{"prompt": WORDS * 8, "completion": "yes"}]
    code, _, err = preview("sft", rows)
    assert code == 2
    assert err.startswith("error: batch.max_length: no chat keeps an assistant token within 64 tokens; raise it")


def test_answers_of_which_some_are_cut_away_are_counted(preview):
    rows = [{"prompt": WORDS * 8, "completion": "yes"}, {"messages": CHAT}, {"messages": CHAT}]
    code, out, _ = preview("sft", rows)
    assert code == 0
    assert "note      1 of 3 examples are cut to nothing by batch.max_length 64 and left out" in out


def test_answers_that_are_all_cut_before_their_stop_token_are_refused(preview):
    code, _, err = preview("sft", [{"prompt": "a file?", "completion": WORDS * 4}])
    assert code == 2
    assert "batch.max_length: the stop token '<|end|>' is never learned: every example is cut before it" in err


def test_an_all_ones_mask_in_the_batches_is_refused(preview, monkeypatch):
    collate = OBJECTIVES["sft"].collate

    def learn_everything(self, rows, pad_id, draws):
        batch = collate(self, rows, pad_id, draws)
        batch["targets"] = batch["input_ids"].roll(-1)
        return batch

    monkeypatch.setattr(OBJECTIVES["sft"], "collate", learn_everything)
    code, _, err = preview("sft", [{"messages": CHAT}] * 3)
    assert code == 2
    assert "nothing is masked in the batches" in err


def test_an_all_zeros_mask_is_refused(preview, monkeypatch):
    collate = OBJECTIVES["sft"].collate

    def learn_nothing(self, rows, pad_id, draws):
        batch = collate(self, rows, pad_id, draws)
        return batch | {"targets": batch["targets"].fill_(IGNORED)}

    monkeypatch.setattr(OBJECTIVES["sft"], "collate", learn_nothing)
    code, _, err = preview("sft", [{"messages": CHAT}] * 3)
    assert code == 2
    assert "no token of 2 rows carries loss, so nothing can be learned" in err


def test_a_stop_token_that_padding_hides_is_refused(preview, monkeypatch, tokenizer):
    """As where the pad token is the end token, and the collator ignores every pad token."""
    collate = OBJECTIVES["sft"].collate

    def hide_the_end(self, rows, pad_id, draws):
        batch = collate(self, rows, pad_id, draws)
        batch["targets"][batch["targets"] == tokenizer.eos_token_id] = IGNORED
        return batch

    monkeypatch.setattr(OBJECTIVES["sft"], "collate", hide_the_end)
    code, _, err = preview("sft", [{"messages": CHAT}] * 3)
    assert code == 2
    assert "the stop token '<|end|>' (eos_token) is never learned, so the model would never stop" in err


def test_counts_are_those_of_the_data(preview, tokenizer):
    rows = [{"messages": CHAT}] * 5
    code, out, _ = preview("sft", rows)
    assert code == 0
    num_tokens = len(tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)) - 1
    learned = len(tokenizer("yes<|end|>")["input_ids"])
    assert f"5 training rows: 5 examples of {5 * num_tokens} tokens" in out
    assert f"{learned / num_tokens:.1%} of tokens learned" in out
    per_row = 64 // num_tokens
    num_rows = -(-5 // per_row)
    assert f"{num_rows} rows of a batch" in out
    assert "left out  nothing" in out


def test_every_piece_of_a_word_that_learns_its_tag_is_shown_with_it(preview):
    rows = [{"tokens": ["zebra", "fox"], "tags": ["B-X", "O"]}] * 4
    code, out, _ = preview("{type: token_classification, tag_all_pieces: true}", rows, "--rows", "1")
    assert code == 0
    document = out.split("document 1")[1].split("document 2")[0]
    pieces = [text.rsplit(" = ", 1) for text in stretches(document, "learned")]
    assert "".join(piece for piece, tag in pieces if tag == "B-X") == "zebra"
    assert len([tag for _, tag in pieces if tag == "B-X"]) > 1
    assert "".join(piece for piece, tag in pieces if tag == "O").strip() == "fox"


def test_answers_that_are_all_empty_are_refused_since_only_the_stop_token_is_learned(preview):
    code, _, err = preview("sft", [{"prompt": "a file?", "completion": ""}] * 4)
    assert code == 2
    assert "the assistant says nothing" in err
    assert "only the stop token '<|end|>' is learned" in err


def test_rows_that_cannot_be_learned_from_are_told_with_the_reason(preview):
    data = "{type: files, train: rows.jsonl, validation: rows.jsonl, skip_bad_rows: true}"
    code, out, _ = preview("causal_lm", [{"text": "the fox"}, {"text": ""}, {"other": 1}], data=data)
    assert code == 0
    assert "left out" in next(line for line in out.splitlines() if line.startswith("left out"))
    assert "without 'text'" in out
    assert "with an empty 'text'" in out


def test_on_a_terminal_kinds_are_colours_and_nothing_in_the_text_is_obeyed(preview, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    hostile = [{"role": "user", "content": "a\x1b[2Jb"}, {"role": "assistant", "content": "yes"}]
    code, out, _ = preview("sft", [{"messages": hostile}], "--rows", "1")
    assert code == 0
    assert "\x1b[1;32myes<|end|>" in out
    assert "\x1b[2J" not in out
    assert "a\\x1b[2Jb" in out


def test_no_weights_are_needed(preview, work, tokenizer):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=300, hidden_size=16, num_attention_heads=2, num_key_value_heads=2).save_pretrained(
        work / "model"
    )
    tokenizer.save_pretrained(work / "model")
    sections = {
        "model": "{type: pretrained, path: model}",
        "tokenizer": "{type: pretrained}",
        "strategy": "{type: lora}",
    }
    code, out, _ = preview("sft", [{"messages": CHAT}], **sections)
    assert code == 0
    assert stretches(out, "learned")


@pytest.mark.parametrize(
    ("option", "said"), [("9", "--step: 9 found, but the run has 4 steps"), ("4", "step 4, row 1")]
)
def test_any_step_of_the_run_can_be_seen(preview, option, said):
    code, out, err = preview("causal_lm", [{"text": "the fox"}] * 9, "--step", option)
    assert code == (2 if option == "9" else 0)
    assert said in out + err


def test_what_is_shown_is_what_the_run_reads(preview, work):
    """The tokens that the loop is given at step 3, decoded, are the stretches of the preview of step 3."""
    from launch import config_file
    from trainer.config import RunConfig
    from trainer.watch import documents, watch

    rows = [{"text": f"the fox {i} returns {i * i}"} for i in range(30)]
    code, out, _ = preview("causal_lm", rows, "--step", "3", "--rows", "2")
    assert code == 0
    config = config_file.load(work / "run.yaml", [], RunConfig)
    seen = []
    import trainer.feed

    micro_batches = trainer.feed.Feed.micro_batches

    def spy(self, step):
        for batch in micro_batches(self, step):
            if step == 2:
                seen.extend(ids for ids, _ in documents(batch))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.feed.Feed, "micro_batches", spy)
        watch(config, config_file.to_yaml(config))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    shown = [a + b for a, b in zip(stretches(out, "context"), stretches(out, "learned"), strict=True)]
    assert shown == [tokenizer.decode(np.asarray(ids)) + "<|end|>" for ids in seen]
