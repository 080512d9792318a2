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
from threading import Lock
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Awaitable calls of one item each, run together in a thread.

    The thread goes from one call to the next by itself: it would otherwise stand still, between any
    two, until the event loop has done all that came before.

    Args:
        run: Takes items by ticket, a number that no other item ever has, and returns a result or an
            exception for each that it has ended. What it has not ended it is given again, unless
            the caller has gone.
        most: Items in a call.
        executor: Where `run` is called, one call at a time; what others submit comes in between.
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
        self._running: dict[int, tuple[Item, asyncio.Future[Result]]] = {}  # the thread's own
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._awake = False  # a call is going on, or will
        self._lock = Lock()  # of the last two together

    def __len__(self) -> int:
        """Items that wait, and whose callers have not gone."""
        with self._lock:
            return sum(not future.done() for _, future in self._waiting)

    def __call__(self, item: Item) -> asyncio.Future[Result]:
        """The item's result; where it is cancelled, the item is in no later call of `run`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._lock:
            self._waiting.append((item, future))
            awake, self._awake = self._awake, True
        if not awake:  # a turn later, together with what else comes in this one
            loop.call_soon(self._executor.submit, self._call)
        return future

    def _gather(self) -> dict[int, Item]:
        """The items of the next call: those that are left, and those that wait."""
        self._running = {
            ticket: (item, future)
            for ticket, (item, future) in self._running.items()
            if not future.done()
        }
        with self._lock:
            while self._waiting and len(self._running) < self._most:
                item, future = self._waiting.popleft()
                if not future.done():  # its caller has not gone
                    self._running[next(self._tickets)] = item, future
            self._awake = bool(self._running)
        return {ticket: item for ticket, (item, _) in self._running.items()}

    def _call(self) -> None:
        items = self._gather()
        if not items:
            return
        results: Mapping[int, Result | Exception]
        try:
            results = self._run(items)
        except Exception as error:
            results = dict.fromkeys(items, error)
        for ticket, result in results.items():
            _, future = self._running.pop(ticket)
            if not future.done():
                future.get_loop().call_soon_threadsafe(_settle, future, result)
        self._executor.submit(self._call)


def _settle(future: asyncio.Future[Result], result: Result | Exception) -> None:
    if future.done():  # its caller has gone
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
