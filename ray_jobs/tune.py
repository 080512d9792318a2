"""Search noise schedule, model size, learning rate and guidance on Ray Tune.

Each trial is a Ray Train run on the generic model and the zoo of one run. ASHA ends the weak ones
early, Optuna draws the next. Run again with the same names: finished trials stay, unfinished ones
go on from their last states.
"""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ray_jobs.build_zoo import build_zoo, ensure_generic
from ray_jobs.failures import layers
from ray_jobs.job import leave_ray, run_job, start_ray
from ray_jobs.resources import capacity, on_gpu, require
from ray_jobs.tracking import check_tracking
from tina.configio import config_to_dict, parse_config, read_yaml
from tina.errors import ConfigError, NonFiniteError, TinaError
from tina.files import write_text
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.space import SECTIONS, Search, read_search
from tina.storage import Place, at_hand, named
from tina.stores import below

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner

DRIVER = {"memory": 1.5 * 2**30}
"""Of a trial's own process, which starts its ranks and waits for them, and Ray Train's controller
beside it (0.7 GB each). No CPUs: Ray spreads them by their share of a node's memory."""

SNAPSHOT_S = "2"
SWEEP = "sweep.yaml"
RESOURCES = ("workers", "cpus")
EXPERIMENT = "experiment_state-"
SNAPSHOT = r"[a-z_-]+-(\d.*)\.(?:json|pkl)"
"""Tune's files of a start, by the time in their names."""
ABOUT = "Search a space of configurations: --space FILE (required) is its YAML."
NEEDS = "--space configs/tune_digits.yaml "


def refuse_another(sweep: Place, search: Search) -> None:
    """Make sure that a sweep, where there is one, is the same search.

    Raises:
        ConfigError: It is another.
    """
    file = sweep.fetch(SWEEP)
    if not file.is_file():
        return
    found, mine = (_search_alone(plain) for plain in (read_yaml(file), recorded(search)))
    if odd := [key for key in mine if found.get(key) != mine[key]]:
        raise ConfigError(
            f"{sweep.location} holds a sweep with another {', '.join(odd)}: "
            "choose another sweep.name or remove it"
        )


def recorded(search: Search) -> dict[str, Any]:
    """What a sweep's folder says of it: its YAML, and all that its trials have in common."""
    return search.plain() | {key: config_to_dict(getattr(search.config, key)) for key in SECTIONS}


def _search_alone(plain: dict[str, Any]) -> dict[str, Any]:
    """A sweep's YAML without what its trials are given to run on, which changes no result."""
    sweep = plain.get("sweep")
    if not isinstance(sweep, dict):  # it was damaged, and equals none
        return plain
    return plain | {"sweep": {key: sweep[key] for key in sweep.keys() - set(RESOURCES)}}


def restorable(sweep: Place) -> bool:
    """Whether Tune can go on with a sweep. Of a snapshot that a crash cut off nothing is kept.

    Each start writes one of several files, which have its time in their names. Tune takes the
    newest of each kind: it starts all over at the sight of one that it cannot read, and waits for
    ever for trials that only the searcher of another start knows.
    """
    starts: dict[str, list[str]] = {}
    for name in sweep.names():
        if found := re.fullmatch(SNAPSHOT, name):
            starts.setdefault(found[1], []).append(name)
    for names in [starts[start] for start in sorted(starts, reverse=True)]:
        experiment = any(name.startswith(EXPERIMENT) for name in names)
        if experiment and all(_is_whole(sweep.fetch(name, again=True)) for name in names):
            return True
        for name in names:
            sweep.remove(name)
    return False


def _is_whole(file: Path) -> bool:
    """Whether a file of a snapshot, JSON or a pickle, can be read to its end."""
    content = file.read_bytes()
    try:
        if file.name.startswith(EXPERIMENT):
            json.loads(content)
        else:
            deque(pickletools.genops(content), maxlen=0)
    except ValueError:
        return False
    return True


def at_once(search: Search) -> int:
    """Trials that the cluster holds together.

    Raises:
        ConfigError: Not even one.
    """
    sweep = search.sweep
    each = {"CPU": sweep.cpus} | ({"GPU": 1.0} if on_gpu() else {})
    require(sweep.workers, each, key="sweep.workers", wait_s=search.config.cluster.wait_s)
    require(1, DRIVER, key="a trial's own process", wait_s=search.config.cluster.wait_s)
    fit = min(capacity(each) // sweep.workers, capacity(DRIVER))
    return min(fit, sweep.concurrent or fit)


def build_tuner(run: Run, search: Search) -> Tuner:
    """The sweep in the run's `tune/` folder, new or restored."""
    import ray
    from ray import tune
    from ray.tune.execution.class_cache import DEFAULT_ENV_VARS

    from ray_jobs.rank import start_judge
    from ray_jobs.trial import Asha, Counter, distribution, run_trial, searcher

    sweep = run.place.below("tune", search.sweep.name)
    trainable = tune.with_resources(
        partial(run_trial, search=search, base=run.place, judge=start_judge()),
        DRIVER,
    )
    concurrent = at_once(search)
    # what frees a stopped trial's CPUs looks for its cluster anew, and gives up if it sees two
    DEFAULT_ENV_VARS["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if restorable(sweep):
        place = sweep.for_ray()
        return tune.Tuner.restore(
            place.pop("storage_path"), trainable, resume_errored=True, **place
        )
    return tune.Tuner(
        trainable,
        param_space={key: distribution(domain) for key, domain in search.space.items()},
        tune_config=tune.TuneConfig(
            num_samples=search.sweep.trials,
            search_alg=searcher(search, concurrent),
            scheduler=Asha(search, sweep),
            trial_dirname_creator=trial_id,
        ),
        run_config=tune.RunConfig(
            name=search.sweep.name,
            **run.place.for_ray("tune"),
            callbacks=[Counter(search, sweep)],
            verbose=0,
        ),
    )


def trial_id(trial: Any) -> str:
    """Name of a trial's folder."""
    return str(trial.trial_id)


def ended(results: ResultGrid, search: Search) -> dict[str, Exception | None]:
    """By trial id, what it failed of.

    Raises:
        TinaError: The sweep was interrupted.
    """
    if results.num_terminated + results.num_errors < search.sweep.trials:
        raise TinaError("the sweep was interrupted; the same command goes on with it")
    every = [results[i] for i in range(len(results))]
    return {Path(result.path).name: result.error for result in every}


def failures(trials: Mapping[str, Exception | None]) -> list[Exception]:
    """What trials failed of, but for divergence: that comes again every time, and is a result."""
    errors = filter(None, trials.values())
    return [error for error in errors if not isinstance([*layers(error)][-1], NonFiniteError)]


def work(run: Run, search: Search) -> None:
    """The whole job."""
    from ray_jobs.sweep_report import best_name, lend, publish

    # what the run has settled, with a trial's own resources
    search = replace(search, config=replace(run.config, cluster=search.config.cluster))
    sweep = run.place.below("tune", search.sweep.name)
    refuse_another(sweep, search)
    # how much of a sweep Tune has forgotten after a crash
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT_S)
    # one process less per trial: what is taken away goes on from its last state all the same
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    start_ray()
    check_tracking(run)
    at_once(search)
    ensure_generic(run)
    build_zoo(run, "zoo")
    # now: that it is in use must not be told of at the end
    lend(run, Place(below(run.config.storage, best_name(run, search))))
    write_text(sweep.folder / SWEEP, yaml.safe_dump(recorded(search), sort_keys=False))
    sweep.keep(SWEEP)
    results = build_tuner(run, search).fit()
    leave_ray()
    trials = ended(results, search)
    publish(run, search, trials)
    for error in failures(trials):
        raise error


def main(argv: Sequence[str]) -> int:
    """Read the space, which the other jobs do not have, and leave the rest to `run_job`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--space")
    start = partial(run_job, name="tune", about=ABOUT, needs=NEEDS)
    try:
        given, rest = parser.parse_known_args(list(argv))
        if {"-h", "--help"} & set(rest):
            return start(lambda run: None, rest)
        config = parse_config(JobConfig, [word for word in rest if word != "--dry-run"])
        if given.space is None:
            raise ConfigError("no space to search: give its YAML with --space")
        with named(given.space):
            search = read_search(at_hand(given.space), config)
    except (argparse.ArgumentError, TinaError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    code = start(partial(work, search=search), rest)
    if "--dry-run" in rest:
        print(f"---\n{yaml.safe_dump(search.plain(), sort_keys=False)}", end="")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
