"""Stopped and gone on: exactly on the same world, and in another mode or on more or fewer processes when asked to."""

import json
import socket

import pytest

STEPS, SAVED_AT, WHOLE_STEPS, ROUNDING = 3, 2, 5, 1e-5  # as in conftest.py


def went_on_from(log: str) -> list[str]:
    """The checkpoints that runs say they go on from, in order."""
    return [line.removeprefix("going on from ") for line in log.splitlines() if line.startswith("going on from ")]


def test_a_signal_to_one_rank_stops_both_and_they_go_on_bit_for_bit(modes, mode):
    launched = modes.launched(mode)
    for rank in launched["ranks"]:
        assert rank["codes"] == [0] * 6 + [75, 0, 0, 0, 0]
    # The last rank heard the signal after step 2; both saved at the end of step 3 and went on from there.
    assert launched["log"].count("stopped at step 3; start it again to go on") == 1
    assert str(modes.checkpoint(f"{mode}-stopped", 3)) in went_on_from(launched["log"])
    for kind in ("train", "eval"):
        assert modes.lines(f"{mode}-stopped", kind) == modes.lines(f"{mode}-whole", kind)


def test_each_rank_writes_its_part_of_a_checkpoint(modes, mode):
    modes.launched(mode)
    folder = modes.checkpoint(f"{mode}-whole", WHOLE_STEPS)
    sizes = [(folder / f"rank-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.2 * min(sizes)


def test_what_one_process_saved_two_go_on_with_and_the_other_way_round(modes, mode):
    launched = modes.launched(mode)
    assert str(modes.checkpoint(f"{mode}-from-alone", SAVED_AT)) in went_on_from(launched["log"])
    to_one = modes.gone_on(f"one-from-{mode}", f"{mode}-from-alone", 4, run={"steps": WHOLE_STEPS})
    for name in (f"{mode}-from-alone", to_one):
        modes.check_same_numbers(name, "alone-whole")
    assert modes.numbers(to_one, "loss")[:4] == modes.numbers(f"{mode}-from-alone", "loss")[:4]


def test_the_best_checkpoint_is_what_the_model_and_its_metrics_are_in_the_end(modes, mode):
    modes.launched(mode)
    result = json.loads((modes.run_folder(f"{mode}-best") / "result.json").read_text())
    scores = {line["step"]: line["eval_loss"] for line in modes.lines(f"{mode}-best", "eval")}
    best = min(scores, key=lambda step: (step == 0, scores[step]))
    assert result["model_step"] == best < STEPS
    assert result["metrics"]["eval_loss"] == scores[best]


def test_one_process_refuses_what_a_mode_saved_unless_it_is_told_to_reshard(modes, mode, capfd):
    from launch.train import main

    modes.launched(mode)
    name = f"refused-from-{mode}"
    modes.as_if_killed_after(3, name, f"{mode}-stopped")
    assert main([str(modes.config(name, run={"steps": WHOLE_STEPS}))]) == 2
    said = capfd.readouterr().err
    assert f"was saved by {mode.removesuffix('-offload')} on 2 processes, and this run is single on 1 process" in said
    assert "--reshard" in said
    assert not (modes.run_folder(name) / "model").exists()


def test_ranks_go_on_from_the_checkpoint_that_rank_0_chose_or_refuse_to(modes):
    steady = {"optim": {"lr": 1e-2, "schedule": "constant", "max_grad_norm": 0.3}}
    name = modes.alone("chosen", run={"steps": 5}, **steady)  # with checkpoints at 2, 4 and 5
    settings = {"checkpoint": {"reshard": True, "every": SAVED_AT, "keep": 9}, **steady}
    path = modes.config(name, run={"steps": 5, "timeout_s": 30}, **settings)
    launched = modes.launch_script("ddp", "resuming.py", path, modes.checkpoint(name, SAVED_AT))
    seen = launched["ranks"]
    # Rank 0 was started again after a failure and goes on from the newest, and rank 1 with it.
    assert [rank["restarted"] for rank in seen] == [0, 0]
    assert went_on_from(launched["log"]) == [str(modes.checkpoint(name, 5))]
    expected = modes.numbers(modes.alone("alone-6", run={"steps": 6}, **steady), "loss")
    assert modes.numbers(name, "loss") == pytest.approx(expected, rel=ROUNDING)
    for rank in seen:
        assert rank["altered"].startswith("mine: checkpoint ")
        assert "none that can be used (mine/rank-00000.safetensors: altered since it was wri" in rank["altered"]
        assert "none that can be used (mine: no such folder" in rank["gone"]
        assert rank["gone"].endswith("the same on every rank; let every machine see the same files there")
        assert f" on rank 1 ({socket.gethostname()}); accepted" in rank["gone"]
    assert not modes.run_folder("other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dying", ["zero3", "fsdp2"])
def test_a_rank_killed_in_the_middle_of_a_save_costs_only_what_came_after_the_last_one(modes, dying):
    from trainer import checkpoint

    settings = {"run": {"steps": WHOLE_STEPS}}
    path = modes.config(f"dies-{dying}", **settings)
    modes.launch(dying, path, expected=1)
    folder = modes.run_folder(f"dies-{dying}") / "checkpoints"
    found = sorted(each.name for each in folder.iterdir())
    assert found == [".step-00000004.partial", "step-00000002"], "one half, that no reader takes for a whole"
    assert checkpoint.newest(folder)[0].name == "step-00000002"
    # It goes on from there, and ends as if nothing had been.
    assert modes.launch(dying, modes.config(f"dies-{dying}", **settings))["ranks"][0]["codes"] == [0]
    alone = modes.alone("alone-whole", **settings)
    modes.check_same_numbers(f"dies-{dying}", alone)
    assert modes.checkpoint(f"dies-{dying}", WHOLE_STEPS).is_dir()


CHAIN = (("zero3", 2), ("zero2", 4), ("fsdp2", 2), ("zero3-offload", 4), ("zero1", 2), ("ddp", 1))


@pytest.mark.slow
def test_a_run_goes_on_from_mode_to_mode_and_size_to_size(modes):
    steps = 2 * len(CHAIN)
    alone = modes.alone("alone-chain", run={"steps": steps})
    for link, (mode, nproc) in enumerate(CHAIN):
        changes = {"run": {"steps": steps}, "checkpoint": {"every": 2, "reshard": True}}
        path = modes.config("chain", **changes)
        is_last = link == len(CHAIN) - 1
        codes = [rank["codes"] for rank in modes.launch(mode, path if is_last else f"{path}@1", nproc=nproc)["ranks"]]
        assert codes == [[0 if is_last else 75]] * nproc
        for name in ("loss", "grad_norm"):
            expected = modes.numbers(alone, name)[: 2 * (link + 1)]
            assert modes.numbers("chain", name) == pytest.approx(expected, rel=ROUNDING)
