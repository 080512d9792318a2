"""Many concurrent requests, one call after another.

Ray Serve's own `@serve.batch` forms a batch before it waits for the last one to end, so that it
either delays a lone request or, without a delay, makes batches of one under load. Here what has
come in joins at the next call: nothing waits on an idle replica, and batches grow with the load by
themselves. A call need not end what it was given: what it leaves is in the next call again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Awaitable calls of one item each, run together in a thread.

    Args:
        run: Takes items by ticket, a number that no other item ever has, and returns a result or an
            exception for each that it has ended. What it has not ended it is given again, unless
            the caller has gone.
        most: Items in a call.
        executor: Where `run` is called; one call at a time.
    """

    def __init__(
        self,
        run: Callable[[Mapping[int, Item]], Mapping[int, Result | Exception]],
        *,
        most: int,
        executor: Executor,
    ) -> None:
        self._run, self._most, self._executor = run, most, executor
        self._tickets = count()
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: dict[int, tuple[Item, asyncio.Future[Result]]] = {}
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait; may be asked in any thread."""
        return len(self._waiting)

    async def __call__(self, item: Item) -> Result:
        """The item's result; a cancelled call is in no later call of `run`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        return await future

    def _gather(self) -> dict[int, Item]:
        """The items of the next call: those that are left, and those that wait."""
        self._running = {
            ticket: (item, future)
            for ticket, (item, future) in self._running.items()
            if not future.done()
        }
        while self._waiting and len(self._running) < self._most:
            item, future = self._waiting.popleft()
            if not future.done():  # its caller has not gone
                self._running[next(self._tickets)] = item, future
        return {ticket: item for ticket, (item, _) in self._running.items()}

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while items := self._gather():
                results: Mapping[int, Result | Exception]
                try:
                    results = await loop.run_in_executor(self._executor, self._run, items)
                except Exception as error:
                    results = dict.fromkeys(items, error)
                for ticket, result in results.items():
                    _, future = self._running.pop(ticket)
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._worker = None
