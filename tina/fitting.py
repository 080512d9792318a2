"""What tasks a data set of few classes can have, for the error that says it lacks those asked for.

K is the number of classes of a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from tina.datasets import Dataset
from tina.errors import ConfigError
from tina.jobconfig import TaskConfig
from tina.tasks import TaskSpace, build_task_space

FEWEST = 8
"""Held-out tasks below which a report says nothing."""


def task_space(dataset: Dataset, config: TaskConfig) -> TaskSpace:
    """The tasks of a data set.

    Raises:
        ConfigError: Its classes do not suffice for them; the error ends with flags that they
            suffice for, if any near those asked for are found.
    """

    def build(config: TaskConfig) -> TaskSpace:
        return build_task_space(dataset.name, dataset.class_names, dataset.groups, config)

    try:
        return build(config)
    except ConfigError as error:
        for smaller in _smaller(config, dataset.num_classes):
            if smaller == config:  # to find out again takes seconds
                continue
            try:
                build(smaller)
            except ConfigError:
                continue
            mend = f"with {dataset.num_classes} classes this fits: {_flags(smaller, config)}"
            raise ConfigError(f"{error}; {mend}") from error
        raise


def _flags(config: TaskConfig, asked: TaskConfig) -> str:
    """What of a configuration is not as asked for, on a command line."""
    flags, before = [], asdict(asked)
    for key, value in asdict(config).items():
        if value != before[key]:
            shown = f"'{list(value)}'" if isinstance(value, tuple) else value
            flags.append(f"--tasks.{key} {shown}")
    return " ".join(flags)


def _smaller(config: TaskConfig, classes: int) -> Iterator[TaskConfig]:
    """Configurations that so many classes may suffice for, the nearest first."""
    excluded = config.excluded(classes)
    seen = classes - excluded
    most = min(config.max_classes, seen)
    for fewest in (config.min_classes, 2):
        if fewest <= most:
            config = replace(config, min_classes=fewest, max_classes=most)
            yield _with_unseen(config, seen, excluded)
    sets = config.sets(seen)
    few = {"held_out": sets // 4, "val": sets // 8, "train": sets // 2}
    if few["held_out"] >= min(FEWEST, config.held_out):
        fewer = {key: min(count, getattr(config, key)) for key, count in few.items()}
        yield _with_unseen(replace(config, **fewer), seen, excluded)


def _with_unseen(config: TaskConfig, seen: int, excluded: int) -> TaskConfig:
    """With those numbers of new classes of which there are as many tasks as are held out."""
    most = min(config.max_classes, excluded)
    enough = [
        count
        for count in range(1, most + 1)
        if config.sets(seen, excluded, count) >= config.held_out
    ]
    own = max((count for count in enough if count <= config.unseen_per_task), default=1)
    own = own if excluded else config.unseen_per_task  # which nothing reads then
    others = tuple(count for count in config.unseen_counts if count in enough and count != own)
    return replace(config, unseen_per_task=own, unseen_counts=others)
