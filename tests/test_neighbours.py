"""Training tasks of neighbouring classes: as close as asked for, and never what is held out."""

import dataclasses
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from test_tasks import NEW, all_tasks, cifar, concentrated, digits

from tina.errors import ConfigError
from tina.neighbours import NEARNESS, draw_near

LINE = -np.abs(np.subtract.outer(np.arange(100), np.arange(100))).astype(float)
"""Nearness of a hundred classes in a row."""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_are_training_tasks(seed):
    space, rng = cifar(min_classes=2, max_classes=3), np.random.default_rng(seed)
    forbidden = {t.key for t in all_tasks(space) if t.split != "train"}
    for _ in range(300):
        task = draw_near(rng, space, 0.05 * LINE, num_classes=3)
        assert set(task) <= set(space.seen)
        assert len(set(task)) == 3
        assert frozenset(task) not in forbidden
        assert not concentrated(task)


def test_classes_lie_near_each_other():
    """Far apart in units of NEARNESS: a first class and its nearest, whichever come first."""
    space, rng = digits(held_out=1, val=1, train=1), np.random.default_rng(0)
    cosines = 30 * NEARNESS * LINE[:10, :10]
    for _ in range(200):
        task = sorted(draw_near(rng, space, cosines, num_classes=3))
        assert task[2] - task[0] <= 3  # two steps, or a held-out set's next best


def test_without_nearness_they_are_chance():
    space, rng = digits(held_out=1, val=1, train=1), np.random.default_rng(0)
    draws, pairs = 4500, Counter()
    for _ in range(draws):
        pairs[frozenset(draw_near(rng, space, np.zeros((10, 10)), num_classes=2))] += 1
    free = {frozenset(c) for c in combinations(range(10), 2)} - {
        t.key for t in (*space.val, *space.held_out[NEW])
    }
    assert set(pairs) == free
    expected = draws / len(free)
    chi2 = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert chi2 < len(free) + 5 * (2 * len(free)) ** 0.5


def test_the_order_of_classes_is_random():
    space, rng = digits(held_out=1, val=1, train=1), np.random.default_rng(0)
    rising = sum(
        a < b for a, b in (draw_near(rng, space, 0.01 * LINE, num_classes=2) for _ in range(2000))
    )
    assert abs(rising - 1000) < 4 * 500**0.5


def test_where_near_sets_are_held_out_others_are_drawn():
    space, rng = digits(held_out=9, val=1, train=1), np.random.default_rng(0)
    near = [dataclasses.replace(t, class_ids=(i, i + 1)) for i, t in enumerate(space.held_out[NEW])]
    space = dataclasses.replace(space, held_out={NEW: tuple(near)})
    for _ in range(20):
        one, other = draw_near(rng, space, 1000 * NEARNESS * LINE[:10, :10], num_classes=2)
        assert abs(one - other) > 1


def test_no_set_left_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr("tina.neighbours.MAX_REJECTS", 200)
    space = digits(max_classes=2, held_out=40, val=4, train=1)
    held = {**space.held_out, NEW: space.held_out[NEW] + space.train}
    full = dataclasses.replace(space, held_out=held)
    with pytest.raises(ConfigError, match="no set of neighbouring classes is left"):
        draw_near(np.random.default_rng(0), full, np.zeros((10, 10)), num_classes=2)
