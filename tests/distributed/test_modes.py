"""Two processes in every mode take the steps of one, hold the share that theory says, and write the same model.

In the fast set each mode is launched once, with each strategy once and the objectives in turn.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

STEPS, WHOLE_STEPS, ROUNDING = 3, 5, 1e-5  # as in conftest.py


def tensors(folder: Path) -> dict[str, tuple]:
    """The bits of every tensor of a folder, with shape and type."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                value = file.get_tensor(name)
                found[f"{path.relative_to(folder)}: {name}"] = (value.shape, str(value.dtype), value.tobytes())
    return found


def settings(path: Path) -> dict:
    """A JSON file. PEFT keeps the names of the layers it wraps as a set, whose order is of the process."""
    found = json.loads(path.read_text())
    return {key: sorted(value) if key == "target_modules" else value for key, value in found.items()}


def check_same_model(modes, mode: str, case: tuple[str, str]) -> None:
    """Compare what a mode wrote with what one process writes that goes on from the mode's last checkpoint."""
    name = f"{mode}-{'-'.join(case)}"
    written = modes.run_folder(name) / "model"
    expected = modes.run_folder(modes.gone_on(f"same-{name}", name, STEPS, *case)) / "model"
    ours, theirs = tensors(written), tensors(expected)
    assert ours, written
    assert ours == theirs, [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (written, expected)]
    assert files[0] == files[1]
    for path in written.rglob("*.json"):
        if path.name != "trivet.json":  # whose hashes are of the card too, which tells the metrics
            assert settings(path) == settings(expected / path.relative_to(written)), path
    results = [json.loads((folder.parent / "result.json").read_text()) for folder in (written, expected)]
    for key in ("trainable_parameters", "total_parameters", "step", "objective"):
        assert results[0].get(key) == results[1].get(key), key


def test_the_fast_set_has_every_pair_of_mode_objective_and_strategy(modes):
    cases = {(mode, *case) for mode in THEORY for case in modes.fast_cases(mode)}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(case[first], case[second]) for case in cases}
        possible = [{(mode, *case)[i] for mode in THEORY for case in modes.all_cases} for i in (first, second)]
        assert len(pairs) == len(possible[0]) * len(possible[1])


def test_two_processes_take_the_steps_of_one(modes, mode):
    modes.launched(mode)
    for case in modes.fast_cases(mode):
        name = "-".join(case)
        modes.check_same_numbers(f"{mode}-{name}", modes.alone(f"alone-{name}", *case))
    assert json.loads((modes.run_folder(f"{mode}-whole") / "result.json").read_text())["world_size"] == 2


def test_the_model_directory_is_bit_for_bit_that_of_one_process(modes, mode):
    modes.launched(mode)
    for case in modes.fast_cases(mode):
        check_same_model(modes, mode, case)


def test_the_model_directory_holds_what_one_process_learned(modes, mode):
    """Not only what the mode's own checkpoint says that it learned."""
    modes.launched(mode)
    for case in modes.fast_cases(mode):
        name = "-".join(case)
        alone = modes.run_folder(modes.alone(f"alone-{name}", *case)) / "model"
        check_learned(modes.run_folder(f"{mode}-{name}") / "model", alone)


# What is added to all keys alike changes no attention: its gradient is rounding, of which AdamW makes whole steps.
NOISE = "key.bias"


def check_learned(written: Path, expected: Path) -> None:
    ours, theirs = values(written), values(expected)
    assert ours
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        apart = np.linalg.norm(ours[name] - value) / (np.linalg.norm(value) or 1.0)
        assert apart <= ROUNDING or name.endswith(NOISE), (written, name, apart)


def values(folder: Path) -> dict[str, np.ndarray]:
    return {
        f"{path.name}: {name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_a_fresh_process_loads_the_model_of_a_mode_with_transformers_alone(modes, mode):
    modes.launched(mode)
    objective = next(objective for objective, strategy in modes.fast_cases(mode) if strategy == "full")
    folders = [str(modes.run_folder(f"{each}-{objective}-full") / "model") for each in (mode, "alone")]
    modes.alone(f"alone-{objective}-full", objective, "full")
    command = [sys.executable, "-c", _STATES, *folders]
    apart = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert apart["weights"] >= 20
    assert apart["most"] <= ROUNDING


_STATES = """
import json, sys, torch
from transformers import AutoModel
def load(folder):
    torch.manual_seed(0)  # of what the folder has not: the pooler of a masked language model
    return AutoModel.from_pretrained(folder).state_dict()
ours, theirs = map(load, sys.argv[1:])
assert ours.keys() == theirs.keys()
most = max(float((ours[name] - value).norm() / (value.norm() or 1)) for name, value in theirs.items()
           if not name.endswith("key.bias"))
print(json.dumps({"weights": len(ours), "most": most}))
"""


def test_a_rank_without_anything_to_learn_from_changes_nothing(modes, mode):
    ranks = modes.launched(mode)["ranks"]
    settings = {"data": {"train": str(modes.folder / "silent.jsonl")}, "run": {"steps": WHOLE_STEPS}}
    counts = [[sum(parts) for parts in rank["seen"][f"silent-{mode}"]["targets"]] for rank in ranks]
    assert any(0 in pair and sum(pair) for pair in zip(*counts, strict=True)), f"both ranks always learn: {counts}"
    modes.check_same_numbers(f"silent-{mode}", modes.alone("silent", **settings))


# Bytes of each, as parts of those of the whole model in fp32, on one of N ranks: arXiv:1910.02054, figure 1. `copies`
# are the fp32 weights that DeepSpeed steps, which it keeps beside those it computes with even where those are fp32 too.
THEORY = {
    "ddp": {"weights": "1", "copies": "0", "gradients": "1", "optimizer": "2"},
    "zero1": {"weights": "1", "copies": "1/N", "gradients": "1", "optimizer": "2/N"},
    "zero2": {"weights": "1", "copies": "1/N", "gradients": "1/N", "optimizer": "2/N"},
    "zero3": {"weights": "1/N", "copies": "1/N", "gradients": "1/N", "optimizer": "2/N"},
    "zero3-offload": {"weights": "1/N", "copies": "1/N", "gradients": "1/N", "optimizer": "2/N"},
    "fsdp2": {"weights": "1/N", "copies": "0", "gradients": "1/N", "optimizer": "2/N"},
}
# Padding, norms that ZeRO-3 keeps whole, and rows that do not divide: of 28,000 weights under 3 %. The gradient of a
# weight across the border of two ranks is held whole by both under ZeRO-1 and 2: here 1,440 numbers more.
SLACK = {"weights": 0.03, "copies": 0.03, "gradients": 0.06, "optimizer": 0.03}


def test_each_rank_holds_the_share_of_weights_gradients_and_optimizer_state_that_theory_says(modes, mode):
    ranks = modes.launched(mode)["ranks"]
    whole = 4 * json.loads((modes.run_folder(f"{mode}-whole") / "result.json").read_text())["total_parameters"]
    for rank in ranks:
        found = {name: size / whole for name, size in rank["seen"][f"{mode}-whole"]["bytes"].items()}
        for name, part in THEORY[mode].items():
            expected = eval(part, {"N": len(ranks)})
            assert found[name] == pytest.approx(expected, abs=SLACK[name]), (name, found)


@pytest.mark.parametrize("divided", ["zero3", "zero3-offload"])
def test_zero_3_hands_the_engine_no_weight_that_is_whole(modes, divided):
    """It would move a whole model to each GPU before it divides it."""
    for rank in modes.launched(divided)["ranks"]:
        assert rank["seen"][f"{divided}-whole"]["whole"] == 0
    for rank in modes.launched("zero2")["ranks"]:
        assert rank["seen"]["zero2-whole"]["whole"] > 0


@pytest.mark.slow
def test_every_objective_with_every_strategy_is_the_same_on_two_processes(modes, mode):
    modes.launched(mode)  # the fast ones
    left = {f"{mode}-{'-'.join(case)}": case for case in modes.all_cases if case not in modes.fast_cases(mode)}
    modes.launch(mode, *(modes.config(name, *case) for name, case in left.items()))
    for name, case in left.items():
        modes.check_same_numbers(name, modes.alone(f"alone-{'-'.join(case)}", *case))
        check_same_model(modes, mode, case)


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one(modes, mode):
    cases = {f"{mode}-{'-'.join(case)}-on-4": case for case in modes.all_cases}
    modes.launch(mode, *(modes.config(name, *case) for name, case in cases.items()), nproc=4)
    for name, case in cases.items():
        modes.check_same_numbers(name, modes.alone(f"alone-{'-'.join(case)}", *case))
