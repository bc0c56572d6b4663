"""Export: what is broken in a user's files is told on one line that names the file, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest

from serving.directory import BadInput, seal
from serving.export import ExportError, HeldOutRows, Options, export_model


def refused(source: Path, target: Path, message: str, **asked) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        export_model(source, target, **asked)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in source.parent.iterdir()] == [source.name], "nothing half-written"


@pytest.fixture
def source(model_dir, tmp_path) -> Path:
    """A copy of the tiny GPT-2 that a test may spoil."""
    return Path(shutil.copytree(model_dir("gpt2"), tmp_path / "place" / "source"))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 0},
        {"n_head": 5},
        {"n_layer": 0},
        {"n_embd": "32"},
        {"n_positions": "256"},
        {"activation_function": "nope"},
        {"architectures": 5},
    ],
)
def test_a_config_that_describes_no_model(source, changes):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    refused(source, source.parent / "onnx", rf"{source}/config\.json: ")


def test_an_encoders_config_that_describes_no_model(text_model, tmp_path):
    source = Path(shutil.copytree(text_model("bert", "label")[0], tmp_path / "place" / "source"))
    config = json.loads((source / "config.json").read_text())
    for changes in ({"num_attention_heads": 5}, {"hidden_act": "nope"}, {"max_position_embeddings": "130"}):
        (source / "config.json").write_text(json.dumps(config | changes))
        refused(source, source.parent / "onnx", rf"{source}/config\.json: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", r"config\.json: "),
        ("tokenizer.json", "[]", r"source: no tokenizer: tokenizer\.json and tokenizer_config\.json cannot be read \("),
        (
            "tokenizer_config.json",
            "[]",
            "source: no tokenizer: tokenizer.json and tokenizer_config.json cannot",
        ),
        ("chat_template.jinja", "{{ messages[0]['content'] + 1 }}", r"chat template: .* \(TypeError: "),
        ("chat_template.jinja", "{% for %}", "chat template: refuses a plain conversation"),
    ],
)
def test_a_file_that_holds_something_else(source, name, content, message):
    (source / name).write_text(content)
    refused(source, source.parent / "onnx", message)


def test_weights_that_are_a_folder(source):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refused(source, source.parent / "onnx", r"has no \*\.safetensors weights")


def test_an_objective_that_is_no_name(source):
    seal(source, "model", objective=["causal_lm"])
    refused(source, source.parent / "onnx", r"objective \['causal_lm'\] cannot be exported; accepted: causal_lm")


def test_a_name_that_the_file_system_does_not_take(source):
    refused(source, source.parent / ("x" * 300), "xxx: cannot be written .*; give another place")


def test_a_name_that_leaves_no_room_for_what_stands_there_until_then(source):
    refused(source, source.parent / ("x" * 250), "xxx: cannot be written .*; choose another place")


def test_the_current_folder_is_never_replaced_with_the_shell_in_it(source, tmp_path, monkeypatch):
    current = tmp_path / "current" / "inner"
    current.mkdir(parents=True)
    monkeypatch.chdir(current)
    for target in (Path(), current.parent):
        refused(source, target, "is or holds the current folder, which an export replaces; give a new folder")


def test_held_out_chats_that_the_template_refuses(source):
    template = "{% if messages[0]['content'] == 'z' %}{{ raise_exception('no z') }}{% endif %}z"
    (source / "chat_template.jinja").write_text(template)
    rows = HeldOutRows([{"messages": [{"role": "user", "content": "z"}]}], "chats.jsonl")
    message = r"--data: chats\.jsonl: the model's chat template refuses a row \(TemplateError: no z\)"
    with pytest.raises(ExportError, match=message):
        export_model(source, source.parent / "onnx", Options(quantization="int8"), held_out=rows)
    assert not (source.parent / "onnx").exists()


def test_a_vocabulary_that_is_missing(text_model, tmp_path):
    """Of its class alone transformers makes a tokenizer that knows the special tokens and nothing else."""
    source = Path(shutil.copytree(text_model("bert", "label")[0], tmp_path / "place" / "source"))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    refused(
        source, source.parent / "onnx", "source: no tokenizer: no vocabulary lies beside its tokenizer_config.json;"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_max_length": "512"}, "model_max_length '512'; accepted: a whole number, 1 or more"),
        ({"model_max_length": 0}, "model_max_length 0; accepted: a whole number, 1 or more"),
        ({"split_special_tokens": True}, "split_special_tokens true; accepted: false"),
    ],
)
def test_a_tokenizers_setting_that_is_not_served_as_it_is(text_model, tmp_path, setting, message):
    source = Path(shutil.copytree(text_model("bert", "label")[0], tmp_path / "place" / "source"))
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    refused(source, source.parent / "onnx", rf"source/tokenizer_config\.json: {message}")


def test_a_target_inside_another_export_which_would_not_be_served_any_more(source, onnx_copy):
    refused(source, onnx_copy / "sub" / "sub", f"sub/sub: lies in {onnx_copy}, which allows no other files; give a")
    assert not (onnx_copy / "sub").exists()
