"""What the report's controls put in the place of a task's prompt, or of the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tina.tasks import Task


def other_classes(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """For each task as many classes of the tasks after it; its own only where there is no other."""
    others = []
    for i, task in enumerate(tasks):
        after = [*tasks[i + 1 :], *tasks[: i + 1]]
        classes = dict.fromkeys(c for other in after for c in other.class_ids)
        foreign_first = sorted(classes, key=task.class_ids.__contains__)
        others.append(tuple(foreign_first[: task.num_classes]))
    return others


def nothing(x: Tensor, *_: Tensor) -> Tensor:
    """What an untrained network puts out."""
    return torch.zeros_like(x)


def shuffled_classes(task: Task) -> list[int]:
    """The task's own classes in an order of its own."""
    found: list[int] = np.random.default_rng(task.seed).permutation(task.class_ids).tolist()
    return found
