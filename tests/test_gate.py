"""The gate in front of the generator, beside a server of one request at a time, in simulated time.

Symbols: mu the server's rate, requests per second.
"""

import asyncio
import heapq
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from serve.app import Remote
from serve.gate import Gate
from serve.ids import Recipe
from serve.problems import Problem


class Clock:
    """Time as it is set."""

    now = 0.0

    def __call__(self):
        return self.now


def refused(gate):
    with pytest.raises(Problem) as caught, gate():
        pass
    return caught.value.status == 503


def room(gate):
    """How many it lets in at once."""
    found = 0
    with ExitStack() as inside, suppress(Problem):
        while True:
            inside.enter_context(gate())
            found += 1
    return found


def flood(gate, clock, *, mu, rate, seconds, slow=(), at_hand=()):
    """Begin and latency of what waits and is answered, at `rate` requests/s.

    Some take 5 s more, `slow`, and some stand in no queue, `at_hand`.
    """
    start = free = clock.now
    ends, answers = [], []
    for i in range(int(rate * seconds)):
        clock.now = start + i / rate
        while ends and ends[0][0] <= clock.now:
            end, begin, _, answered, inside = heapq.heappop(ends)
            now, clock.now = clock.now, end
            answered()
            inside.close()
            clock.now = now
            answers.append((begin - start, end - begin))
        inside = ExitStack()
        try:
            answered = inside.enter_context(gate())
        except Problem:
            continue
        if i in at_hand:
            inside.close()
            continue
        free = max(free, clock.now) + 1 / mu
        heapq.heappush(ends, (free + (5 if i in slow else 0), clock.now, i, answered, inside))
    return np.array(answers)


@pytest.mark.parametrize("mu", [20, 100, 1000])
def test_what_is_let_in_is_answered_in_time_whatever_the_machine(mu):
    clock = Clock()
    answers = flood(Gate(1, least=8, clock=clock), clock, mu=mu, rate=5 * mu, seconds=60)
    assert np.percentile(answers[:, 1], 99) <= 1.5
    late = answers[:, 0] > 30
    assert late.sum() >= 0.95 * 30 * mu - 5  # and the server has never to wait for work


def test_a_machine_that_becomes_slower_is_asked_less():
    clock = Clock()
    gate = Gate(1, least=8, clock=clock)
    flood(gate, clock, mu=200, rate=1000, seconds=60)
    answers = flood(gate, clock, mu=20, rate=100, seconds=60)
    assert np.percentile(answers[answers[:, 0] > 20, 1], 99) <= 1.5


def test_answers_that_stood_in_no_queue_hide_none():
    clock = Clock()
    gate = Gate(1, least=8, clock=clock)
    at_hand = range(0, 100_000, 5)
    answers = flood(gate, clock, mu=80, rate=400, seconds=120, at_hand=at_hand)
    assert np.percentile(answers[answers[:, 0] > 60, 1], 99) <= 1.5


def test_the_least_are_let_in_however_long_they_take():
    clock = Clock()
    gate = Gate(1, least=3, clock=clock)
    waiting = deque()
    for turn in range(20):
        while len(waiting) < 3:
            inside = ExitStack()
            inside.enter_context(gate())
            waiting.append(inside)
        assert refused(gate)
        clock.now = 10.0 * (turn + 1)
        waiting.popleft().close()


def test_prompts_of_many_steps_are_no_queue():
    clock = Clock()
    gate = Gate(1, least=4, clock=clock)
    flood(gate, clock, mu=100, rate=500, seconds=30)
    before = room(gate)
    assert before > 50
    flood(gate, clock, mu=1000, rate=100, seconds=60, slow=range(0, 6000, 50))
    assert room(gate) >= before


def test_what_fails_leaves_its_place():
    gate = Gate(1, least=1)
    inside = ExitStack()
    inside.enter_context(gate())
    assert gate.full()
    assert not inside.__exit__(RuntimeError, RuntimeError(), None)
    assert not gate.full()


def test_a_full_gate_refuses_what_asks_a_generator_and_nothing_else():
    class Handle:
        """A generator that is busy until it is told."""

        answer = asyncio.Event()

        def options(self, **options):
            return self

        async def remote(self, *args):
            await self.answer.wait()
            return MADE

    async def ask():
        remote = Remote(Handle(), in_time_s=1, at_once=2)
        asked = [asyncio.create_task(call(remote)) for call in CALLS[:2]]
        await asyncio.sleep(0)
        for call in CALLS[:2]:
            with pytest.raises(Problem, match="overloaded"):
                await call(remote)
        assert remote.full("/v1/models")
        assert not remote.full("/v1/models/x/predict")
        asked += [asyncio.create_task(CALLS[2](remote)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="overloaded"):
            await CALLS[2](remote)
        assert remote.full("/v1/models/x/predict")
        info = asyncio.create_task(remote.info())  # which tells whether it is ready
        Handle.answer.set()
        await asyncio.gather(info, *asked)
        await CALLS[2](remote)

    asyncio.run(ask())


class Replicas:
    """A handle whose replicas answer so, one after the other."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def options(self, **options):
        return self

    async def remote(self, *args):
        self.asked += 1
        answer = self.answers.pop(0)
        # a problem is a replica's answer, and crosses as a value
        if isinstance(answer, RayError):
            raise answer
        return answer


RECIPE = Recipe(checkpoint="0" * 64, classes=("a", "b"), seed=0, steps=1, guidance=1.0)
MADE = SimpleNamespace(anew=True, recipe=RECIPE)
GONE = Problem("checkpoint-gone", "another is served")


def fetched(*answers, remote=None, recipe=RECIPE):
    """What a model is where the replicas that are asked answer so."""
    remote = remote or Remote(Replicas(), in_time_s=1, at_once=2)
    remote._handle = Replicas(*answers)
    return asyncio.run(remote.fetch(recipe, "json"))


@pytest.mark.parametrize("gone", [0, 1, 7, 8])
def test_a_replica_of_another_checkpoint_is_not_the_only_one(gone):
    """In a rolling update ids of either are asked of both."""
    answers = [*[GONE] * gone, MADE]

    if gone < 8:
        assert fetched(*answers).anew
    else:
        with pytest.raises(Problem, match="checkpoint-gone"):
            fetched(*answers)


@pytest.mark.parametrize("last", [True, False])
def test_a_checkpoint_that_was_here_lately_is_not_gone(monkeypatch, last):
    """Of many replicas few may still have it, and looks may miss them all."""
    remote, now = Remote(Replicas(), in_time_s=1, at_once=2), [0.0]
    monkeypatch.setattr("serve.app.time.monotonic", lambda: now[0])
    if last:
        fetched(MADE, remote=remote)
    else:
        remote._handle = Replicas([[0.5, 0.5]])
        asyncio.run(remote.predict(RECIPE, []))
    with pytest.raises(Problem, match="overloaded"):
        fetched(*[GONE] * 8, remote=remote)
    now[0] += 61
    with pytest.raises(Problem, match="checkpoint-gone"):
        fetched(*[GONE] * 8, remote=remote)


def test_an_encoder_that_is_gone_is_not_busy_with_its_checkpoint():
    remote = Remote(Replicas(), in_time_s=1, at_once=2)
    fetched(MADE, remote=remote)
    with pytest.raises(Problem, match="checkpoint-gone"):
        fetched(*[GONE] * 8, remote=remote, recipe=replace(RECIPE, encoder="another"))
    assert fetched(*[GONE] * 7, MADE, remote=remote).anew  # whose own texts are looked for


def test_a_checkpoint_that_is_gone_is_not_looked_for_by_every_request(monkeypatch):
    """Each look takes all pictures of the request with it."""
    remote, now = Remote(Replicas(), in_time_s=1, at_once=2), [0.0]
    monkeypatch.setattr("serve.app.time.monotonic", lambda: now[0])

    def looks(*answers):
        with pytest.raises(Problem, match="checkpoint-gone"):
            fetched(*answers, remote=remote)
        return remote._handle.asked

    assert [looks(*[GONE] * 8) for _ in range(3)] == [8, 1, 1]
    now[0] += 61
    assert [looks(*[GONE] * 8) for _ in range(2)] == [8, 1]
    assert fetched(MADE, remote=remote).anew  # it is back, by an update to it
    assert fetched(*[GONE] * 7, MADE, remote=remote).anew


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError("killed")], ids=repr)
@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_another_replica_answers_for_one_that_dies(error, deaths):
    """By itself, or killed for want of memory."""
    answers = [*[error] * deaths, MADE]

    if deaths < 3:
        assert fetched(*answers).anew
    else:
        with pytest.raises(Problem, match="overloaded"):
            fetched(*answers)


@pytest.mark.parametrize("anew", [True, False])
def test_only_what_was_generated_or_predicted_tells_of_a_queue(anew):
    class Handle:
        """A generator that answers at once."""

        def options(self, **options):
            return self

        async def remote(self, *args):
            return SimpleNamespace(anew=anew, recipe=RECIPE)

    async def ask():
        for call in CALLS:
            await call(remote)

    remote = Remote(Handle(), in_time_s=1, at_once=2)
    for _ in range(10):
        asyncio.run(ask())
    assert (room(remote._making) > 2) is anew
    assert room(remote._predicting) > 2


CALLS = [
    lambda remote: remote.create(None, "json"),
    lambda remote: remote.fetch(RECIPE, "json"),
    lambda remote: remote.predict(RECIPE, []),
]
