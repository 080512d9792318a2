"""What a sweep found: a table in Parquet and in the terminal, a plot, and an honest sentence.

Accuracies are on `select` images of validation tasks: the images that the search chose by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tina.errors import DataError
from tina.files import write_whole
from tina.jobconfig import JobConfig
from tina.space import config_values

ROUNDING = 1e-6
"""Of accuracies in float32: less is no difference."""

STATES = {"done": "tab:blue", "stopped": "silver", "failed": "tab:orange"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial as it ended.

    Args:
        state: done, stopped (by the scheduler, before its last step) or failed.
        accuracy: Validated, of the state that its training chose.
        seconds: From its start, its ranks' start included, beside whatever ran with it.
        parameters: Of the denoiser.
        default: Whether it is the run's own configuration.
    """

    config: JobConfig
    state: str
    accuracy: float
    seconds: float
    steps: int
    parameters: int
    default: bool

    @property
    def name(self) -> str:
        """How it is shown."""
        return "default" if self.default else self.config.name


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What accuracies are held to, on the same tasks and images.

    Args:
        selection: The untrained generator's accuracy.
        pmodels: The accuracy of the zoo's p-models for these tasks.
        tasks: Number of validation tasks.
    """

    selection: float
    pmodels: float
    tasks: int

    def gap_closed(self, accuracy: float) -> float | None:
        """Share of the way from selection to the p-models; None where there is no way to go."""
        way = self.pmodels - self.selection
        return (accuracy - self.selection) / way if way > ROUNDING else None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, value) no other point beats in one without losing in the other."""
    return [
        not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        for cost, value in points
    ]


def write_outcomes(outcomes: Sequence[Outcome], scale: Scale, file: Path) -> None:
    """One row per trial: its result, its cost, its configuration flat."""
    rows = [
        {
            "trial": outcome.config.name,
            "state": outcome.state,
            "default": outcome.default,
            "val_accuracy": outcome.accuracy,
            "gap_closed": scale.gap_closed(outcome.accuracy),
            "seconds": outcome.seconds,
            "parameters": outcome.parameters,
            "steps_done": outcome.steps,
        }
        | config_values(outcome.config)
        for outcome in outcomes
    ]
    write_whole(file, partial(pq.write_table, pa.Table.from_pylist(rows)))


def plot_outcomes(outcomes: Sequence[Outcome], scale: Scale, *, title: str, file: Path) -> None:
    """Accuracy against parameters and against seconds, each with its Pareto front."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    costs = {
        "parameters of the denoiser": [float(outcome.parameters) for outcome in outcomes],
        "seconds of the trial": [outcome.seconds for outcome in outcomes],
    }
    heights = [100 * outcome.accuracy for outcome in outcomes]
    for panel, (label, cost) in zip(panels, costs.items(), strict=True):
        points = list(zip(cost, heights, strict=True))
        for state, colour in STATES.items():
            some = [p for p, o in zip(points, outcomes, strict=True) if o.state == state]
            if some:
                x, y = zip(*some, strict=True)
                panel.scatter(x, y, color=colour, label=f"{state} ({len(some)})", zorder=2)
        edge = sorted(p for p, best in zip(points, front(points), strict=True) if best)
        x, y = zip(*edge, strict=True)
        panel.plot(x, y, "o--", color="tab:red", mfc="none", ms=11, label="Pareto front")
        for p, outcome in zip(points, outcomes, strict=True):
            if outcome.default:
                panel.plot(*p, "k*", ms=12, label="default", zorder=3)
        panel.axhline(100 * scale.selection, color="grey", ls=":", label="classifier selection")
        panel.axhline(100 * scale.pmodels, color="grey", ls="--", label="p-models")
        panel.set_xscale("log")
        panel.set_xlabel(label)
    panels[0].set_ylabel(f"accuracy on {scale.tasks} validation tasks (%)")
    panels[1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    write_whole(file, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)


def print_outcomes(outcomes: Sequence[Outcome], keys: Sequence[str], scale: Scale) -> None:
    """A table in the terminal, the best trial first.

    Args:
        keys: Those that vary.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{scale.tasks} validation tasks, select images: selection "
        f"{100 * scale.selection:.2f} %, p-models {100 * scale.pmodels:.2f} %",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    names = [key.split(".")[1] for key in keys]
    for name in ("trial", "state", "accuracy", "gap closed", "seconds", "parameters", *names):
        table.add_column(name, justify="right")
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.accuracy):
        gap = scale.gap_closed(outcome.accuracy)
        row = [outcome.name, outcome.state, f"{100 * outcome.accuracy:.2f} %"]
        row += ["none" if gap is None else f"{gap:.2f}"]
        row += [f"{outcome.seconds:.0f}", f"{outcome.parameters:,}"]
        for value in config_values(outcome.config, keys).values():
            row.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        table.add_row(*row, style="bold" if outcome.default else None)
    Console(width=200).print(table)


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The most accurate of the trials that are done; of equal ones the default, then the smallest.

    One that was stopped early is compared with others at that step alone.

    Raises:
        DataError: None is done.
    """
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    if not done:
        raise DataError("no trial of the sweep came to its end")
    return max(
        done,
        key=lambda outcome: (outcome.accuracy, outcome.default, -outcome.parameters),
    )


def verdict(
    outcomes: Sequence[Outcome],
    gains: NDArray[np.float64],
    scale: Scale,
    *,
    default: Outcome,
    best: Outcome,
) -> str:
    """Whether the search was worth it.

    Args:
        gains: Per validation task, the best trial's accuracy less the default's.
    """
    count, bar = len(outcomes), f"{100 * default.accuracy:.2f} %"
    where = f"on select images of {len(gains)} validation tasks"
    above = best.accuracy > scale.selection + ROUNDING
    rest = "" if above else f" None is above classifier selection, {100 * scale.selection:.2f} %."
    if best is default:
        return f"No trial of {count} beats the default configuration, {bar} {where}.{rest}"
    gain = 100 * (best.accuracy - default.accuracy)
    spread, error = "", math.inf  # of one task none is known
    if len(gains) > 1:
        error = 100 * float(gains.std(ddof=1)) / len(gains) ** 0.5
        spread = f", paired standard error {error:.2f}"
    noise = "" if gain > 2 * error else "; that is within the noise"
    return (
        f"Trial {best.name} beats the default configuration by {gain:.2f} points "
        f"({100 * best.accuracy:.2f} % against {bar} {where}{spread})"
        f"{noise}. It is the best of {count} on the images that it was chosen by.{rest}"
    )
