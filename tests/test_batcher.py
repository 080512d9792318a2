"""Batching of concurrent calls: who is run with whom, and who is left alone by another's fate."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.batcher import Batcher


class Doubler:
    """Doubles numbers; a negative one is an error of its own, 13 one of the whole batch."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.gate.wait()
        self.batches.append(items)
        if 13 in items:
            raise RuntimeError("thirteen")
        return [ValueError(x) if x < 0 else 2 * x for x in items]


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
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.01)  # it is being run, alone
        rest = [asyncio.create_task(batcher(x)) for x in range(1, 12)]
        await asyncio.sleep(0)
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
        running = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.01)
        gone, stays = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0)
        gone.cancel()
        running.cancel()  # in the batch that runs: its result is thrown away
        doubler.gate.set()
        assert await stays == 4
        assert gone.cancelled()
        return await batcher(3)

    assert asyncio.run(main()) == 6
    assert doubler.batches == [[0], [2], [3]]
