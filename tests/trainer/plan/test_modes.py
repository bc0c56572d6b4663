"""What each mode needs, against theory (Rajbhandari et al., arXiv:1910.02054): fp32 weights, gradients, moments."""

import pytest

from serving.directory import BadInput
from trainer import build
from trainer.plan import zero
from trainer.plan.modes import MODES, make_plan, names
from trainer.plan.recordings import Recordings
from trainer.plan.sketch import run_like

# Embedding 300 * 32 (tied); two layers of q and o 32 * 32, k and v 32 * 16, three of 32 * 64, two norms; a norm.
EMBEDDING = 300 * 32
NUMEL = EMBEDDING + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
ROUNDED = 1000  # bytes: two buffers of frequencies, and parts rounded up


@pytest.fixture
def recordings_of(make_config):
    """Return a function that records the passes of a config for so many ranks."""

    def of(world_size: int, *, on_gpu: bool = False, **changes) -> Recordings:
        config = make_config(**changes)
        parts = build.build(config)
        drawn = run_like(parts.outline, parts.model, parts.objective)
        return Recordings(drawn, config, parts.feed, world_size=world_size, on_gpu=on_gpu)

    return of


def test_each_mode_divides_among_four_ranks_what_it_says(recordings_of):
    """Bytes for each weight, of weights, gradients and moments. DeepSpeed adds its fp32 copy to the weights, and, when
    it steps, the gradients of that copy."""
    recordings = recordings_of(4, on_gpu=True)
    expected = {
        "ddp": (4, 4, 8),
        "zero1": (4 + 1, 4 + 1, 2),
        "zero2": (4 + 1, 1 + 1, 2),
        "fsdp2": (1, 1, 2),
        "zero3": (1 + 1, 1 + 1, 2),
        "zero3-offload": (0, 0, 0),
    }
    assert list(names(4)) == list(expected)
    for mode, per_weight in expected.items():
        plan = make_plan(recordings, mode)
        if mode == "zero1":
            per_weight = (5, 2, 2)  # with one micro-batch its gradients go through the bucket, as ZeRO-2's do
        # With DDP one gradient more, the embedding's: it has come and is not yet in its bucket.
        gradients_bytes = plan.gradients_bytes - (4 * EMBEDDING if mode == "ddp" else 0)
        found = (plan.weights_bytes, gradients_bytes, plan.optimizer_bytes)
        assert found == pytest.approx([each * NUMEL for each in per_weight], abs=ROUNDED), mode
        assert (plan.host_bytes > 0) == (mode == "zero3-offload")


def test_zero_3_gathers_no_more_than_it_keeps_and_the_layer_that_runs(recordings_of, monkeypatch):
    recordings = recordings_of(64, on_gpu=True, batch={"rows": 64})
    kept = make_plan(recordings, "zero3").most_by_phase["evaluation"]
    monkeypatch.setattr(zero, "_GATHERED_NUMEL", 0)
    layer = (NUMEL - EMBEDDING - 32) // 2
    found = make_plan(recordings, "zero3").most_by_phase["evaluation"]
    assert found == pytest.approx(kept - 2 * 4 * layer, abs=ROUNDED), "neither of the two layers stays for the other"


def test_zero_1_keeps_all_gradients_of_micro_batches_before_the_last(recordings_of):
    plan = make_plan(recordings_of(2, batch={"rows": 8, "micro_rows": 2}), "zero1")
    assert plan.gradients_bytes == pytest.approx((4 + 2) * NUMEL, abs=ROUNDED)


def test_with_ddp_gradients_lie_in_the_buckets_but_for_passes_that_are_not_reduced(recordings_of):
    """Micro-batches before the last leave theirs beside the buckets."""
    single = make_plan(recordings_of(1), "single")
    ddp, twice = (make_plan(recordings_of(2, batch={"rows": 4, "micro_rows": n}), "ddp") for n in (2, 1))
    assert (ddp.weights_bytes, ddp.optimizer_bytes) == (single.weights_bytes, single.optimizer_bytes)
    assert ddp.gradients_bytes == pytest.approx(4 * (NUMEL + EMBEDDING), abs=ROUNDED)
    assert twice.gradients_bytes == pytest.approx(8 * NUMEL, abs=ROUNDED)


def test_deepspeed_computes_with_weights_of_half_the_size_in_bf16(recordings_of):
    plan = make_plan(recordings_of(2, precision={"type": "bf16"}), "zero2")
    # Halves of 2 bytes, and this rank's half of an fp32 copy.
    assert plan.weights_bytes == pytest.approx((2 + 2) * NUMEL, abs=ROUNDED)


def test_a_mode_that_the_config_does_not_go_with_is_refused(recordings_of):
    recordings = recordings_of(2, optim={"type": "adafactor"})
    for mode in set(MODES) - {"single", "ddp"}:
        with pytest.raises(BadInput, match=r"optim\.type: adafactor found; accepted with "):
            make_plan(recordings, mode)
    assert make_plan(recordings, "ddp").total_bytes > 0
