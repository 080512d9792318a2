"""Reads what a sweep's trials left in their folders, and publishes it beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from ray_jobs.rank import PROGRESS
from ray_jobs.train import last_state, part_of
from ray_jobs.trial import read_history
from tina.checkpoint import load_generator
from tina.configio import config_to_dict
from tina.errors import ConfigError, DataError
from tina.files import write_text
from tina.run import Run
from tina.space import Search
from tina.storage import Place
from tina.sweep import (
    Outcome,
    Scale,
    best_of,
    plot_outcomes,
    print_outcomes,
    verdict,
    write_outcomes,
)
from tina.training import Progress
from tina.zoo import ZOO


def last_progress(run: Run) -> Progress | None:
    """A training's last state."""
    state = last_state(run)
    if state is None:
        return None
    with part_of(state, PROGRESS) as folder:
        return Progress.load(folder / PROGRESS)


def read_outcome(run: Run, search: Search, *, failed: bool) -> Outcome | None:
    """A trial from its folder; None if it ended before its first validation."""
    history, progress = read_history(run.place), last_progress(run)
    if not history or not progress or not len(progress.top):
        return None
    state = "done" if progress.step == run.config.train.steps else "stopped"
    return Outcome(
        config=run.config,
        state="failed" if failed else state,
        accuracy=progress.best_accuracy,
        seconds=history[-1]["seconds"],
        steps=progress.step,
        parameters=sum(value.numel() for value in progress.best.values()),
        default=search.is_default(run.config),
    )


def task_accuracies(base: Run, run: Run, *, untrained: bool = False) -> NDArray[np.float64]:
    """Per validation task, as training validates: of what a trial makes, or would untrained.

    Args:
        base: Lends its images, which each trial's run would load anew.
    """
    progress = last_progress(run)
    assert progress
    validate = base.validator(load_generator(run.start))
    return np.array(validate(None if untrained else progress.best))


def lend(base: Run, place: Place) -> None:
    """Give another run's place what the base run's generators begin with, as links if it can be.

    That is its generic model, the image tower where it has one, and its zoo.

    Raises:
        ConfigError: It is in use with another zoo.
    """

    def link(source: str, target: str) -> None:
        Path(target).unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    folder, zoo = place.folder, base.base.fetch("zoo")
    files = [file for file in (base.generic_file, base.tower_file) if file.exists()]
    if there := place.below("zoo").names():
        # a part's name has its tasks, which zoo.json has not
        same = there == {part.name for part in zoo.iterdir()}
        if same and place.fetch(f"zoo/{ZOO}").read_bytes() == (zoo / ZOO).read_bytes():
            return
        if place.fetch("config.yaml").is_file():
            raise ConfigError(f"{place.location} holds a run on another zoo: remove it")
        place.below("zoo").clear()  # rows of two zoos never mix
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        link(str(file), str(folder / file.name))
    shutil.copytree(zoo, folder / "zoo", copy_function=link, dirs_exist_ok=True)
    place.keep(*(file.name for file in files), "zoo")


def best_name(base: Run, search: Search) -> str:
    """Of the run that a sweep's best.yaml says."""
    return f"{base.config.name}-{search.sweep.name}-best"


def publish(base: Run, search: Search, trials: Mapping[str, Exception | None]) -> None:
    """Write `trials.parquet`, `pareto.png` and `best.yaml`, and print what they say.

    Args:
        trials: By trial id, what it failed of.

    Raises:
        Exception: What the run's own configuration failed of: there is nothing to compare with.
    """
    sweep = base.place.below("tune", search.sweep.name)
    places = {name: sweep.below(name) for name in trials}
    claimed = [name for name, x in places.items() if x.fetch("config.yaml").is_file()]
    runs = {name: Run(Run.open(places[name].location).config, base.place) for name in claimed}
    read = [
        read_outcome(run, search, failed=trials[name] is not None) for name, run in runs.items()
    ]
    outcomes = [outcome for outcome in read if outcome]
    able = [outcome for outcome in outcomes if outcome.state != "failed"]
    default = next((outcome for outcome in able if outcome.default), None)
    if default is None:
        print(f"the trial of the run's own configuration failed; see {sweep.location}")
        mine = [trials[name] for name, run in runs.items() if search.is_default(run.config)]
        reasons = [error for error in [*mine, *trials.values()] if error]
        raise reasons[0] if reasons else DataError(f"{sweep.location}: it reported nothing")
    best = best_of(able)
    own, other = (runs[o.config.name] for o in (default, best))
    bar = task_accuracies(base, own)
    scale = Scale(
        selection=float(task_accuracies(base, own, untrained=True).mean()),
        pmodels=float(base.read_zoo("zoo").only("val").accuracy.mean()),
        tasks=len(bar),
    )
    gains = task_accuracies(base, other) - bar
    said = verdict(able, gains, scale, default=default, best=best)
    write_outcomes(outcomes, scale, sweep.folder / "trials.parquet")
    title = f"{base.config.name}: {len(outcomes)} trials of sweep {search.sweep.name}"
    plot_outcomes(outcomes, scale, title=title, file=sweep.folder / "pareto.png")
    config = replace(best.config, name=best_name(base, search), storage=base.config.storage)
    plain = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    write_text(sweep.folder / "best.yaml", f"# {said}\n{plain}")
    sweep.keep("trials.parquet", "pareto.png", "best.yaml")
    print_outcomes(outcomes, list(search.space), scale)
    if failed := sum(error is not None for error in trials.values()):
        print(f"{failed} of {len(trials)} trials failed; the same command goes on with them.")
    print(f"{sweep.location}: trials.parquet, pareto.png, best.yaml")
    print(said)
