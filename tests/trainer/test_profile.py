"""The window of steps that a run records."""

import json

import pytest
from pydantic import ValidationError


def trace_names(path) -> set[str]:
    return {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}


def test_the_steps_of_the_window_are_in_the_trace_and_the_run_is_the_same(make_config, train, read_lines, capsys):
    plain, profiled = (
        make_config(run={"name": name}, log=log)
        for name, log in (("plain", {}), ("profiled", {"profile_from": 3, "profile_steps": 2}))
    )
    for config in (plain, profiled):
        assert train(config) == 0
    [trace] = (profiled.run.folder / "profile").iterdir()
    assert f"profile: {trace}, for chrome://tracing" in capsys.readouterr().err
    assert trace.name == "steps-3-4.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 2
    assert {"aten::mm", "aten::embedding"} <= trace_names(trace)
    assert read_lines(profiled) == read_lines(plain)
    assert not (plain.run.folder / "profile").exists()


def test_a_run_that_ends_within_its_window_leaves_what_it_has(make_config, train):
    config = make_config(run={"steps": 3}, log={"profile_from": 3, "profile_steps": 9})
    assert train(config) == 0
    assert [path.name for path in (config.run.folder / "profile").iterdir()] == ["steps-3-3.json"]


def test_a_window_after_the_end_is_refused(make_config):
    with pytest.raises(ValidationError, match=r"log\.profile_from: 7 found, but run\.steps is 6"):
        make_config(log={"profile_from": 7})
