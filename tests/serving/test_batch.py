"""Rows of a file in, rows out: what is refused by its line, and that one failed row costs no other."""

import json

import pytest

from serving.batch import RowError, generate, read_rows
from serving.engine import Engine
from serving.request import Sampling
from serving.text import Text


def test_a_table_is_refused_with_what_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text("text\nx\n")
    with pytest.raises(RowError, match=r"--input: .*rows\.csv is a table; expected JSONL, an object such as"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("command", ["generate", "predict"])
def test_a_file_that_is_not_there_is_named_once(command, tmp_path, trivet):
    path = tmp_path / "nope.jsonl"
    code, _, err = trivet(command, "nowhere", "--input", path)
    said = f"--input: {path} cannot be read (No such file or directory); expected a UTF-8 JSONL file"
    assert (code, err) == (2, f"error: {said}\n")


def test_a_file_in_another_encoding_is_refused_with_the_place(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "naïve"}'.encode("latin-1"))
    with pytest.raises(RowError, match=r"latin\.jsonl cannot be read \('utf-8' codec can't decode byte 0xef in pos"):
        read_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": 5}', "`messages` must be a list of objects"),
        ('{"messages": []}', "`messages` must be a list of objects"),
        ('{"messages": ["hi"]}', "`messages` must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', "a message's `content` is missing; expected text"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "a message's `role` is int; expected text"),
        ('{"prompt": 5}', "`prompt` is a int"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_by_its_line(tmp_path, row, message):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{row}\n')
    with pytest.raises(RowError, match=f"line 3: .*{message}"):
        read_rows(path)


def test_only_newlines_end_a_row_and_a_byte_order_mark_is_no_part_of_it(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c\x85d"}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_rows(path) == rows


@pytest.fixture
def failing_second_row(monkeypatch):
    """The engine's second prompt fails; the others go on."""
    from serving.forward import Forward

    real, works = Forward.chunk, []

    def chunk(self, work):
        works.append(work)
        if len(works) == 2:
            raise RuntimeError("no memory")
        return real(self, work)

    monkeypatch.setattr(Forward, "chunk", chunk)


def test_a_failed_row_has_an_error_and_the_others_their_text(onnx_dir, failing_second_row):
    rows = [{"id": index, "prompt": "the quick brown"} for index in range(3)]
    engine = Engine.open(onnx_dir, slots=3)
    answers = list(generate(engine, Text.open(onnx_dir), rows, Sampling(4), prompts_are_chats=False))
    assert [sorted(answer) for answer in answers[1:2]] == [["error", "id"]]
    assert [answer["id"] for answer in answers] == [0, 1, 2]
    assert answers[0]["text"] == answers[2]["text"]


def test_the_command_writes_all_rows_and_exits_1_when_one_failed(onnx_dir, tmp_path, trivet, failing_second_row):
    rows = [{"id": f"{index}\ud800", "prompt": "the quick brown"} for index in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    code, _, err = trivet("generate", onnx_dir, "--input", tmp_path / "in.jsonl", "--output", output)
    assert code == 1
    assert "error: 1 of 3 rows failed: " in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    assert ["error" in answer for answer in answers] == [False, True, False]


def test_a_chat_model_of_others_gets_a_prompt_as_the_users_turn(exported, model_dir, tmp_path, trivet):
    """Whatever has a chat template, but for what went on learning plain text here."""
    from transformers import AutoTokenizer

    (tmp_path / "in.jsonl").write_text('{"prompt": "the quick fox"}\n')
    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    chat = [{"role": "user", "content": "the quick fox"}]
    as_chat = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for options, ids in (([], as_chat), (["--raw"], tokenizer("the quick fox")["input_ids"])):
        code, out, err = trivet("generate", exported("llama"), "--input", tmp_path / "in.jsonl", *options)
        assert (code, json.loads(out)["prompt_tokens"]) == (0, len(ids)), err


def test_an_answer_that_ends_at_once_is_said_to(onnx_dir, trivet, monkeypatch):
    monkeypatch.setattr("serving.batch.generate", lambda *args, **asked: [{"text": "", "finish_reason": "stop"}])
    code, out, err = trivet("generate", onnx_dir, "--prompt", "x")
    assert (code, out, err) == (0, "\n", "note: the model ended its answer at once, without a word\n")


def test_an_answer_that_has_no_room_for_the_tokens_asked_for_is_said_to_be_cut(onnx_dir, tmp_path, trivet):
    room = "prompt and answer have room for 256 tokens together; shorten the prompt for a longer answer"
    code, _, err = trivet("generate", onnx_dir, "--prompt", "x", "--raw", "--max-new-tokens", 256)
    assert (code, err) == (0, f"note: the answer ended before --max-new-tokens 256: {room}\n")
    code, _, err = trivet("generate", onnx_dir, "--prompt", "x", "--raw", "--max-new-tokens", 255)
    assert (code, err) == (0, "")
    rows = tmp_path / "in.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (1, 250, 251)))
    code, _, err = trivet("generate", onnx_dir, "--input", rows, "--raw", "--max-new-tokens", 6)
    assert (code, err) == (0, f"note: 1 of 3 answers ended before --max-new-tokens 6: {room}\n")


def test_on_a_terminal_the_tokens_of_an_answer_are_counted_and_nowhere_else(onnx_dir, trivet, monkeypatch):
    command = ("generate", onnx_dir, "--prompt", "x", "--raw", "--max-new-tokens", 5)
    _, answer, err = trivet(*command)
    assert err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = trivet(*command)
    assert (code, out) == (0, answer)
    assert "generate: 5 tokens" in err


def test_a_prompt_without_room_for_an_answer_is_refused_in_words_of_the_command(onnx_dir, trivet):
    code, _, err = trivet("generate", onnx_dir, "--prompt", "x" * 256, "--raw")
    said = "row 1: prompt: 256 tokens; accepted: at most 255, which leaves room for one new token; shorten it"
    assert (code, err) == (2, f"error: {said}\n")


def test_an_output_that_cannot_be_written_is_refused_before_the_engine_is_opened(tmp_path, trivet):
    for output in (tmp_path, tmp_path / "none" / "out"):
        code, _, err = trivet("generate", "nowhere", "--prompt", "x", "--output", output)
        assert (code, err.count("\n")) == (2, 1)
        assert "--output" in err
    code, _, err = trivet("generate", "nowhere", "--prompt", "x", "--output", tmp_path / "out")
    assert "nowhere: no such folder" in err
    assert list(tmp_path.iterdir()) == []
