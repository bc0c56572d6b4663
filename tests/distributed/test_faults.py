"""What goes wrong between ranks is named in one block, and the run goes on from where it can. Every fault is caused."""

import json

import pytest

from launch import processes

STEPS, SAVED_AT = 8, 2
TIMEOUT_S = 8


@pytest.fixture
def faulty(modes, trivet, monkeypatch, tmp_path):
    """Return a function that calls `trivet train` on a config with faults to come; returns its code and what it said."""

    def run(path, faults, *arguments) -> tuple[int, str]:
        compose = processes.accelerate_command

        def composed(*args, **kwargs):
            argv, env = compose(*args, **kwargs)
            at = argv.index("launch.train")
            return [*argv[: at - 1], str(modes.script("faulty.py")), *argv[at + 1 :]], env

        monkeypatch.setattr(processes, "accelerate_command", composed)
        monkeypatch.setenv("FAULTS", json.dumps(faults))
        monkeypatch.setenv("FAULT_FOLDER", str(tmp_path))
        for name, value in modes.environment().items():
            monkeypatch.setenv(name, value)
        code, _, err = trivet("train", path, "--nproc", 2, *arguments)
        return code, err

    return run


def test_a(faulty, modes):
    settings = {"run": {"steps": STEPS, "timeout_s": TIMEOUT_S}, "checkpoint": {"every": SAVED_AT}}
    path = modes.config("faults", **settings)
    faults = [
        {"rank": 1, "phase": "backward", "step": 4, "do": "kill"},
        {"rank": 1, "phase": "forward", "step": 6, "do": "hang"},
    ]
    code, said = faulty(path, faults, "--max-restarts", 2)
    print(said)
    assert code == 0
