"""Tasks: which classes a personal classifier must tell apart, and who may see that set of classes.

Training, validation and held-out tasks differ as *sets* of classes. Held-out tasks lie on three
axes: a new set of known classes, a set of another statistic (whole superclasses together), and a
set with classes that no training task and no generic model has met.

K is the number of classes of a task.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, combinations, islice
from typing import Literal, get_args

import numpy as np

from tina.errors import ConfigError
from tina.jobconfig import TaskConfig

__all__ = ["Axis", "Split", "Task", "TaskSpace", "build_task_space", "check_disjoint"]

Split = Literal["train", "val", "held_out"]
Axis = Literal["unseen_combination", "shifted_combination", "unseen_class"]

ClassIds = tuple[int, ...]

FEW_SETS = 100_000  # up to here all sets are listed and drawn from uniformly
MAX_REJECTS = FEW_SETS  # in a row; no fewer, so that such a list is read to its end
BLOCK = 256
AXES: tuple[Axis, ...] = get_args(Axis)
STREAMS = ("excluded", *AXES, "val", "train")


@dataclass(frozen=True, kw_only=True)
class Task:
    """An ordered choice of classes.

    Attributes:
        dataset: Name of the data set.
        class_ids: The K class ids; position k is the classifier's output k.
        class_names: Their names, in the same order.
        split: train, val or held_out.
        axis: What is new about a held-out task; training and validation tasks carry
            unseen_combination.
        seed: Seed of whatever is random about this task, its p-model's training above all.
    """

    dataset: str
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    split: Split
    axis: Axis
    seed: int

    @property
    def task_id(self) -> str:
        """16 hex digits, stable across runs and machines."""
        text = json.dumps([self.dataset, list(self.class_ids), self.seed])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def key(self) -> frozenset[int]:
        """The set of classes, by which splits and axes are disjoint."""
        return frozenset(self.class_ids)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_ids)


@dataclass(frozen=True, kw_only=True)
class TaskSpace:
    """All tasks of an experiment, and the rule that fresh training tasks obey.

    Attributes:
        dataset: Name of the data set.
        class_names: All its class names by class id.
        groups: Superclass per class id, or None.
        config: How many tasks of how many classes.
        excluded: Sorted ids of the classes in no training task and in no generic model.
        seen: The other class ids, sorted.
        train: Training tasks.
        val: Validation tasks.
        held_out: Held-out tasks by axis.
        unseen: Held-out tasks beside those, by their number of excluded classes.
        missing: Axes that the data set cannot have, with the reason.
    """

    dataset: str
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None
    config: TaskConfig
    excluded: tuple[int, ...]
    seen: tuple[int, ...]
    train: tuple[Task, ...]
    val: tuple[Task, ...]
    held_out: Mapping[Axis, tuple[Task, ...]]
    unseen: Mapping[int, tuple[Task, ...]]
    missing: Mapping[Axis, str]

    @cached_property
    def _reserved(self) -> frozenset[frozenset[int]]:
        held_out = chain.from_iterable(self.held_out.values())
        return frozenset(task.key for task in chain(self.val, held_out))

    @cached_property
    def _held(self) -> list[int]:
        """Seen classes in the 1, 2, ... largest superclasses."""
        assert self.groups is not None
        counts = Counter(self.groups[i] for i in self.seen).values()
        return list(accumulate(sorted(counts, reverse=True)))

    def is_concentrated(self, class_ids: Sequence[int]) -> bool:
        """Whether the K classes come from the fewest superclasses that hold K seen classes.

        That is what the shifted axis shifts; always False where that axis is missing.
        """
        if self.groups is None or "shifted_combination" in self.missing:
            return False
        fewest = 1 + bisect_left(self._held, len(class_ids))
        return len({self.groups[i] for i in class_ids}) <= fewest

    def admits(self, class_ids: Sequence[int]) -> bool:
        """Whether seen classes may be trained on together: in no held-out set, not concentrated."""
        return frozenset(class_ids) not in self._reserved and not self.is_concentrated(class_ids)

    def sample_fresh(self, rng: np.random.Generator, n: int) -> list[ClassIds]:
        """Draw `n` training tasks anew: ordered ids of seen classes, repeats possible.

        Validation and held-out sets of every axis are rejected, and so are concentrated sets where
        the shifted axis is reported.

        Args:
            rng: Source of the draw.
            n: Number of tasks.

        Raises:
            ConfigError: every one of very many draws in a row was rejected.
        """
        fresh: list[ClassIds] = []
        rejects = 0
        while (wanted := n - len(fresh)) > 0:
            for class_ids in _random_sets(rng, self, _sizes(rng, self, wanted)):
                rejects = 0 if self.admits(class_ids) else rejects + 1
                if not rejects:
                    fresh.append(class_ids)
            if rejects > MAX_REJECTS:
                raise ConfigError(
                    f"no class set is left to train on: {rejects} draws in a row from "
                    f"{len(self.seen)} classes were held out or of few superclasses"
                )
        return fresh

    def sample_unseen(self, rng: np.random.Generator, n: int, unseen: int) -> list[ClassIds]:
        """Draw `n` tasks with so many excluded classes, `max_classes` at most; repeats possible."""
        return list(islice(_unseen_sets(rng, self, unseen), n))


def build_task_space(
    dataset: str,
    class_names: Sequence[str],
    groups: Sequence[int] | None,
    config: TaskConfig,
) -> TaskSpace:
    """Draw the tasks of an experiment: held-out first, then validation, then training.

    Asking for more training tasks leaves all others, and the training tasks before, as they are.

    Args:
        dataset: Name of the data set; part of every task id.
        class_names: All class names by class id.
        groups: Superclass per class id, or None: then there is no shifted axis.
        config: How many tasks of how many classes, and the seed of all draws.

    Raises:
        ConfigError: the classes do not suffice for the tasks asked for.
    """
    excluded = _exclude(len(class_names), groups, config)
    seen = tuple(i for i in range(len(class_names)) if i not in excluded)
    space = TaskSpace(
        dataset=dataset,
        class_names=tuple(class_names),
        groups=None if groups is None else tuple(groups),
        config=config,
        excluded=excluded,
        seen=seen,
        train=(),
        val=(),
        held_out={},
        unseen={},
        missing=_missing(groups, seen, excluded),
    )
    _check_counts(space)
    for axis in AXES:
        if axis not in space.missing:
            tasks = _collect(space, "held_out", axis, _rng(config, axis))
            space = replace(space, held_out={**space.held_out, axis: tasks})
    for count in config.unseen_counts:
        rng = np.random.default_rng([config.seed, len(STREAMS), count])
        tasks = _collect(space, "held_out", "unseen_class", rng, unseen=count)
        space = replace(space, unseen={**space.unseen, count: tasks})
    val = _collect(space, "val", "unseen_combination", _rng(config, "val"))
    space = replace(space, val=val)
    train = _collect(space, "train", "unseen_combination", _rng(config, "train"))
    space = replace(space, train=train)
    check_disjoint(space)
    return space


def check_disjoint(space: TaskSpace) -> None:
    """Assert that no class set occurs twice, and that each task obeys its axis.

    Raises:
        AssertionError: a set is in two splits, axes or tasks; a task has excluded classes, or is
            concentrated, where its axis forbids it, or is not where its axis demands it.
    """
    tasks = [*space.train, *space.val, *chain.from_iterable(space.held_out.values())]
    expected = [space.config.unseen_per_task * (task.axis == "unseen_class") for task in tasks]
    for count, more in space.unseen.items():
        tasks += more
        expected += [count] * len(more)
    assert len({task.key for task in tasks}) == len(tasks), "two tasks have the same class set"
    for task, unseen in zip(tasks, expected, strict=True):
        assert len(task.key) == task.num_classes, f"task {task.task_id} has a class twice"
        found = len(task.key & set(space.excluded))
        assert found == unseen, f"task {task.task_id} has {found} excluded classes, not {unseen}"
        shifted = task.axis == "shifted_combination"
        assert space.is_concentrated(task.class_ids) == shifted, (
            f"task {task.task_id} on the axis {task.axis} has the wrong number of superclasses"
        )


def _rng(config: TaskConfig, stream: str) -> np.random.Generator:
    """A generator for each kind of draw, so that one's count does not change another's draws."""
    return np.random.default_rng([config.seed, STREAMS.index(stream)])


def _exclude(count: int, groups: Sequence[int] | None, config: TaskConfig) -> ClassIds:
    """Sorted ids of the excluded classes: one from each superclass before a second from any."""
    rounds: dict[int, int] = {}
    rank: list[tuple[int, int, int]] = []
    for i in _rng(config, "excluded").permutation(count).tolist():
        group = 0 if groups is None else groups[i]
        rounds[group] = rounds.get(group, 0) + 1
        rank.append((rounds[group], len(rank), i))
    return tuple(sorted(i for _, _, i in sorted(rank)[: config.excluded(count)]))


def _missing(groups: Sequence[int] | None, seen: ClassIds, excluded: ClassIds) -> dict[Axis, str]:
    missing: dict[Axis, str] = {}
    if groups is None:
        missing["shifted_combination"] = "data set has no superclasses"
    elif len({groups[i] for i in seen}) in (1, len(seen)):
        missing["shifted_combination"] = "superclasses do not divide the classes trained on"
    if not excluded:
        missing["unseen_class"] = "no class is excluded from training"
    return missing


def _check_counts(space: TaskSpace) -> None:
    config, excluded = space.config, len(space.excluded)
    if config.max_classes > len(space.seen):
        raise ConfigError(
            f"tasks.max_classes is {config.max_classes}, but {space.dataset} has "
            f"{len(space.seen)} classes to train on"
        )
    counts = [("unseen_per_task", config.unseen_per_task)] if excluded else []
    counts += [("unseen_counts", count) for count in config.unseen_counts]
    for key, unseen in counts:
        if not 1 <= unseen <= min(config.max_classes, excluded):
            raise ConfigError(
                f"tasks.{key} is {unseen}, but must lie between 1 and both "
                f"tasks.max_classes ({config.max_classes}) and the excluded classes ({excluded})"
            )
    for _, unseen in counts:
        if (found := config.sets(len(space.seen), excluded, unseen)) < config.held_out:
            raise _too_few(space, "held_out", "unseen_class", found)


def _too_few(space: TaskSpace, split: Split, axis: Axis, found: int) -> ConfigError:
    """The error of a split that so many class sets are not enough for."""
    return ConfigError(
        f"{getattr(space.config, split)} {split} tasks of the axis {axis} asked for, but "
        f"{space.dataset} has class sets for {found}"
    )


def _collect(
    space: TaskSpace,
    split: Split,
    axis: Axis,
    rng: np.random.Generator,
    *,
    unseen: int | None = None,
) -> tuple[Task, ...]:
    """Tasks on the candidates of an axis that are new and of its statistic.

    Args:
        unseen: Excluded classes of a task on the unseen-class axis; default: the configuration's.
    """
    candidates = _unseen_sets(rng, space, unseen) if unseen else _CANDIDATES[axis](rng, space)
    n: int = getattr(space.config, split)
    others = chain(space.held_out.values(), space.unseen.values())
    taken = {t.key for t in chain(space.train, space.val, *others)}
    tasks: list[Task] = []
    rejects = 0
    while len(tasks) < n:
        class_ids = next(candidates, None)
        if class_ids is None or rejects > MAX_REJECTS:
            raise _too_few(space, split, axis, len(tasks))
        shifted = axis == "shifted_combination"
        if frozenset(class_ids) in taken or space.is_concentrated(class_ids) != shifted:
            rejects += 1
            continue
        rejects = 0
        taken.add(frozenset(class_ids))
        task = Task(
            dataset=space.dataset,
            class_ids=class_ids,
            class_names=tuple(space.class_names[i] for i in class_ids),
            split=split,
            axis=axis,
            seed=int(rng.integers(2**31)),
        )
        tasks.append(task)
    return tuple(tasks)


# --- candidates: ordered class sets, by axis ------------------------------------------------------


def _sizes(rng: np.random.Generator, space: TaskSpace, n: int) -> np.ndarray:
    """K of `n` tasks: uniform, or as uniform draws from a small space of sets have it."""
    sizes = np.arange(space.config.min_classes, space.config.max_classes + 1)
    odds = np.array([math.comb(len(space.seen), k) for k in sizes], dtype=float)
    return rng.choice(sizes, n, p=odds / odds.sum() if odds.sum() <= FEW_SETS else None)


def _random_sets(rng: np.random.Generator, space: TaskSpace, sizes: np.ndarray) -> list[ClassIds]:
    """One ordered set of seen classes for each size."""
    order = rng.random((len(sizes), len(space.seen))).argsort(axis=1)
    shuffled = np.asarray(space.seen)[order].tolist()
    return [tuple(row[:size]) for row, size in zip(shuffled, sizes, strict=True)]


def _combinations(rng: np.random.Generator, space: TaskSpace) -> Iterator[ClassIds]:
    """Sets of seen classes: each once where there are few, without end where there are many."""
    sizes = range(space.config.min_classes, space.config.max_classes + 1)
    if sum(math.comb(len(space.seen), k) for k in sizes) <= FEW_SETS:
        sets = list(chain.from_iterable(combinations(space.seen, k) for k in sizes))
        for index in rng.permutation(len(sets)):
            yield tuple(rng.permutation(sets[index]).tolist())
    else:
        while True:
            yield from _random_sets(rng, space, _sizes(rng, space, BLOCK))


def _concentrated_sets(rng: np.random.Generator, space: TaskSpace) -> Iterator[ClassIds]:
    """Whole superclasses in random order, the last of them in part."""
    assert space.groups is not None
    members: dict[int, list[int]] = {}
    for i in space.seen:
        members.setdefault(space.groups[i], []).append(i)
    while True:
        (size,) = _sizes(rng, space, 1)
        chosen: list[int] = []
        for group in rng.permutation(list(members)).tolist():
            chosen += rng.permutation(members[group])[: size - len(chosen)].tolist()
        yield tuple(rng.permutation(chosen).tolist())


def _unseen_sets(
    rng: np.random.Generator, space: TaskSpace, unseen: int | None = None
) -> Iterator[ClassIds]:
    """So many excluded classes, by default `unseen_per_task`, the rest, if any, seen."""
    unseen = unseen or space.config.unseen_per_task
    while True:
        (size,) = _sizes(rng, space, 1)
        if size < unseen:
            continue
        new = rng.choice(space.excluded, unseen, replace=False)
        known = rng.choice(space.seen, size - unseen, replace=False)
        yield tuple(rng.permutation(np.concatenate([new, known])).tolist())


_CANDIDATES: dict[Axis, Callable[[np.random.Generator, TaskSpace], Iterator[ClassIds]]] = {
    "unseen_combination": _combinations,
    "shifted_combination": _concentrated_sets,
    "unseen_class": _unseen_sets,
}
