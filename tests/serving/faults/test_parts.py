"""Directories whose parts were exchanged and sealed again: refused in a line that names the part, never a traceback."""

import shutil
from pathlib import Path

import pytest

from serving.directory import BadInput
from serving.verify import verify


def the_graph_of_another_task(folder: Path, classifier) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(classifier("llama")[1] / name, folder / name)


def no_reference(folder: Path, classifier) -> None:
    (folder / "reference.safetensors").unlink()


def a_broken_reference(folder: Path, classifier) -> None:
    (folder / "reference.safetensors").write_bytes(b"\x10" * 100)


def a_reference_of_something_else(folder: Path, classifier) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(3)}, folder / "reference.safetensors")


def a_template_that_is_no_text(folder: Path, classifier) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")


def a_list_for_the_tokenizers_settings(folder: Path, classifier) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def a_folder_for_the_records(folder: Path, classifier) -> None:
    (folder / "verification.json").unlink()
    (folder / "verification.json").mkdir()


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        (the_graph_of_another_task, "its graph takes .*, but its trivet.json says .*; export the model again"),
        (no_reference, "reference.safetensors: is not what an export writes .*; export the model again"),
        (a_broken_reference, "reference.safetensors: is not what an export writes"),
        (a_reference_of_something_else, "reference.safetensors: is not what an export writes"),
        (a_template_that_is_no_text, "chat_template.jinja: cannot be read .*; export the model again"),
        (a_list_for_the_tokenizers_settings, "tokenizer_config.json: not JSON .no object.; export the model again"),
        (a_folder_for_the_records, "verification.json: cannot be read .Is a directory.; remove it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_that_do_not_belong_together_are_refused_by_name(
    onnx_copy, classifier, reseal, record_property, change, evidence
):
    change(onnx_copy, classifier)
    reseal(onnx_copy)
    with pytest.raises(BadInput, match=evidence) as caught:
        verify(onnx_copy)
    record_property("evidence", str(caught.value).rpartition("/")[2])


@pytest.mark.parametrize(
    ("changed", "evidence"),
    [
        ({"vocab_size": "x"}, "vocab_size 'x' "),
        ({"num_layers": 0}, "num_layers 0 "),
        ({"dtype": "fp64"}, "dtype 'fp64' "),
        ({"end_token_ids": None}, "end_token_ids None "),
        ({"source": "elsewhere"}, "source 'elsewhere' "),
    ],
)
def test_a_manifest_with_fields_of_a_wrong_kind_is_refused(onnx_copy, reseal, changed, evidence):
    reseal(onnx_copy, **changed)
    with pytest.raises(BadInput, match=rf"its manifest has {evidence}\(Input should be .*\); export the model again"):
        verify(onnx_copy)


def test_a_manifest_of_more_layers_than_the_graph_has_is_refused(onnx_copy, reseal, failed_checks):
    reseal(onnx_copy, num_layers=7)
    assert failed_checks(onnx_copy) == ["manifest"]
