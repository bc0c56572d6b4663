"""The driver with a fake engine: one thread, tokens to the right reader, failures contained, a clean end."""

import asyncio
import threading
import time

import pytest

from serving.directory import BadInput
from serving.driver import UNHEALTHY_AFTER, Driver, Stopping
from serving.request import QueueFull, Request, Sampling


@pytest.fixture
def driver(engine):
    driver = Driver(engine)
    driver.start()
    yield driver
    driver.stop()
    assert not driver.alive


def make_request(max_new_tokens: int = 10, **sampling) -> Request:
    return Request("r", [1, 2, 3], Sampling(max_new_tokens=max_new_tokens, ignore_end=True, **sampling))


async def read(driver: Driver, request: Request) -> list[int]:
    await driver.submit(request)
    return [token_id async for ids in driver.stream(request) for token_id in ids]


def test_many_requests_at_once_each_get_their_own_tokens(engine, driver, eventually):
    engine._max_waiting = 50

    async def main():
        return await asyncio.gather(*(read(driver, make_request(n)) for n in range(1, 31)))

    for count, ids in enumerate(asyncio.run(main()), start=1):
        assert ids == (engine.reply_ids * 2)[:count]
    assert engine.threads == {driver._thread.ident}
    eventually(lambda: driver.num_live == 0)  # the last token is read before its thread takes the request off its list


def test_a_request_that_finished_before_it_is_read_loses_nothing(engine, driver):
    async def main():
        request = make_request(5)
        await driver.submit(request)
        while not request.is_finished:
            await asyncio.sleep(0.001)
        return [token_id async for ids in driver.stream(request) for token_id in ids]

    assert asyncio.run(main()) == engine.reply_ids[:5]


def test_what_the_engine_refuses_reaches_the_caller(engine, driver):
    async def main():
        with pytest.raises(BadInput, match="accepted: up to 199"):
            await driver.submit(Request("long", [1] * 200, Sampling()))
        engine.step_s = 0.02
        submissions = [driver.submit(make_request(1000)) for _ in range(10)]
        outcomes = await asyncio.gather(*submissions, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {type(None), QueueFull}
        driver.cancel_all()

    asyncio.run(main())


def test_leaving_a_stream_early_cancels_the_request(engine, driver, eventually):
    async def main():
        request = make_request(1_000_000)
        await driver.submit(request)
        stream = driver.stream(request)
        await anext(stream)
        await stream.aclose()
        return request

    request = asyncio.run(main())
    eventually(lambda: engine.cancelled == [request] and engine.idle)
    assert request.finish_reason == "cancelled"


def test_a_caller_that_is_cancelled_while_it_submits_leaves_nothing_behind(engine, driver, eventually):
    engine.step_s = 0.05

    async def main():
        await driver.submit(make_request(3))  # keeps the thread busy with steps
        task = asyncio.create_task(read(driver, make_request(1_000_000)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    eventually(lambda: engine.idle and driver.num_live == 0)


def test_a_step_that_raises_ends_its_requests_and_the_next_ones_are_served(engine, driver):
    async def main():
        engine.step_errors = [RuntimeError("out of memory at 0xdeadbeef")]
        failed = make_request(5)
        assert await read(driver, failed) == []
        assert failed.finish_reason == "error"
        assert "0xdeadbeef" not in failed.error
        assert driver.healthy
        assert await read(driver, make_request(5)) == engine.reply_ids[:5]

    asyncio.run(main())
    assert driver.num_failed_steps == 0


def test_repeated_failures_make_it_unhealthy_and_a_good_step_healthy_again(engine, driver):
    async def main():
        engine.step_errors = [RuntimeError("broken")] * UNHEALTHY_AFTER
        for _ in range(UNHEALTHY_AFTER):
            await read(driver, make_request(5))
        assert driver.alive
        assert not driver.healthy
        await read(driver, make_request(5))
        assert driver.healthy

    asyncio.run(main())


def test_an_engine_that_cannot_cancel_does_not_kill_the_thread(engine, driver, monkeypatch):
    def refuse(request):
        raise RuntimeError("cannot")

    async def main():
        monkeypatch.setattr(engine, "cancel", refuse)
        stuck = make_request(1_000_000)
        await driver.submit(stuck)
        driver.cancel(stuck)
        await asyncio.sleep(0.05)
        assert driver.alive
        monkeypatch.undo()
        assert await read(driver, make_request(2)) == engine.reply_ids[:2]

    asyncio.run(main())


def test_draining_lets_requests_finish_and_takes_no_new_ones(engine, driver):
    engine.step_s = 0.005

    async def main():
        running = asyncio.create_task(read(driver, make_request(30)))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(driver.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(Stopping):
            await driver.submit(make_request())
        assert await draining is True
        assert len(await running) == 30

    asyncio.run(main())


def test_a_drain_that_takes_too_long_gives_up_and_stop_ends_the_rest(engine, driver):
    engine.step_s = 0.005

    async def main():
        request = make_request(1_000_000)
        running = asyncio.create_task(read(driver, request))
        await asyncio.sleep(0.05)
        assert await driver.drain(0.05) is False
        await asyncio.to_thread(driver.stop)
        await running
        assert request.finish_reason == "cancelled"

    asyncio.run(main())


def test_a_drain_does_not_miss_a_request_that_is_just_being_added(engine, driver, monkeypatch):
    add = engine.add

    def slow_add(request):
        time.sleep(0.1)
        add(request)

    async def main():
        monkeypatch.setattr(engine, "add", slow_add)
        running = asyncio.create_task(read(driver, make_request(20)))
        await asyncio.sleep(0.03)
        assert await driver.drain(5) is True
        driver.cancel_all()
        assert len(await running) == 20

    asyncio.run(main())


def test_after_the_end_nothing_is_taken_and_nobody_waits_for_ever(engine):
    driver = Driver(engine)
    driver.start()
    driver.stop()
    driver.draining = False  # even if nobody said that it ends

    async def main():
        with pytest.raises(Stopping):
            await asyncio.wait_for(driver.submit(make_request()), 1)

    asyncio.run(main())


def test_many_submissions_against_a_stop_all_get_an_answer(engine):
    for _ in range(20):
        driver = Driver(engine)
        driver.start()

        async def main(driver=driver):
            tasks = [asyncio.create_task(read(driver, make_request(3))) for _ in range(6)]
            stopper = threading.Thread(target=driver.stop)
            await asyncio.sleep(0)
            stopper.start()
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
            stopper.join()

        asyncio.run(main())
