"""Faults of the files after the export: who verifies or serves refuses them."""

import json
import shutil
from pathlib import Path

import pytest

from serving.directory import BadInput
from serving.verify import verify


def of_an_older_export(folder: Path, exported) -> None:
    shutil.copyfile(exported("gpt2") / "model.onnx.data", folder / "model.onnx.data")


def one_bit(folder: Path, exported) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


def cut_short(folder: Path, exported) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:-64])


def elsewhere(folder: Path, exported) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "weights")
    (folder / "model.onnx.data").symlink_to(folder.parent / "weights")


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        (of_an_older_export, "altered since it was written"),
        (one_bit, "altered since it was written"),
        (cut_short, "altered since it was written"),
        (elsewhere, "points outside the directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_external_data_that_is_not_what_was_written_is_refused(onnx_copy, exported, record_property, change, evidence):
    change(onnx_copy, exported)
    with pytest.raises(BadInput, match=evidence) as caught:
        verify(onnx_copy)
    record_property("evidence", str(caught.value).rpartition("/")[2])


def test_external_data_in_another_folder_is_refused_although_the_hashes_are_right(
    onnx_copy, change_graph, reseal, record_property
):
    import onnx

    model = onnx.load(onnx_copy / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    shutil.copyfile(onnx_copy / "model.onnx.data", onnx_copy.parent / "weights")
    onnx.save(model, onnx_copy / "model.onnx")
    reseal(onnx_copy)
    with pytest.raises(BadInput, match="escapes model directory") as caught:
        verify(onnx_copy)
    record_property("evidence", str(caught.value))


def test_a_stale_proof_is_refused_by_who_serves(onnx_copy, record_property):
    from serving.engine import Engine

    records = json.loads((onnx_copy / "verification.json").read_text())
    records["records"][-1]["onnxruntime"] = "1.0.0"
    (onnx_copy / "verification.json").write_text(json.dumps(records))
    with pytest.raises(
        BadInput, match=r"verified with onnxruntime 1\.0\.0, this is .* \(stale\); run: trivet verify"
    ) as caught:
        Engine.open(onnx_copy)
    record_property("evidence", str(caught.value).partition(": ")[2])
