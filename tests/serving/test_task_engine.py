"""The classifier's engine, step by step, over a model that says how long each row is."""

import numpy as np
import pytest

from serving.request import QueueFull
from serving.task_engine import TaskEngine, TaskRequest


class Lengths:
    """A classifier whose logits are the row's length; a row that starts with 13 fails."""

    def logits(self, ids: list[int]) -> np.ndarray:
        if ids[0] == 13:
            raise FloatingPointError("the model's logits are not finite")
        return np.array([len(ids), 0], np.float32)


def requests_of(*numbers_of_rows: int) -> list[TaskRequest]:
    return [TaskRequest(f"{n} rows", rows=[[1] * (i + 1) for i in range(n)]) for n in numbers_of_rows]


def test_a_single_text_does_not_wait_for_a_long_list():
    engine = TaskEngine(Lengths())
    long, short = requests_of(50, 1)
    engine.add(long)
    engine.add(short)
    assert [engine.step() for _ in range(2)] == [[], [short]]
    assert len(long.logits) == 1
    while not engine.idle:
        engine.step()
    assert [logits[0] for logits in long.logits] == list(range(1, 51))
    assert (long.finish_reason, short.finish_reason) == ("stop", "stop")


def test_more_than_the_slots_wait_and_more_than_the_line_are_refused():
    engine = TaskEngine(Lengths(), slots=2, max_waiting=1)
    first = requests_of(2, 2, 2)
    for request in first:
        engine.add(request)
    with pytest.raises(QueueFull):
        engine.add(requests_of(1)[0])
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    for _ in range(5):
        engine.step()
    assert [request.finish_reason for request in first] == ["stop"] * 3
    assert (engine.idle, engine.step()) == (True, [])


def test_a_row_that_fails_ends_its_own_request_only():
    engine = TaskEngine(Lengths())
    bad = TaskRequest("bad", rows=[[1], [13], [1]])
    [good] = requests_of(4)
    engine.add(bad)
    engine.add(good)
    finished = []
    while not engine.idle:
        finished += engine.step()
    assert finished == [bad, good]
    assert (bad.finish_reason, good.finish_reason) == ("error", "stop")
    assert bad.error == "the model failed on this request (FloatingPointError); the log has the details"


def test_a_cancelled_request_leaves_from_wherever_it_is():
    engine = TaskEngine(Lengths(), slots=1)
    running, waiting, last = requests_of(9, 9, 1)
    for request in (running, waiting, last):
        engine.add(request)
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    assert engine.step() == [last]
    engine.cancel(last)
    assert [request.finish_reason for request in (running, waiting, last)] == ["cancelled", "cancelled", "stop"]
    assert engine.idle
