"""A trial of a sweep: a Ray Train run of its own, watched by Ray Tune.

What Tune knows of a trial is in its driver's memory and, seconds later, in snapshots. Each trial
therefore keeps a history of its own, line by line, beside its training states.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from ray_jobs.train import build_trainer
from tina.files import write_text
from tina.run import Run
from tina.space import Domain, Search
from tina.storage import Place

METRIC, BEST, TIME = "val_accuracy", "best_accuracy", "val_step"
HISTORY, STOPPED = "history.jsonl", "stopped"


def read_history(place: Place) -> list[dict[str, Any]]:
    """A trial's reports, oldest first."""
    file, rows = place.fetch(HISTORY, again=True), []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off by a crash
            continue
    return rows


def last_step(history: Sequence[dict[str, Any]]) -> int:
    """The step of the latest report; 0 before the first."""
    return int(history[-1]["step"]) if history else 0


def trial_run(search: Search, base: Place, trial_id: str, point: dict[str, Any]) -> Run:
    """The run of a trial, on the generic model and the zoo of the base run."""
    storage = base.below("tune", search.sweep.name).location
    return Run(replace(search.trial(point), name=trial_id, storage=storage), base)


def run_trial(point: dict[str, Any], search: Search, base: Place, judge: Any) -> None:
    """What Tune runs: the training, from its last state if there is one."""
    run = trial_run(search, base, tune.get_context().get_trial_id(), point)
    run.claim()
    history = read_history(run.place)
    if last_step(history) == run.config.train.steps or run.place.fetch(STOPPED).exists():
        # it ended after the last snapshot that Tune was restored from
        tune.report(history[-1])
        return
    reports = Reports(run.place, history)
    result = build_trainer(run, callbacks=[reports], judge=judge).fit()
    if last_step(read_history(run.place)) < run.config.train.steps:
        # an earlier start was killed between its last state and the report of it
        reports.after_report(None, [result.metrics], result.checkpoint)
    reports.drain()


class Reports(TuneReportCallback):
    """Writes a training's reports into its history and passes them on to Tune.

    Args:
        history: Of the trial before it was interrupted.
    """

    def __init__(self, place: Place, history: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.place = place
        self.begin = time.time() - (history[-1]["seconds"] if history else 0.0)

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        """As `UserCallback` says; rank 0 has validated."""
        row = {key: metrics[0][key] for key in ("step", TIME, METRIC, BEST)}
        row["seconds"] = time.time() - self.begin
        file = self.place.fetch(HISTORY)
        cut_off = file.is_file() and not file.read_text().endswith("\n")
        with file.open("a") as stream:
            stream.write("\n" * cut_off + json.dumps(row) + "\n")
        self.place.keep(HISTORY)
        super().after_report(run_context, [row], checkpoint)

    def drain(self) -> None:
        """Wait until Tune has taken the last report: it hangs on one left when a trial returns."""
        while not self._training_actor_item_queue.empty():
            time.sleep(0.1)
        time.sleep(1)


def distribution(domain: Domain) -> Any:
    """A domain as Tune takes it."""
    if domain.kind == "choice":
        return tune.choice(domain.labels)
    low, high = domain.values
    if domain.kind == "randint":
        return tune.randint(low, high + 1)  # Tune leaves out the end
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[domain.kind](low, high)


def searcher(search: Search, concurrent: int) -> Any:
    """What draws the points; the first is the run's own configuration."""
    sweep = search.sweep
    if sweep.searcher == "random":
        return BasicVariantGenerator(
            points_to_evaluate=[search.default],
            max_concurrent=concurrent,
            random_state=sweep.seed,
        )
    from optuna import logging
    from optuna.samplers import TPESampler

    logging.set_verbosity(logging.WARNING)
    # Optuna draws its first ten at random: a short sweep would be nothing else
    sampler = TPESampler(seed=sweep.seed, n_startup_trials=min(10, max(3, sweep.trials // 3)))
    optuna = OptunaSearch(
        sampler=sampler, points_to_evaluate=[search.default], metric=BEST, mode="max"
    )
    return ConcurrencyLimiter(optuna, max_concurrent=concurrent)


class Asha(ASHAScheduler):
    """ASHA that never stops the run's own configuration, the bar that the others are held to.

    Ray does not save a scheduler with its sweep: after a restart the rungs are filled again from
    the trials' histories. Nor does its last snapshot know of every trial that was stopped: their
    folders do.

    Args:
        sweep: Its place.
    """

    def __init__(self, search: Search, sweep: Place) -> None:
        varied = search.space.get("train.steps")
        steps = max(varied.values) if varied else search.config.train.steps
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="max",
            max_t=max(1, steps - 1),  # no rung at the end, where nothing is left to be saved
            grace_period=max(1, round(search.sweep.grace * (steps - 1))),
            reduction_factor=search.sweep.reduction_factor,
            stop_last_trials=False,
        )
        self.search, self.sweep = search, sweep

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take up what a trial of an earlier start has reported."""
        super().on_trial_add(tune_controller, trial)
        for row in read_history(self.sweep.below(trial.trial_id)):
            super().on_trial_result(tune_controller, trial, row)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Go on or stop."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if self.search.is_default(self.search.trial(trial.config)):
            return self.CONTINUE
        if decision == self.STOP:
            place = self.sweep.below(trial.trial_id)
            write_text(place.folder / STOPPED, "")
            place.keep(STOPPED)
        return decision


class Counter(tune.Callback):
    """Prints how far a sweep has come.

    Args:
        sweep: Its place. A trial's own history holds its last report; Tune may not yet.
    """

    def __init__(self, search: Search, sweep: Place) -> None:
        self.trials, self.sweep = search.sweep.trials, sweep

    def on_trial_complete(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any
    ) -> None:
        """One line per trial."""
        done = sum(t.is_finished() or t is trial for t in trials)
        history = read_history(self.sweep.below(trial.trial_id))
        best = 100 * history[-1][BEST] if history else 0.0
        print(f"sweep: {done} of {self.trials} trials ended, {trial.trial_id} with {best:.2f} %")
