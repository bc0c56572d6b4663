"""A proof counts for these files, this source, this provider and this onnxruntime; anything else is stale."""

import pytest

from serving.directory import identity, read_manifest, write_json
from serving.engine import Engine
from serving.proofs import Unproven, require_verified
from serving.session import onnxruntime_version


def test_a_proof_counts_for_what_it_was_made_of(onnx_dir):
    record = require_verified(onnx_dir, "cpu", onnxruntime_version())
    assert (record["provider"], record["identity"]) == ("cpu", identity(onnx_dir))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "reference.safetensors"])
def test_another_file_is_stale_though_its_hash_is_listed(onnx_copy, reseal, name):
    path = onnx_copy / name
    path.write_bytes(path.read_bytes() + b" ")
    reseal(onnx_copy)
    with pytest.raises(Unproven, match=r"of other files \(stale\); run: trivet verify .* --provider cpu"):
        Engine.open(onnx_copy)


def test_another_source_is_stale(onnx_copy, reseal):
    source = read_manifest(onnx_copy, "onnx")["source"]
    reseal(onnx_copy, source=source | {"sha256": "0" * 64})
    with pytest.raises(Unproven, match=r"\(stale\)"):
        Engine.open(onnx_copy)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_another_provider_needs_a_proof_of_its_own(onnx_dir, provider):
    with pytest.raises(Unproven, match=rf"not verified on provider {provider}; run: .* --provider {provider}"):
        require_verified(onnx_dir, provider, onnxruntime_version())


def test_another_onnxruntime_is_stale(onnx_dir):
    with pytest.raises(Unproven, match=r"this is 9\.9\.9 \(stale\); run: trivet verify"):
        require_verified(onnx_dir, "cpu", "9.9.9")


def test_the_source_is_remembered_by_the_hash_of_what_was_read(onnx_dir, model_dir):
    import hashlib

    names = ("config.json", "model.safetensors")
    hashes = {name: hashlib.sha256((model_dir("llama") / name).read_bytes()).hexdigest() for name in names}
    whole = hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in names).encode()).hexdigest()
    assert read_manifest(onnx_dir, "onnx")["source"]["sha256"] == whole


def test_a_record_of_another_provider_does_not_hide_a_passed_one(onnx_copy):
    record = require_verified(onnx_copy, "cpu", onnxruntime_version())
    later = record | {"provider": "cuda", "passed": False}
    write_json(onnx_copy / "verification.json", {"format_version": 2, "records": [record, later]})
    assert require_verified(onnx_copy, "cpu", onnxruntime_version()) == record
