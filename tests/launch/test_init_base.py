"""`trivet init` and its base model: which kinds fit, chats whose answers do not, and the command written down."""

import json
import shlex
from pathlib import Path

import pytest

from launch import config_file
from trainer.config import RunConfig

TEMPLATE = "{% for m in messages %}system user {{ m['content'] }} end {% endfor %}assistant"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def base(context: int | None = 64, size: int = 5_000, **config) -> str:
    """A model folder as far as init looks: whole words are tokens, and the template adds four to a question."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path("base")
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"file": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": context} | config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    header = json.dumps({"w": {"dtype": "F32", "shape": [size, 5_000], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return "base"


def chats(*lengths: int) -> str:
    """Pairs whose prompts have so many words each, in a training and a held-out file."""
    Path("d").mkdir()
    rows = [
        {"prompt": " ".join([*["file"] * (n - 1), f"w{i}"]), "completion": f"answer {i}"} for i, n in enumerate(lengths)
    ]
    Path("d/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("d/val.jsonl").write_text('{"prompt": "file", "completion": "file"}\n')
    return "d"


def config_of(path: str) -> RunConfig:
    return config_file.load(Path(path), [], RunConfig)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5ForConditionalGeneration"),
        ({"is_encoder_decoder": True}, "an encoder-decoder model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("objective", ["causal_lm", "sft"])
def test_a_base_that_does_not_continue_texts_is_refused(trivet, config, kind, objective):
    code, _, err = trivet("init", "x", "--from", chats(*[3] * 20), "--base", base(**config), "--objective", objective)
    if objective == "causal_lm":
        assert f"--base: base is {kind}, and causal_lm needs a model that continues texts" in err
    else:
        assert f"--base: base is {kind}, and sft needs a model that continues texts" in err
    assert (code, err.count("\n"), list(Path().glob("*.yaml"))) == (2, 1, [])


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_any_of_them_can_learn_labels(trivet, kind):
    Path("a.csv").write_text("text,label\n" + "".join(f"a text number {i},{'ab'[i % 2]}\n" for i in range(60)))
    assert trivet("init", "x", "--from", "a.csv", "--base", base(architectures=[kind]))[0] == 0


def test_rows_grow_where_prompts_would_cut_answers_away(trivet):
    lengths = [20] * 95 + [700] * 5
    code, out, _ = trivet("init", "x", "--from", chats(*lengths), "--base", base(context=8192))
    assert code == 0
    assert "answers cut away" not in out
    assert config_of("x.yaml").batch.max_length == 800  # 700 words, 6 of the template, 64 of an answer; then by 32


def test_answers_that_no_row_can_hold_are_counted(trivet):
    code, out, _ = trivet("init", "x", "--from", chats(*[20] * 95, *[57] * 2, *[58] * 3), "--base", base(context=64))
    assert code == 0
    assert "answers cut away: 3 rows, whose prompt alone fills 64 tokens" in " ".join(out.split())
    assert "answers cut away: 3 rows" in Path("x.yaml").read_text()
    assert config_of("x.yaml").batch.max_length == 64


def test_if_no_answer_can_be_learned_nothing_is_written(trivet):
    code, _, err = trivet("init", "x", "--from", chats(*range(60, 90)), "--base", base(context=64))
    assert (code, err.count("\n"), list(Path().glob("*.yaml"))) == (2, 1, [])
    assert "no answer would be learned: the prompts have 66 to 95 tokens, and a row at most 64 " in err
    assert "(the context of base is 64)" in err


def test_the_command_is_written_down_as_it_can_be_typed(trivet):
    Path("my data.csv").write_text("a  b,on\n" + "".join(f"a text number {i},{'ab'[i % 2]}\n" for i in range(60)))
    command = ["init", "x", "--from", "my data.csv", "--text", "a  b", "--label", "on", "--base", base(), "--force"]
    assert trivet(*command)[0] == 0
    first = Path("x.yaml").read_text().splitlines()[0]
    head, _, rest = first.partition(": trivet ")
    assert head == "# Written by"
    assert shlex.split(rest) == command


def test_a_tiny_base_is_not_said_to_have_no_weights(trivet):
    Path("a.txt").write_text("".join(f"a text number {i}\n" for i in range(60)))
    assert trivet("init", "x", "--from", "a.txt", "--base", base(size=2))[0] == 0
    assert "10,000 weights" in Path("x.yaml").read_text()


def test_a_broken_base_is_told_in_one_line(trivet):
    Path(base(), "config.json").write_text("{")
    Path("a.txt").write_text("".join(f"a text number {i}\n" for i in range(60)))
    assert (
        "error: --base: base/config.json cannot be read" in trivet("init", "x", "--from", "a.txt", "--base", "base")[2]
    )


@pytest.mark.parametrize("place", ["configs/classify.yaml/x", "configs/sft_lora.yaml/x"])
def test_examples_are_copied_all_or_none(trivet, place):
    Path(place).mkdir(parents=True)
    code, _, err = trivet("init")
    assert (code, err.count("\n")) == (2, 1)
    assert f"error: {Path(place).parent}: is a folder where a config is to stand" in err
    assert not [path for path in Path("configs").rglob("*") if path.is_file()]


def test_a_file_where_a_folder_of_examples_belongs_is_found_before_any_is_copied(trivet):
    Path("configs").mkdir()
    Path("configs/accelerate").write_text("mine")
    code, _, err = trivet("init", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert "error: configs/accelerate: is a file where a folder is to stand" in err
    assert [path.name for path in Path("configs").rglob("*")] == ["accelerate"]
