"""Many concurrent requests, one call.

Ray Serve's own `@serve.batch` forms a batch before it waits for the last one to end, so that it
either delays a lone request or, without a delay, makes batches of one under load. Here a batch is
what has come in while the last one ran: nothing waits on an idle replica, and batches grow with
the load by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Awaitable calls of one item each, run together in a thread.

    Args:
        run: Takes a list of items, returns a result or an exception for each.
        most: Items in a call.
        executor: Where `run` is called; one call at a time.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result | Exception]],
        *,
        most: int,
        executor: Executor,
    ) -> None:
        self._run, self._most, self._executor = run, most, executor
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def __call__(self, item: Item) -> Result:
        """The item's result; a cancelled call leaves the batch that has not begun."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        return await future

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._most:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._take():
                items = [item for item, _ in batch]
                results: list[Result | Exception]
                try:
                    results = await loop.run_in_executor(self._executor, self._run, items)
                except Exception as error:
                    results = [error] * len(batch)
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():  # its caller has gone
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._worker = None
