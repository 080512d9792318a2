"""Lets in no more requests than are answered in time, whatever a model costs on this machine.

A queue bounded by a number is seconds long on a slow machine and needlessly short on a fast one, so
here the number follows the latency. As long as the fastest answer of a while comes in time, the
limit grows by one per round; where even that one is late, requests stand in a queue, and the limit
falls in proportion: additive increase, multiplicative decrease (Chiu and Jain 1989). The fastest
counts, as in CoDel (RFC 8289), so that a prompt of many steps is not taken for a queue; an answer
that had no queue to stand in tells nothing, and must not be counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from serve.problems import overloaded

SHARPEST = 0.5  # of the limit is kept at least, however late answers are


class Gate:
    """Counts the requests that are inside, and turns others away.

    Args:
        in_time: Seconds in which an answer should come.
        least: Requests that are let in whatever they cost; it starts with these.
        clock: Seconds, from anywhere.
    """

    def __init__(
        self, in_time: float, *, least: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._in_time, self._least, self._clock = in_time, least, clock
        self._limit = float(least)
        self._inside = 0
        self._since, self._fastest = clock(), inf

    def full(self) -> bool:
        """Nothing more is let in."""
        return self._inside >= self._limit

    @contextmanager
    def __call__(self) -> Iterator[Callable[[], None]]:
        """Around what a request asks for; what it gives is called with an answer that has waited.

        Raises:
            Problem: It is full.
        """
        if self.full():
            raise overloaded()
        begin = self._clock()
        self._inside += 1
        try:
            yield lambda: self._answered(begin)
        finally:
            self._inside -= 1

    def _answered(self, begin: float) -> None:
        now = self._clock()
        self._fastest = min(self._fastest, now - begin)
        if self._fastest <= self._in_time and 2 * self._inside >= self._limit:
            self._limit += 1 / self._limit
        if now - self._since < self._in_time:
            return
        if self._fastest > self._in_time:
            keep = max(SHARPEST, self._in_time / self._fastest)
            self._limit = max(self._limit * keep, self._least)
        self._since, self._fastest = now, inf
