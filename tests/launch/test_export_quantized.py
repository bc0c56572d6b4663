"""`trivet export --quantize`, `--data` and `--compare`: what is measured on what, what is shown, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.comparison import Line, print_table
from launch.held_out import held_out_rows
from serving.directory import BadInput, read_manifest

WORDS = "the quick brown fox returns the list of the lines in the file"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(alphabet), max_position_embeddings=128, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """A file of held-out text."""
    path = tmp_path / "held_out.txt"
    path.write_text(f"{WORDS}\n" * 20)
    return path


def test_one_format_is_exported_and_measured_on_the_text_that_is_given(model, text, tmp_path, trivet):
    code, out, err = trivet("export", model, tmp_path / "onnx", "--quantize", "int8", "--data", text)
    assert code == 0, err
    assert read_manifest(tmp_path / "onnx", "onnx")["quantization"] == "int8"
    [record] = json.loads((tmp_path / "onnx" / "verification.json").read_text())["records"]
    assert str(text) in record["checks"]["quality"]["found"]
    assert "quality" in out
    assert "accepted" in out


@pytest.mark.parametrize(
    ("kind", "check", "expected"),
    [
        ("ratio", {}, None),  # fp32
        ("ratio", {"limit": 1.03, "same_floor": 0.9}, 1.03),
        ("cosine", {"limit": 0.99}, 0.99),
        ("accuracy", {"source_accuracy": 0.8, "limit": 0.01, "same_floor": 0.95}, 0.79),
        ("same", {"limit": 0.01, "same_floor": 0.95}, 0.99),  # which is asked where no right answers are known
    ],
)
def test_the_plot_draws_the_limit_that_a_format_is_refused_at(kind, check, expected):
    from launch.comparison_plot import _limit

    assert _limit(kind, check) == (None if expected is None else pytest.approx(expected))


@pytest.mark.slow
def test_formats_side_by_side_and_one_that_is_refused(model, text, tmp_path, trivet, monkeypatch):
    from serving.checks import PERPLEXITY_LIMITS

    monkeypatch.setitem(PERPLEXITY_LIMITS, "int4", 0.9)
    monkeypatch.setattr("launch.comparison.ROUNDS", 1)
    folder = tmp_path / "formats"
    for formats in ("int8", "int8,int4"):  # an earlier comparison is replaced
        code, out, err = trivet("export", model, folder, "--quantize", formats, "--compare", "--data", text)
        assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.png", "fp32", "int8"]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "refused:" in out
    assert "comparison.png" in err


def test_the_table_has_each_figure_beside_that_of_fp32(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    quality = {"ratio": 1.0123}
    lines = [
        Line("fp32", figures={"MB": 400.0, "tokens/s, batch 1": 20.0}),
        Line("int8", quality=quality, figures={"MB": 100.0, "tokens/s, batch 1": 50.0}),
        Line("int4", refused="perplexity x1.355", quality={"ratio": 1.355}),
    ]
    print_table(lines)
    printed = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in printed}
    assert rows["MB"] == ["400", "100 (x0.25)", "-"]
    assert rows["tokens/s, batch 1"] == ["20", "50 (x2.50)", "-"]
    assert rows["quality"] == ["as the source", "perplexity x1.012", "refused: perplexity x1.355"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "held_out.txt"], "--data: held_out.txt is only read for what quantisation costs; add --quantize"),
        (["--quantize", "int3"], "--quantize: 'int3' is unknown; accepted: int8, int8-weights, int4"),
        (["--quantize", "int8,int4"], "--quantize int8,int4: an export has one format; give one, or add --compare for"),
        (["--compare"], "--compare: nothing to compare; name formats: --quantize int8"),
        (["--quantize", "int8", "--compare", "--explain"], "--explain: is of one graph; leave out --compare"),
        (["--quantize", "int8,int5", "--compare"], "--quantize: 'int5' is unknown"),
        (["--quantize", "int8", "--dtype", "fp16"], "--quantize int8: is for the CPU"),
        (["--quantize", "int8", "--data", "none.txt"], "none.txt"),
        (["--quantize", "int8", "--data", "empty.txt"], "empty.txt"),
        (["--quantize", "int8", "--data", "numbers.jsonl"], "numbers.jsonl, line 1 has no text; give each row a text"),
        (["--quantize", "int8", "--data", "chats.jsonl"], "chats.jsonl, line 1: messages is no chat; accepted: a list"),
        (["--quantize", "int8", "--data", "empty.jsonl"], "empty.jsonl, line 1: messages is no chat; accepted: a list"),
        (["--quantize", "int8", "--data", "asked.jsonl"], "asked.jsonl, line 1: a row without 'completion'; give each"),
    ],
)
def test_what_cannot_be_quantised_is_told_before_any_work(
    model, text, tmp_path, trivet, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("numbers.jsonl").write_text('{"number": 5}\n')
    Path("chats.jsonl").write_text('{"messages": 5}\n')
    Path("empty.jsonl").write_text('{"messages": []}\n')
    Path("asked.jsonl").write_text('{"prompt": "How?"}\n')
    code, _, err = trivet("export", model, "onnx", *arguments)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert message in err
    assert not Path("onnx").exists()


def test_a_killed_comparison_is_made_again(model, text, tmp_path, trivet, monkeypatch):
    folder = tmp_path / "formats"
    left_behind, foreign = folder / ".int8.0123abcd.partial", folder / ".notes.0123abcd.partial"
    left_behind.mkdir(parents=True)
    monkeypatch.setattr("launch.comparison.measure", lambda lines, onnx_dir: None)
    arguments = ("export", model, folder, "--quantize", "int8", "--compare", "--data", text)
    code, _, err = trivet(*arguments)
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.png", "fp32", "int8"]
    foreign.mkdir()
    assert "holds .notes.0123abcd.partial, which is of no comparison" in trivet(*arguments)[2]


@pytest.mark.parametrize(
    ("number", "is_there"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)]
)
def test_a_comparison_that_is_stopped_says_so_and_leaves_no_new_folder(
    model, text, tmp_path, trivet, monkeypatch, number, is_there
):
    from serving.export import decoder

    monkeypatch.setattr(decoder, "write_graph", lambda *_: os.kill(os.getpid(), number))
    folder, former = tmp_path / "formats", signal.getsignal(signal.SIGTERM)
    if is_there:
        folder.mkdir()
    code, _, err = trivet("export", model, folder, "--quantize", "int8", "--compare", "--data", text)
    assert (code, err.splitlines()[-1]) == (130, f"export: stopped; no format in {folder} is half-written")
    assert (folder.exists(), [*folder.glob("*")]) == (is_there, [])
    assert signal.getsignal(signal.SIGTERM) == former


def test_what_measures_leaves_ctrl_c_to_the_command_that_started_it():
    code = "from launch import speed; speed.measures_of = lambda folder: {'texts/s': lambda: 1.0}; speed.main()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, "folder"], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate("measure\n")
    assert json.loads(out)["texts/s"] == 1


def test_a_folder_of_other_things_takes_no_comparison(model, text, tmp_path, trivet):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_text("kept")
    code, _, err = trivet("export", model, folder, "--quantize", "int8", "--compare", "--data", text)
    assert (code, [path.name for path in folder.iterdir()]) == (2, ["thesis.txt"])
    assert "holds thesis.txt, which is of no comparison; give a new folder" in err


def test_a_run_is_measured_on_what_it_held_out(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    for part in ("train", "held"):
        rows = [{"review": f"{part} {number}", "stars": f"s{number % 2}"} for number in range(8)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(
        "run: {name: a, steps: 1}\nobjective: {type: classification}\n"
        "model: {type: pretrained, path: base}\nstrategy: {type: full}\n"
        f"data: {{type: files, train: {tmp_path}/train.jsonl, validation: {tmp_path}/held.jsonl,\n"
        "  text: review, label: stars}\n"
    )
    found = held_out_rows(run, None)
    assert list(found.rows) == [{"text": f"held {number}", "label": f"s{number % 2}"} for number in range(8)]
    assert found.origin == f"what {run} held out"
    (tmp_path / "held.jsonl").unlink()
    with pytest.raises(BadInput, match=r"held\.jsonl.*; or give held-out text with --data FILE"):
        held_out_rows(run, None)


PAIR = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}
TURNS = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]


def save_sft_run(run: Path, rows: list[dict], columns: str = "") -> Path:
    """Save what `trivet train` leaves of a run on chats that held `rows` out, but for its model."""
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    for part in ("train", "held"):
        (run / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(
        "run: {name: a, steps: 1}\nobjective: {type: sft}\n"
        "model: {type: pretrained, path: base}\nstrategy: {type: full}\n"
        f"data: {{type: files, train: {run}/train.jsonl, validation: {run}/held.jsonl {columns}}}\n"
    )
    return run


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "How?", "completion": "So."}, ""),
        ({"messages": TURNS}, ""),
        ({"conversations": TURNS}, ", messages: conversations"),
        (
            {"instruction": "How?", "input": "", "output": "So."},
            ", prompt: instruction, context: input, completion: output",
        ),
    ],
)
def test_a_run_on_chats_is_measured_on_the_chats_that_it_was_trained_on(tmp_path, row, columns):
    run = save_sft_run(tmp_path / "run", [row] * 3, columns)
    assert list(held_out_rows(run, None).rows) == [PAIR] * 3


def test_context_and_system_are_of_the_chat_and_a_row_without_one_is_told(tmp_path):
    row, said = {"prompt": "How?", "completion": "So.", "with": "Tools."}, ", context: with, system: Be brief."
    [found] = held_out_rows(save_sft_run(tmp_path / "run", [row], said), None).rows
    assert [turn["content"] for turn in found["messages"]] == ["Be brief.", "How?\n\nTools.", "So."]
    run = save_sft_run(tmp_path / "other", [{"number": 5}])
    with pytest.raises(
        BadInput, match=r"held\.jsonl, line 1 has no 'prompt'.*; or give held-out text with --data FILE"
    ):
        held_out_rows(run, None)


@pytest.mark.parametrize("row", [{"prompt": "How?", "completion": "So.", "text": None}, {"messages": TURNS}])
def test_a_file_of_chats_is_read_as_the_trainer_reads_it(model, tmp_path, row):
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    [found] = held_out_rows(model, tmp_path / "chats.jsonl").rows
    assert {"messages": found["messages"]} == PAIR
    assert "text" not in found


def test_a_run_on_prompts_and_completions_is_exported(model, tmp_path, trivet):
    run = save_sft_run(tmp_path / "run", [{"prompt": WORDS, "completion": f"{WORDS} {number}"} for number in range(9)])
    shutil.copytree(model, run / "model", dirs_exist_ok=True)
    code, _, err = trivet("export", run, tmp_path / "onnx", "--quantize", "int8")
    assert code == 0, err
    [record] = json.loads((tmp_path / "onnx" / "verification.json").read_text())["records"]
    assert f"what {run} held out" in record["checks"]["quality"]["found"]


def test_without_a_run_it_is_the_standard_librarys_text(model):
    found = held_out_rows(model, None)
    assert found.origin == "the Python standard library"
    assert sum(len(row["text"]) for row in found.rows) > 100_000
