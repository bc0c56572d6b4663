"""The scheduler, on requests whose tokens are counted by hand."""

import pytest

from serving.request import Request, Sampling
from serving.scheduler import Plan, QueueFull, Scheduler


def request(num_tokens: int, name: str = "r") -> Request:
    return Request(name, [1] * num_tokens, Sampling())


def carry_out(plan: Plan) -> None:
    """Do what the engine does with a plan: count the tokens, and append one where the last is reached."""
    for work in [*plan.decode, *plan.chunks]:
        reaches_end = work.reaches_end
        work.request.num_computed += work.num_tokens
        if reaches_end:
            work.request.output_ids.append(1)


def sizes(plan: Plan) -> tuple[list[str], list[tuple[str, int]]]:
    return [work.request.id for work in plan.decode], [(work.request.id, work.num_tokens) for work in plan.chunks]


def test_decode_rows_come_first_and_prompts_share_what_is_left_of_the_budget():
    scheduler = Scheduler(num_slots=3, step_tokens=10, max_waiting=9)
    scheduler.add(request(4, "a"))
    carry_out(scheduler.next_plan())
    for name in "bc":
        scheduler.add(request(12, name))
    expected = [
        (["a"], [("b", 9)]),
        (["a"], [("b", 3), ("c", 6)]),
        (["a", "b"], [("c", 6)]),
        (["a", "b", "c"], []),
    ]
    for each in expected:
        plan = scheduler.next_plan()
        assert sizes(plan) == each
        carry_out(plan)


def test_a_prompt_of_one_token_is_a_decode_row():
    scheduler = Scheduler(num_slots=1, step_tokens=4, max_waiting=9)
    scheduler.add(request(1, "a"))
    assert sizes(scheduler.next_plan()) == (["a"], [])


def test_a_prompt_moves_in_every_step_even_when_the_budget_is_only_the_slots():
    scheduler = Scheduler(num_slots=3, step_tokens=3, max_waiting=9)
    for name in "ab":
        scheduler.add(request(1, name))
    carry_out(scheduler.next_plan())
    scheduler.add(request(5, "long"))
    for _ in range(4):
        plan = scheduler.next_plan()
        assert sizes(plan) == (["a", "b"], [("long", 1)])
        carry_out(plan)
    assert sizes(scheduler.next_plan()) == (["a", "b", "long"], [])


def test_who_waits_is_seated_in_order_in_the_lowest_free_row():
    scheduler = Scheduler(num_slots=2, step_tokens=8, max_waiting=9)
    first, second, third, fourth = (request(3, name) for name in "abcd")
    for each in (first, second, third, fourth):
        scheduler.add(each)
    scheduler.next_plan()
    assert scheduler.kv_slots.occupants == [first, second]
    scheduler.remove(first)
    scheduler.next_plan()
    assert scheduler.kv_slots.occupants == [third, second]
    assert list(scheduler.waiting) == [fourth]


def test_decode_rows_are_in_the_order_of_their_rows_and_chunks_in_the_order_of_arrival():
    scheduler = Scheduler(num_slots=2, step_tokens=8, max_waiting=9)
    first, second, third = (request(1, name) for name in "abc")
    for each in (first, second, third):
        scheduler.add(each)
    scheduler.next_plan()
    scheduler.remove(first)
    assert sizes(scheduler.next_plan())[0] == ["c", "b"]


def test_a_removed_request_is_gone_from_row_and_line_and_removing_it_again_does_nothing():
    scheduler = Scheduler(num_slots=1, step_tokens=4, max_waiting=9)
    seated, waiting = request(3), request(3)
    scheduler.add(seated)
    scheduler.next_plan()
    scheduler.add(waiting)
    for each in (waiting, seated, seated):
        scheduler.remove(each)
    assert not scheduler.waiting
    assert scheduler.kv_slots.occupants == [None]
    assert scheduler.kv_slots.slot_of == {}


def test_the_line_has_a_limit():
    scheduler = Scheduler(num_slots=1, step_tokens=4, max_waiting=2)
    scheduler.add(request(1))
    scheduler.add(request(1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        scheduler.add(request(1))
