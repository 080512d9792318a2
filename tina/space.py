"""A search over the configuration, read from YAML: which keys vary, over what, and how to look.

    sweep: {name: digits, trials: 10}
    space:
      diffusion.schedule: {choice: [cosine, linear]}
      train.lr: {loguniform: [3.0e-4, 3.0e-3]}

Trials share the generic model and the zoo of one run, so only what comes after them may vary. The
run's own configuration is a point of the space: it is the trial that the others have to beat.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tina.checks import not_negative, plain_name, positive
from tina.config import DenoiserConfig, DiffusionConfig
from tina.configio import config_from_dict, config_to_dict, read_yaml
from tina.errors import ConfigError
from tina.jobconfig import JobConfig, TrainConfig

SECTIONS: dict[str, type] = {
    "denoiser": DenoiserConfig,
    "diffusion": DiffusionConfig,
    "train": TrainConfig,
}
KEYS: dict[str, Any] = {
    f"{section}.{name}": kind
    for section, cls in SECTIONS.items()
    for name, kind in get_type_hints(cls).items()
}
"""Every key that may vary, and its type."""

RANGES: dict[str, type] = {"uniform": float, "loguniform": float, "randint": int}
ENUMERATED, ENUMERATED_ALONE = 32, 10_000
"""Whole numbers of a range, at most, that are all checked, with other keys' and by themselves; of
a longer one the ends are."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a space is searched.

    Args:
        name: The sweep's name, a folder under the run's `tune/`. The same name goes on with it.
        trials: Number of trials, the run's own configuration among them.
        searcher: optuna (tree-structured Parzen estimator) or random.
        seed: Seed of the searcher.
        workers: Ranks of each trial's training; each takes a GPU where there is one.
        cpus: CPUs of each rank.
        concurrent: Most trials at once; default, and never more: as many as the nodes hold that
            are up when the sweep begins. It stays so when the sweep goes on.
        grace: Share of a training's steps before it can be stopped.
        reduction_factor: At each rung of steps (this times the one before) a trial goes on if it is
            among the best 1 / this of those that came so far.
    """

    name: str = "sweep"
    trials: int = 8
    searcher: Literal["optuna", "random"] = "optuna"
    seed: int = 0
    workers: int = 1
    cpus: float = 1
    concurrent: int | None = None
    grace: float = 0.25
    reduction_factor: float = 3

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        plain_name("sweep.name", self.name)
        positive(self, "trials", "workers", "cpus")
        positive(self, "concurrent", optional=True)
        if not 0 < self.grace <= 1:
            raise ConfigError(f"sweep.grace must lie above 0 and up to 1, got {self.grace}")
        if self.reduction_factor <= 1:
            raise ConfigError(f"sweep.reduction_factor must exceed 1, got {self.reduction_factor}")


@dataclass(frozen=True)
class Domain:
    """What a key varies over.

    Args:
        kind: choice, uniform, loguniform or randint.
        values: Those of a choice; the two ends of a range, both included.
    """

    kind: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[Any]:
        """A choice's values as a searcher takes them: lists as their JSON text."""
        return [json.dumps(v) if isinstance(v, tuple) else v for v in self.values]

    def label(self, value: Any) -> Any:
        """How a searcher names a value."""
        return self.labels[self.values.index(value)] if self.kind == "choice" else value

    def value(self, label: Any) -> Any:
        """Inverse of `label`."""
        return self.values[self.labels.index(label)] if self.kind == "choice" else label

    def holds(self, value: Any) -> bool:
        """Whether it can be drawn."""
        if self.kind == "choice":
            return value in self.values
        return bool(self.values[0] <= value <= self.values[1])

    def corners(self, most: int = ENUMERATED) -> Iterable[Any]:
        """Values to check beforehand: all, or the ends of what holds more whole numbers."""
        if self.kind == "randint" and self.values[1] - self.values[0] < most:
            return range(self.values[0], self.values[1] + 1)
        return self.values


@dataclass(frozen=True, kw_only=True)
class Search:
    """A space around a configuration.

    Args:
        config: The run's own configuration, with the resources that every trial gets.
    """

    config: JobConfig
    sweep: SweepConfig
    space: Mapping[str, Domain]

    @property
    def default(self) -> dict[str, Any]:
        """The point of the run's own configuration, in labels."""
        own = config_values(self.config, self.space)
        return {key: domain.label(own[key]) for key, domain in self.space.items()}

    def is_default(self, config: JobConfig) -> bool:
        """Whether a trial's is the run's own configuration, in all that the space varies."""
        return config_values(config, self.space) == config_values(self.config, self.space)

    def trial(self, point: Mapping[str, Any]) -> JobConfig:
        """The configuration of a point in labels."""
        return changed(self.config, {key: self.space[key].value(x) for key, x in point.items()})

    def plain(self) -> dict[str, Any]:
        """What a file would say, complete."""
        space = {
            key: {domain.kind: [list(v) if isinstance(v, tuple) else v for v in domain.values]}
            for key, domain in self.space.items()
        }
        return {"sweep": config_to_dict(self.sweep), "space": space}


def config_values(config: JobConfig, keys: Iterable[str] = tuple(KEYS)) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    places = {key: key.split(".") for key in keys}
    return {key: getattr(getattr(config, part), name) for key, (part, name) in places.items()}


def changed(config: JobConfig, values: Mapping[str, Any]) -> JobConfig:
    """A configuration with other values, by dotted key.

    Raises:
        ConfigError: They do not go together.
    """
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        part, name = key.split(".")
        parts[part][name] = value
    sections = {part: replace(getattr(config, part), **new) for part, new in parts.items()}
    return replace(config, **sections)


def read_search(file: Path, config: JobConfig) -> Search:
    """A search from YAML; every corner of its space has been built once.

    Raises:
        ConfigError: Unknown key (the message lists the valid ones), an empty range, a value or a
            combination of values that no configuration can hold.
    """
    found = read_yaml(file)
    if not found.keys() <= {"sweep", "space"}:
        raise ConfigError(f"{file} must hold a table with the keys sweep and space, and no other")
    try:
        sweep = config_from_dict(SweepConfig, found.get("sweep") or {})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    cluster = replace(config.cluster, train_workers=sweep.workers, train_cpus=sweep.cpus)
    config = replace(config, cluster=cluster)
    given = found.get("space")
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{file}: space is empty; valid keys: {', '.join(KEYS)}")
    space = {key: _domain(key, value, config) for key, value in given.items()}
    alone = ({key: x} for key in space for x in space[key].corners(ENUMERATED_ALONE))
    # no check of the configuration involves more than three keys
    together = (
        dict(zip(keys, corner, strict=True))
        for keys in combinations(space, min(3, len(space)))
        for corner in product(*(space[key].corners() for key in keys))
    )
    for point in chain(alone, together):
        try:
            changed(config, point)
        except ConfigError as error:
            raise ConfigError(f"the space holds {point}: {error}") from error
    return Search(config=config, sweep=sweep, space=space)


def _domain(key: Any, given: Any, config: JobConfig) -> Domain:
    if key not in KEYS:
        raise ConfigError(f"space: unknown key {key!r}; valid keys: {', '.join(KEYS)}")
    kinds = ("choice", *RANGES)
    if not isinstance(given, dict) or len(given) != 1 or not given.keys() <= {*kinds}:
        raise ConfigError(f"space.{key} must be one of {', '.join(kinds)}: [...], got {given!r}")
    ((kind, values),) = given.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space.{key}: {kind} is empty, got {values!r}")
    if kind in RANGES:
        if len(values) != 2:
            raise ConfigError(f"space.{key}: {kind} needs its two ends, got {values!r}")
        if KEYS[key] is not RANGES[kind]:
            fitting = ["choice", *(name for name, of in RANGES.items() if KEYS[key] is of)]
            raise ConfigError(f"space.{key} takes {' or '.join(fitting)}, not {kind}")
    own = config_values(config, [key])[key]
    if own == "auto":
        raise ConfigError(
            f"space.{key}: the configuration has auto: say --{key} with what it stands for"
        )
    if "auto" in values:
        raise ConfigError(f"space.{key}: auto is settled once per run, so say what it stands for")
    domain = Domain(kind, tuple(_typed(key, value, config) for value in values))
    if kind in RANGES and not -math.inf < domain.values[0] < domain.values[1] < math.inf:
        raise ConfigError(f"space.{key}: the range {values} is empty: its first end must be lower")
    if kind == "loguniform" and domain.values[0] <= 0:
        raise ConfigError(f"space.{key}: loguniform must start above 0, got {values}")
    if kind == "choice" and len(set(domain.values)) < len(domain.values):
        raise ConfigError(f"space.{key}: choice holds a value twice, got {values}")
    if not domain.holds(own):
        raise ConfigError(
            f"space.{key} does not hold the configuration's own value {own!r}, which is a trial too"
        )
    return domain


def _typed(key: str, value: Any, config: JobConfig) -> Any:
    """A value as the configuration would hold it."""
    part, name = key.split(".")
    section = config_to_dict(getattr(config, part)) | {name: value}
    try:
        return getattr(config_from_dict(SECTIONS[part], section), name)
    except ConfigError as error:
        raise ConfigError(f"space.{key}: {error}") from error
