"""The engine against transformers' `generate`, on tiny random models, and what it does when something fails."""

import subprocess
import sys

import numpy as np
import pytest

from serving.directory import BadInput, identity
from serving.engine import Engine, QueueFull
from serving.proofs import append_verification
from serving.request import Request, Sampling
from serving.session import onnxruntime_version

NUM_NEW = 24
GREEDY = Sampling(max_new_tokens=NUM_NEW, ignore_end=True)


def start(engine: Engine, prompts: list[list[int]], sampling: Sampling = GREEDY) -> list[Request]:
    requests = [Request(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    return requests


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_tokens_are_those_of_generate(kind, exported, source_tokens, prompts):
    expected = source_tokens(kind, prompts, NUM_NEW)
    requests = Engine.open(exported(kind), slots=4, step_tokens=16).generate(prompts, GREEDY)
    assert [request.output_ids for request in requests] == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts), "the prompts must matter, or this shows nothing"
    assert {request.finish_reason for request in requests} == {"length"}
    assert sum(request.near_ties for request in requests) == 0


@pytest.mark.parametrize(("slots", "step_tokens"), [(1, 1), (1, 128), (3, 5), (5, 64), (12, 128)])
def test_a_request_gets_the_same_tokens_alone_and_in_any_crowd(onnx_dir, prompts, slots, step_tokens):
    alone = Engine.open(onnx_dir, slots=1)
    expected = [alone.generate([prompt], GREEDY)[0].output_ids for prompt in prompts]
    engine = Engine.open(onnx_dir, slots=slots, step_tokens=step_tokens)
    requests = []
    for index, prompt in enumerate(prompts):  # they arrive while others decode, wait and leave
        requests += start(engine, [prompt])
        for _ in range(index % 4):
            engine.step()
    engine.run()
    assert [request.output_ids for request in requests] == expected


def test_seeded_sampling_does_not_depend_on_the_crowd(onnx_dir, prompts):
    samplings = [Sampling(max_new_tokens=12, temperature=0.8, seed=seed, ignore_end=True) for seed in range(12)]
    crowd = Engine.open(onnx_dir, slots=5, step_tokens=9).generate(prompts, samplings)
    alone = Engine.open(onnx_dir, slots=1)
    for prompt, sampling, request in zip(prompts, samplings, crowd, strict=True):
        assert alone.generate([prompt], sampling)[0].output_ids == request.output_ids


def test_step_returns_the_requests_that_got_a_token(onnx_dir, prompts):
    engine = Engine.open(onnx_dir, slots=2, step_tokens=8)
    long, short = start(engine, [prompts[1], prompts[0]])  # 60 tokens and 1
    seen = [engine.step() for _ in range(9)]
    assert seen[:8] == [[short]] * 8  # 60 tokens at 7 a step
    assert seen[8] == [short, long]
    assert len(short.output_ids) == 9
    assert len(long.output_ids) == 1


def test_the_end_token_ends_a_request_unless_it_is_ignored(onnx_dir, prompts):
    engine = Engine.open(onnx_dir)
    free = engine.generate([prompts[3]], GREEDY)[0].output_ids
    end = next(token for token in free if token != free[0])
    engine = Engine.open(onnx_dir)
    engine._end_ids = frozenset([end])
    stopped, ignored = engine.generate([prompts[3]] * 2, [Sampling(max_new_tokens=NUM_NEW), GREEDY])
    assert stopped.output_ids == free[: free.index(end) + 1]
    assert stopped.finish_reason == "stop"
    assert ignored.output_ids == free


def test_output_is_cut_where_the_row_ends(onnx_dir, source_tokens, prompts):
    engine = Engine.open(onnx_dir, slots=2, max_length=40)
    cut, full = engine.generate([prompts[5], prompts[2]], Sampling(max_new_tokens=38, ignore_end=True))  # 33 and 2
    assert (len(cut.output_ids), cut.finish_reason) == (7, "length")
    assert (len(full.output_ids), full.finish_reason) == (38, "length")
    assert [full.output_ids] == source_tokens("llama", [prompts[2]], 38)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: is empty"),
        ([1] * 32, "prompt: 32 tokens; accepted: at most 31"),
        ([1, 320], "token id 320 is out of range; accepted: 0 to 319"),
        ([-1], "token id -1 is out of range"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(onnx_dir, prompt, message):
    engine = Engine.open(onnx_dir, max_length=32)
    with pytest.raises(BadInput, match=message):
        engine.add(Request("r", prompt, Sampling()))
    with pytest.raises(BadInput, match=message):
        engine.generate([[1], prompt], Sampling())
    assert engine.idle


@pytest.mark.parametrize("setting", [{"slots": 0}, {"max_length": 257}, {"step_tokens": 7}, {"max_waiting": 0}])
def test_a_setting_out_of_range_is_refused(onnx_dir, setting):
    with pytest.raises(BadInput, match=f"{next(iter(setting))}: .* out of range; accepted"):
        Engine.open(onnx_dir, **setting)


def test_many_slots_need_no_larger_step(onnx_dir, prompts):
    many, few = (Engine.open(onnx_dir, slots=slots).generate(prompts, GREEDY) for slots in (200, 2))
    assert [request.output_ids for request in many] == [request.output_ids for request in few]


def test_a_full_line_is_refused_but_generate_takes_any_number(onnx_dir, prompts):
    engine = Engine.open(onnx_dir, slots=1, max_waiting=2)
    start(engine, prompts[:2])
    with pytest.raises(QueueFull):
        engine.add(Request("r", [1], Sampling()))
    engine.run()
    assert len({request.finish_reason for request in engine.generate(prompts, GREEDY)}) == 1


# --- cancel and failure ----------------------------------------------------------------------------------------------


def test_cancel_frees_the_row_at_once_and_leaves_the_others_alone(onnx_dir, source_tokens, prompts):
    engine = Engine.open(onnx_dir, slots=2, step_tokens=16)
    running, other, waiting, next_up = start(engine, prompts[:4])
    engine.step()
    assert (engine.running, engine.waiting) == (2, 2)
    engine.cancel(running)
    engine.cancel(waiting)
    assert (engine.running, engine.waiting) == (1, 1)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 0)
    engine.run()
    engine.cancel(other)  # too late: nothing changes
    assert [request.finish_reason for request in (running, waiting)] == ["cancelled"] * 2
    assert [other.output_ids, next_up.output_ids] == source_tokens("llama", [prompts[1], prompts[3]], NUM_NEW)
    assert other.finish_reason == "length"


def fail_once(monkeypatch, engine: Engine, when) -> None:
    """Make the session raise on the first run that `when` accepts (called with the number of rows' logits)."""
    session, real, failed = engine._forward._session, engine._forward._session.run, []

    def run(binding):
        if not failed and when(binding):
            failed.append(binding)
            raise RuntimeError("out of memory at /secret/path")
        real(binding)

    monkeypatch.setattr(session, "run", run)


def test_a_failed_decode_ends_its_requests_and_the_engine_goes_on(onnx_dir, source_tokens, prompts, monkeypatch):
    engine = Engine.open(onnx_dir, slots=3, step_tokens=8)
    prompts = [prompts[index] for index in (0, 2, 1, 3, 4, 5)]  # lengths 1, 2, 60: after two steps two rows decode
    requests = start(engine, prompts)
    engine.step()
    engine.step()
    decoding = [request for request in requests[:3] if request.output_ids]
    fail_once(monkeypatch, engine, lambda binding: True)
    assert engine.step() == decoding == requests[:2]
    for request in decoding:
        assert request.finish_reason == "error"
        assert "RuntimeError" in request.error
        assert "/secret" not in request.error
    engine.run()
    left = [index for index in range(6) if requests[index] not in decoding]
    expected = source_tokens("llama", [prompts[index] for index in left], NUM_NEW)
    assert [requests[index].output_ids for index in left] == expected


def test_a_failed_chunk_ends_that_request_only(onnx_dir, source_tokens, prompts, monkeypatch):
    engine = Engine.open(onnx_dir, slots=3, step_tokens=128)
    requests = start(engine, prompts[:3])
    calls = []
    fail_once(monkeypatch, engine, lambda binding: calls.append(binding) or len(calls) == 2)  # decode, then chunks
    engine.run()
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert [requests[0].output_ids, requests[2].output_ids] == source_tokens("llama", [prompts[0], prompts[2]], NUM_NEW)


def test_logits_that_are_not_finite_end_their_row_only(onnx_dir, source_tokens, prompts, monkeypatch):
    engine = Engine.open(onnx_dir, slots=2)
    requests = start(engine, [prompts[2], prompts[4]])
    engine.step()
    real = engine._forward.decode

    def poisoned(works, occupants):
        logits_NV = real(works, occupants)
        logits_NV[0, 5] = np.nan
        return logits_NV

    monkeypatch.setattr(engine._forward, "decode", poisoned)
    engine.step()
    monkeypatch.setattr(engine._forward, "decode", real)
    engine.run()
    assert [request.finish_reason for request in requests] == ["error", "length"]
    assert [requests[1].output_ids] == source_tokens("llama", [prompts[4]], NUM_NEW)


def test_near_ties_are_counted(onnx_dir, monkeypatch):
    engine = Engine.open(onnx_dir, slots=1)
    logits_NV = np.zeros((1, 320), np.float32)
    logits_NV[0, 7] = 1.0
    monkeypatch.setattr(engine._forward, "decode", lambda works, occupants: logits_NV)
    (clear,) = engine.generate([[1]], GREEDY)
    logits_NV[0, 9] = 1.0 - 5e-5
    (tied,) = engine.generate([[1]], GREEDY)
    assert (clear.near_ties, tied.near_ties) == (0, NUM_NEW)
    assert tied.output_ids == clear.output_ids == [7] * NUM_NEW


def test_memory_of_the_cache_does_not_grow_or_move(onnx_dir, prompts):
    engine = Engine.open(onnx_dir, slots=2)
    before = {name: value.data_ptr() for name, value in engine._forward._cache.items()}
    engine.generate(prompts, GREEDY)
    assert before == {name: value.data_ptr() for name, value in engine._forward._cache.items()}
    assert len(engine._forward._decode_bindings) <= 2


# --- what it opens ---------------------------------------------------------------------------------------------------


def test_an_altered_directory_is_refused(onnx_copy):
    data = onnx_copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.onnx\.data: altered"):
        Engine.open(onnx_copy)


def test_an_unverified_directory_is_refused(onnx_copy):
    (onnx_copy / "verification.json").unlink()
    with pytest.raises(BadInput, match=f"never verified; run: trivet verify {onnx_copy} --provider cpu"):
        Engine.open(onnx_copy)


def test_a_failed_verification_is_refused_though_an_older_one_passed(onnx_copy):
    record = {"provider": "cpu", "onnxruntime": "1", "identity": identity(onnx_copy), "passed": False, "reason": "x"}
    append_verification(onnx_copy, record)
    with pytest.raises(BadInput, match="its verification on cpu failed: x"):
        Engine.open(onnx_copy)


def test_a_verification_with_another_onnxruntime_is_stale(onnx_dir, monkeypatch):
    monkeypatch.setattr("serving.manifest.onnxruntime_version", lambda: "9.9.9")
    with pytest.raises(BadInput, match=r"this is 9\.9\.9 \(stale\)"):
        Engine.open(onnx_dir)


def test_a_verification_of_other_files_is_stale(onnx_copy):
    manifest = onnx_copy / "trivet.json"
    manifest.write_text(manifest.read_text().replace('"context_length": 256', '"context_length": 512'))
    with pytest.raises(BadInput, match=r"of other files \(stale\)"):
        Engine.open(onnx_copy)


def test_another_task_is_refused(onnx_copy):
    manifest = onnx_copy / "trivet.json"
    manifest.write_text(manifest.read_text().replace('"causal_lm"', '"classification"', 1))
    with pytest.raises(BadInput, match="of other files"):  # nothing is believed before it is proven
        Engine.open(onnx_copy)
    record = {"provider": "cpu", "onnxruntime": onnxruntime_version(), "identity": identity(onnx_copy), "passed": True}
    append_verification(onnx_copy, record)
    with pytest.raises(BadInput, match="its task is classification"):
        Engine.open(onnx_copy)


def test_serving_and_verifying_import_no_training_library(onnx_copy):
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray', 'onnx'): sys.modules[name] = None\n"  # importing one now raises
        "from serving.engine import Engine\n"
        "from serving.request import Sampling\n"
        "from serving.verify import verify\n"
        "assert verify(sys.argv[1])['passed']\n"
        "print(len(Engine.open(sys.argv[1]).generate([[5, 6]], Sampling(max_new_tokens=3, ignore_end=True))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(onnx_copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
