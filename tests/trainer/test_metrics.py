"""metrics.jsonl and the terminal."""

import json
import subprocess
import sys

import pytest

from launch import config_file
from trainer.metrics import RunLog, read_metrics

FIELDS = {"loss": 1.0, "tokens_per_s": 10.0}


def log_of(folder, *, start_step: int = 0, total_steps: int = 20, every: int = 1) -> RunLog:
    return RunLog(folder, start_step=start_step, total_steps=total_steps, every=every, tensorboard=False)


def steps(folder) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]


def write(folder, lines: list[tuple[str, int]]) -> None:
    text = "".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_lines_come_every_so_many_steps_and_always_first_and_last(tmp_path):
    with log_of(tmp_path, every=3, total_steps=8) as log:
        for step in range(1, 9):
            log.train(step, **FIELDS)
    assert steps(tmp_path) == [("train", step) for step in (1, 3, 6, 8)]


@pytest.mark.parametrize(
    ("start_step", "kept"),
    [
        (0, []),
        (2, [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]),
        (3, [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3)]),
        (4, [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)]),
    ],
)
def test_a_resume_keeps_what_it_will_not_write_again(tmp_path, start_step, kept):
    write(tmp_path, [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)])
    with log_of(tmp_path, start_step=start_step, total_steps=4):
        pass
    assert steps(tmp_path) == kept


def test_a_kill_while_lines_are_dropped_loses_none_of_them(tmp_path, monkeypatch):
    lines = [("eval", 0), ("train", 1), ("train", 2)]
    write(tmp_path, lines)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log_of(tmp_path, start_step=1)
    assert steps(tmp_path) == lines


def test_lines_outside_a_terminal_say_how_long_it_will_take_once_a_few_steps_have_a_pace(tmp_path, monkeypatch, capsys):
    """By hand: the first step, which took an hour, does not count; four in 12 s leave 15 for 45 s."""
    now = [100.0]
    monkeypatch.setattr("trainer.metrics.time.perf_counter", lambda: now[0])
    with log_of(tmp_path, start_step=10, total_steps=30) as log:
        now[0] += 3600
        log.train(11, **FIELDS)
        now[0] += 4
        log.train(12, **FIELDS)
        now[0] += 8
        log.train(15, **FIELDS)
        now[0] += 3600
        log.train(18, **FIELDS)
        log.train(30, **FIELDS)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")] == [
        "step 12/30: loss 1.000  10 tokens/s",
        "step 15/30: loss 1.000  10 tokens/s  0:00:45 left",
        "step 18/30: loss 1.000  10 tokens/s  1:43:12 left",
        "step 30/30: loss 1.000  10 tokens/s",
    ]


def test_a_skipped_step_has_a_line_of_its_own_without_numbers_of_it(tmp_path, capsys):
    with log_of(tmp_path) as log:
        log.skip(3, "the loss is nan", 2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "skip", "step": 3, "skipped_steps": 2}]
    assert "step 3 was skipped: the loss is nan (2 so far)" in capsys.readouterr().err


def test_the_arithmetic_of_a_second_is_that_of_its_tokens(tmp_path):
    with RunLog(
        tmp_path, start_step=0, total_steps=2, every=1, tensorboard=False, flops_per_token=2.5e6
    ) as log:  # fmt: skip
        log.train(1, **FIELDS)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["flops_per_s"] == 2.5e7


def test_where_a_run_goes_on_at_its_early_end_the_last_evaluation_comes_again(tmp_path):
    write(tmp_path, [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)])
    with RunLog(tmp_path, start_step=2, total_steps=9, every=1, tensorboard=False, is_over=True):
        pass
    assert steps(tmp_path) == [("eval", 0), ("train", 1), ("train", 2)]


def test_every_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with log_of(tmp_path) as log:
        log.train(1, **FIELDS)
        assert steps(tmp_path) == [("train", 1)]


def test_a_line_never_holds_what_json_does_not_know(tmp_path):
    with log_of(tmp_path) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.train(1, loss=float("nan"), tokens_per_s=10.0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_says_what_it_does_and_nothing_else(make_config, tmp_path, monkeypatch):
    """In a process of its own, as a user starts it: no word from DeepSpeed, PEFT, transformers or torch."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    config = make_config("sft", "lora", run={"steps": 2}, log={"tensorboard": True})
    (tmp_path / "run.yaml").write_text(config_file.to_yaml(config))
    command = [sys.executable, "-m", "launch.train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert said == ["cut", "leaks", "run", "step 0", "step 1/2", "step 2/2", "step 2", "model"], done.stderr
