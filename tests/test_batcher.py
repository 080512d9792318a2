"""Batching of concurrent calls: who is run with whom, and who is left alone by another's fate."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.batcher import Batcher


class Doubler:
    """Doubles numbers; a negative one is an error of its own, 13 one of the whole batch.

    Those of 100 and more take a second call.
    """

    def __init__(self):
        self.batches, self.seen, self.gate = [], set(), threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.gate.wait()
        self.batches.append(list(items.values()))
        if 13 in items.values():
            raise RuntimeError("thirteen")
        ended = {ticket: x for ticket, x in items.items() if x < 100 or ticket in self.seen}
        self.seen |= items.keys()
        return {t: ValueError(x) if x < 0 else 2 * x for t, x in ended.items()}


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_what_waits_is_run_together_and_in_order(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=8, executor=executor)
        doubler.gate.clear()
        first = batcher(0)
        await asyncio.sleep(0.01)  # it is being run, alone
        rest = [batcher(x) for x in range(1, 12)]
        assert len(batcher) == 11
        doubler.gate.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(main()) == [2 * x for x in range(12)]
    assert doubler.batches == [[0], list(range(1, 9)), [9, 10, 11]]


def test_an_error_of_one_is_not_an_error_of_its_neighbours(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=8, executor=executor)
        return await asyncio.gather(batcher(1), batcher(-1), batcher(2), return_exceptions=True)

    one, error, two = asyncio.run(main())
    assert (one, two) == (2, 4)
    assert isinstance(error, ValueError)


def test_a_failed_batch_fails_all_its_calls_and_no_later_one(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=8, executor=executor)
        failed = await asyncio.gather(batcher(13), batcher(1), return_exceptions=True)
        return failed, await batcher(2)

    failed, later = asyncio.run(main())
    assert [type(error) for error in failed] == [RuntimeError, RuntimeError]
    assert later == 4


def test_a_cancelled_call_is_not_run_and_hangs_nobody(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=8, executor=executor)
        doubler.gate.clear()
        running = batcher(0)
        await asyncio.sleep(0.01)
        gone, stays = batcher(1), batcher(2)
        assert len(batcher) == 2
        gone.cancel()
        assert len(batcher) == 1
        running.cancel()  # in the batch that runs: its result is thrown away
        doubler.gate.set()
        assert await stays == 4
        assert gone.cancelled()
        return await batcher(3)

    assert asyncio.run(main()) == 6
    assert doubler.batches == [[0], [2], [3]]


def test_what_a_call_does_not_end_is_in_the_next_and_others_join_it(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=3, executor=executor)
        doubler.gate.clear()
        first = [batcher(x) for x in (100, 1)]
        await asyncio.sleep(0.01)
        later = [batcher(x) for x in (101, 2, 3)]
        doubler.gate.set()
        return await asyncio.gather(*first, *later)

    assert asyncio.run(main()) == [200, 2, 202, 4, 6]
    assert doubler.batches == [[100, 1], [100, 101, 2], [101, 3]]


def test_a_call_that_is_cancelled_between_two_calls_is_not_in_the_second(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=3, executor=executor)
        doubler.gate.clear()
        gone, stays = (batcher(x) for x in (100, 101))
        await asyncio.sleep(0.01)
        gone.cancel()
        doubler.gate.set()
        return await stays

    assert asyncio.run(main()) == 202
    assert doubler.batches == [[100, 101], [101]]


def test_a_failure_takes_all_that_run_and_none_that_come_after(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=3, executor=executor)
        doubler.gate.clear()
        first = batcher(100)
        await asyncio.sleep(0.01)
        second = batcher(13)
        doubler.gate.set()
        failed = await asyncio.gather(first, second, return_exceptions=True)
        return failed, await batcher(102)

    failed, later = asyncio.run(main())
    assert [type(error) for error in failed] == [RuntimeError, RuntimeError]
    assert later == 204


def test_the_thread_does_not_wait_for_the_event_loop(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=3, executor=executor)
        task = batcher(100)
        await asyncio.sleep(0)
        end = time.monotonic() + 10
        while len(doubler.batches) < 2:  # the loop is busy all this time
            assert time.monotonic() < end
        assert not task.done()
        return await task

    assert asyncio.run(main()) == 200
    assert doubler.batches == [[100], [100]]


def test_other_work_of_the_thread_comes_in_between_two_calls(doubler, executor):
    async def main():
        batcher = Batcher(doubler, most=3, executor=executor)
        doubler.gate.clear()
        task = batcher(100)
        await asyncio.sleep(0.01)
        other = executor.submit(lambda: len(doubler.batches))
        doubler.gate.set()
        await task
        return other.result()

    assert asyncio.run(main()) == 1
