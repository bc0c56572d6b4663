"""Faults put into a verified ONNX directory, one at a time: each must be seen, and the engine must then refuse it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving import verify_decoder
from serving.directory import BadInput, read_manifest, seal
from serving.engine import Engine
from serving.forward import Forward
from serving.session import Session
from serving.verify import VerificationFailed, verify
from serving.verify_decoder import Reference

COMPARED = [
    "text", "logits_one_by_one", "logits_padded_batch", "logits_far_on", "tokens_one_by_one", "tokens_in_a_crowd"
]  # fmt: skip
CHECKS = ["manifest", *COMPARED]


def weights(graph) -> dict:
    """Return the graph's matrices by name, those of the two layers in the order of the layers."""
    return {each.name: each for each in graph.initializer if len(each.dims) == 2 and each.data_type == 1}


def test_a_sound_directory_passes_and_the_record_says_what_was_compared(onnx_copy):
    stages = []
    record = verify(onnx_copy, progress=stages.append)
    assert stages == ["verifying text", "verifying logits", "verifying tokens"]
    assert list(record["checks"]) == CHECKS
    assert json.loads((onnx_copy / "verification.json").read_text())["records"][-1] == record
    assert (record["provider"], record["passed"], record["reason"]) == ("cpu", True, None)
    for name in COMPARED[1:]:
        assert 0 < record["checks"][name]["max_abs_diff"] < record["checks"][name]["tolerance"] / 50
    assert record["checks"]["tokens_in_a_crowd"]["tokens"] == 7 * 24
    assert record["checks"]["tokens_in_a_crowd"]["mismatches"] == 0
    Engine.open(onnx_copy)


def test_the_reference_has_several_lengths_and_continuations_of_24_tokens(onnx_dir):
    reference = Reference.load(onnx_dir)
    assert reference.prompt_lengths == [1, 3, 8, 17, 33, 64, 256 - 24]
    assert [len(ids) - length for ids, length in zip(reference.ids, reference.prompt_lengths, strict=True)] == [24] * 7
    assert [len(logits) for logits in reference.logits_TV] == [24, 26, 31, 40, 56, 87, 87]
    assert reference.num_short == 6
    assert len(reference.cases["chats"]) == 2
    assert any("<|im_end|>" in case["text"] for case in reference.cases["texts"])


def test_an_altered_byte_of_the_weights_is_refused_before_anything_runs(onnx_copy):
    data = onnx_copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.onnx\.data: altered since it was written"):
        verify(onnx_copy)


def test_a_matrix_that_is_one_per_cent_too_large_is_seen(onnx_copy, change_graph, failed_checks):
    import onnx

    def scale_one(graph):
        name, tensor = next(
            (name, each) for name, each in weights(graph).items() if "down_proj" in name or each.dims[0] == 64
        )
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), name))

    change_graph(onnx_copy, scale_one)
    assert failed_checks(onnx_copy)[:2] == ["logits_one_by_one", "logits_padded_batch"]


def test_two_layers_weights_swapped_are_seen(onnx_copy, change_graph, failed_checks):
    def swap(graph):
        first, second = [each for each in weights(graph).values() if sorted(each.dims) == [32, 64]][:2]
        assert first.dims == second.dims
        raw = first.raw_data
        first.raw_data = second.raw_data
        second.raw_data = raw

    change_graph(onnx_copy, swap)
    assert "logits_one_by_one" in failed_checks(onnx_copy)


def test_position_ids_shifted_by_one_are_seen(exported, tmp_path, change_graph, failed_checks):
    import onnx

    folder = Path(shutil.copytree(exported("gpt2"), tmp_path / "onnx"))  # RoPE would not care: it is relative

    def shift(graph):
        for node in graph.node:
            node.input[:] = ["shifted" if name == "position_ids" else name for name in node.input]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
        graph.node.insert(0, onnx.helper.make_node("Add", ["position_ids", "one"], ["shifted"]))

    change_graph(folder, shift)
    assert failed_checks(folder) == COMPARED[1:]


def test_another_tokenizer_is_seen(onnx_copy, make_tokenizer, reseal, failed_checks):
    make_tokenizer(300, "entirely other words, learned from another text about weather and ships").save_pretrained(
        onnx_copy
    )
    reseal(onnx_copy)
    assert failed_checks(onnx_copy) == ["text"]
    records = json.loads((onnx_copy / "verification.json").read_text())["records"]
    assert "first encode('The library reads the file" in records[-1]["reason"]


def test_another_chat_template_is_seen(onnx_copy, reseal, failed_checks):
    template = onnx_copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant "))
    reseal(onnx_copy)
    assert failed_checks(onnx_copy) == ["manifest", "text"]


def test_a_chat_template_that_differs_where_no_chat_shows_it_is_seen(onnx_copy, reseal, failed_checks):
    template = onnx_copy / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if messages | length > 99 %}Enough.{% endif %}")
    reseal(onnx_copy)
    assert failed_checks(onnx_copy) == ["manifest"]
    records = json.loads((onnx_copy / "verification.json").read_text())["records"]
    assert "the chat template's sha256 is" in records[-1]["reason"]


@pytest.mark.parametrize(
    "changed",
    [{"context_length": 200}, {"end_token_ids": []}, {"source": {"sha256": "0"}}, {"chat_template_sha256": None}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_manifest_that_says_something_else_of_the_model_is_seen(onnx_copy, reseal, failed_checks, changed):
    reseal(onnx_copy, **changed)
    assert failed_checks(onnx_copy) == ["manifest"]
    [(name, value)] = changed.items()
    records = json.loads((onnx_copy / "verification.json").read_text())["records"]
    assert f"1 of 13 facts differ, first: {name} is {value!r}, not " in records[-1]["reason"]


def test_a_chunk_in_the_wrong_row_is_seen(onnx_copy, monkeypatch, failed_checks):
    real = Forward.chunk
    monkeypatch.setattr(Forward, "chunk", lambda self, work: real(self, replace(work, slot=0)))
    assert failed_checks(onnx_copy) == ["tokens_in_a_crowd"]


def test_a_second_chunk_of_the_engines_usual_size_is_looked_at(onnx_copy, monkeypatch, failed_checks):
    real = Forward.chunk

    def broken(self, work):
        if work.request.num_computed < 128:
            return real(self, work)
        self._cache["keys.0"].numpy()[work.slot, :, 0] = 0  # as if the beginning were forgotten
        return real(self, work)

    monkeypatch.setattr(Forward, "chunk", broken)
    assert failed_checks(onnx_copy) == ["tokens_in_a_crowd"]


def test_a_decode_one_position_late_is_seen(onnx_copy, monkeypatch, failed_checks):
    real = Forward.decode

    def late(self, works, occupants):
        for work in works:
            work.request.num_computed += 1
            work.request.prompt_ids.append(0)
        try:
            return real(self, works, occupants)
        finally:
            for work in works:
                work.request.num_computed -= 1
                work.request.prompt_ids.pop()

    monkeypatch.setattr(Forward, "decode", late)
    assert failed_checks(onnx_copy) == ["tokens_one_by_one", "tokens_in_a_crowd"]


def test_a_run_that_fails_is_a_failed_proof(onnx_copy, monkeypatch, failed_checks):
    def broken(self, work):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Forward, "chunk", broken)
    assert failed_checks(onnx_copy) == ["logits_far_on", "tokens_one_by_one", "tokens_in_a_crowd"]


def test_a_graph_that_ends_with_an_error_of_onnxruntime_fails_its_proof_with_that_error(
    exported, text_model, tmp_path, change_graph
):
    from onnx import numpy_helper

    def cut(graph):
        """Leave too few positions, so that looking up those of longer texts is an error."""
        [table] = [
            each for each in graph.initializer if each.name.endswith(("wpe.weight", "position_embeddings.weight"))
        ]
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:12].copy(), table.name))

    evidence = [
        "of 24 tokens, 1 to a run, cannot be run: .*out of data bounds",
        "run: the graph cannot be run: .*out of data bounds",
    ]
    for number, source in enumerate((exported("gpt2"), text_model("bert", "label")[1])):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        change_graph(folder, cut)
        with pytest.raises(VerificationFailed, match=evidence[number]):
            verify(folder)


# --- near ties -------------------------------------------------------------------------------------------------------


def token_check(monkeypatch, onnx_dir, margin: float) -> dict:
    """Return the check of tokens where the source's token at one place lies `margin` below another one."""
    reference = Reference.load(onnx_dir)
    ids, logits_TV = reference.ids[2], reference.logits_TV[2]
    position = reference.prompt_lengths[2] + 5
    row_V = logits_TV[position - 1]
    found = int(row_V.argmax())
    runner_up = int(np.argsort(row_V)[-2])
    ids[position] = runner_up  # as if the source had picked the other one
    row_V[runner_up] = row_V[found] - np.float32(margin)
    monkeypatch.setattr(Reference, "tolerance", 1e9)  # tokens alone
    manifest = read_manifest(onnx_dir, "onnx")
    session = Session.open(onnx_dir)
    return verify_decoder.check_tokens(session, manifest, reference, crowd=True)


def test_a_wrong_token_is_excused_and_counted_where_the_source_has_a_near_tie(monkeypatch, onnx_dir):
    check = token_check(monkeypatch, onnx_dir, margin=5e-5)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (True, 1, 0)


def test_a_wrong_token_is_not_excused_elsewhere(monkeypatch, onnx_dir):
    check = token_check(monkeypatch, onnx_dir, margin=2e-4)
    assert (check["passed"], check["near_ties"], check["mismatches"]) == (False, 0, 1)
    assert "text 2 token 5" in check["found"]


def test_a_manifest_without_a_field_is_bad_input(onnx_copy):
    manifest = read_manifest(onnx_copy, "onnx")
    fields = {key: value for key, value in manifest.items() if key not in ("format_version", "kind", "files", "task")}
    seal(onnx_copy, "onnx", **fields)
    with pytest.raises(BadInput, match="its manifest has no task; export the model again"):
        verify(onnx_copy)


def test_the_command_exits_1_when_the_proof_fails(onnx_copy, trivet, reseal):
    template = onnx_copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant "))
    reseal(onnx_copy)
    code, out, err = trivet("verify", onnx_copy)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not equal to its source" in err


def test_a_template_that_writes_the_date_is_proven_on_another_day_too(save_model, tmp_path, monkeypatch):
    from datetime import datetime

    from serving import chat_template
    from serving.export import export_model

    source = save_model(tmp_path / "model", "gpt2")
    template = source / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} " + template.read_text())
    export_model(source, tmp_path / "onnx")
    assert verify(tmp_path / "onnx")["passed"]

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 17, 12, 30, 1, 7)

    monkeypatch.setattr(chat_template, "datetime", Tomorrow)
    assert verify(tmp_path / "onnx")["passed"]


def test_tokens_that_are_never_said_do_not_widen_what_is_accepted():
    from serving.checks import spread

    logits_NV = np.random.default_rng(0).normal(0, 3, (50, 5000))
    assert abs(spread(logits_NV) - 3) < 0.1
    logits_NV[:, :40] = -1e4
    assert abs(spread(logits_NV) - 3) < 0.1
    assert logits_NV.std() > 500
