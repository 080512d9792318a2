"""Training tasks whose classes lie near each other, as chance seldom draws them.

Axes: C classes of the data set, K of a task.
"""

from __future__ import annotations

import numpy as np

from tina.errors import ConfigError
from tina.tasks import MAX_REJECTS, TaskSpace

NEARNESS = 0.01
"""Cosine by which one candidate must be nearer than another to be e times as likely: CLIP's vectors
are crowded, and at 0.05 tasks are nearly as by chance (docs/log.md)."""


def draw_near(
    rng: np.random.Generator, space: TaskSpace, cosines: np.ndarray, *, num_classes: int
) -> tuple[int, ...]:
    """A fresh training task: each class in turn near to those before it, then shuffled.

    Args:
        cosines: (C, C), between the classes' names, by class id.
        num_classes: K.

    Raises:
        ConfigError: Very many draws in a row were held out or of few superclasses.
    """
    seen = np.array(space.seen)
    for rejects in range(MAX_REJECTS):
        # where all near sets of few classes are held out, nearness counts less, down to chance
        width = NEARNESS * 2.0 ** min(max(0, rejects // 10 - 10), 30)
        task = [int(rng.choice(seen))]
        while len(task) < num_classes:
            left = seen[~np.isin(seen, task)]
            nearness = cosines[left][:, task].mean(1) / width
            odds = np.exp(nearness - nearness.max())
            task.append(int(rng.choice(left, p=odds / odds.sum())))
        found = tuple(rng.permutation(task).tolist())
        if space.admits(found):
            return found
    raise ConfigError("no set of neighbouring classes is left to train on")
