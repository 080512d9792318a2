"""A report's plots as PNG, where people would rather look than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tina.evaluation import DIRECT, SELECTION, TINA, UNTRAINED
from tina.files import write_whole
from tina.report import FEWEST, ORDER, Report, above_inherited, axes_of, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROWEST = 0.02  # accuracy that a plot by sampling steps spans at least: less looks like a trend


def plot_report(report: Report, folder: Path) -> list[Path]:
    """Write the plots and return their paths.

    `accuracy.png`, `gap_closed.png`, `steps.png`; `classes.png` where tasks differ in their number
    of classes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = axes_of(report)
    wide, small = (5.5 * len(axes), 4.2), (5.5, 3.8)
    drawn = {}
    drawn["accuracy"], panels = plt.subplots(1, len(axes), figsize=wide, squeeze=False)
    for panel, (name, axis) in zip(panels[0], axes.items(), strict=True):
        _draw_accuracy(panel, name, axis)
    drawn["gap_closed"], panel = plt.subplots(figsize=small)
    _draw_gap_closed(panel, axes)
    drawn["steps"], panel = plt.subplots(figsize=small)
    _draw_steps(panel, report["accuracy_by_steps"])
    if groups := report["by_num_classes"]:
        drawn["classes"], panel = plt.subplots(figsize=small)
        _draw_classes(panel, groups)
    for name, figure in drawn.items():
        figure.suptitle(f"{report['dataset']}, {report['family']}")
        figure.tight_layout()
        write_whole(folder / f"{name}.png", partial(figure.savefig, dpi=120, format="png"))
        plt.close(figure)
    return [folder / f"{name}.png" for name in drawn]


def _draw_accuracy(panel: Axes, name: str, axis: Mapping[str, Any]) -> None:
    """Every method's accuracy on one axis."""
    shown = [method for method in reversed(ORDER) if method in axis["methods"]]
    for y, method in enumerate(shown):
        found = axis["methods"][method]
        value, tasks = found["accuracy"], found.get("tasks", axis["tasks"])
        spread = _spread(value, found["ci95"], tasks)
        color = "tab:red" if method == TINA else "tab:blue"
        panel.errorbar(value, y, xerr=spread, fmt="o", color=color, capsize=3)
    panel.axvline(axis["chance"], color="grey", linestyle=":", label="chance")
    panel.set_yticks(range(len(shown)), [_label(method, axis) for method in shown])
    panel.set_xlabel("accuracy on report images, 95 % interval")
    panel.set_title(f"{name.replace('_', ' ')} ({axis['tasks']} tasks)", fontsize=10)
    panel.legend(loc="lower right")


def _draw_gap_closed(panel: Axes, axes: Mapping[str, Any]) -> None:
    """Between selection and direct fine-tuning, on the axes where these differ."""
    gaps = {n: a for n, a in axes.items() if a["gap_closed_ci95"] is not None}
    if not gaps:
        panel.text(
            0.5, 0.5, "undetermined: no measurable gap", ha="center", transform=panel.transAxes
        )
    for x, (name, axis) in enumerate(gaps.items()):
        marks: list[tuple[float, Report, dict[str, Any]]] = [(x, axis, {"fillstyle": "full"})]
        if above := above_inherited(name, axis):
            said = f"of what {UNTRAINED} leaves"
            marks.append((x + 0.1, above, {"fillstyle": "none", "label": said}))
        for place, gap, look in marks:
            value, tasks = gap["gap_closed"], axis["methods"][DIRECT]["tasks"]
            bar = _spread(value, gap["gap_closed_ci95"], tasks)
            panel.errorbar(place, value, yerr=bar, fmt="o", color="tab:red", capsize=4, **look)
    panel.axhline(0, color="grey", label="classifier selection")
    panel.axhline(1, color="grey", linestyle="--", label="direct fine-tuning")
    panel.set_ylim(bottom=min(panel.get_ylim()[0], -0.05))  # the frame would hide the line at 0
    panel.set_xticks(range(len(gaps)), [name.replace("_", "\n") for name in gaps])
    panel.set_xlim(-0.5, max(1, len(gaps)) - 0.5)
    panel.set_ylabel("gap closed, 95 % interval")
    panel.legend()


def _draw_steps(panel: Axes, curve: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by the number of sampling steps."""
    panel.plot([c["steps"] for c in curve], [c["accuracy"] for c in curve], "o-", color="tab:red")
    for point in curve:
        diff = point["minus_most"]
        spread = _spread(diff["diff"], diff["ci95"], point["tasks"])
        panel.errorbar(point["steps"], point["accuracy"], yerr=spread, color="tab:red", capsize=3)
    low, high = panel.get_ylim()
    room = max(0, NARROWEST - (high - low)) / 2
    panel.set_ylim(low - room, high + room)
    panel.set_xscale("log")
    panel.set_xticks([c["steps"] for c in curve], [str(c["steps"]) for c in curve])
    panel.set_xlabel("sampling steps")
    panel.set_ylabel("accuracy on validation tasks (select images)")
    panel.set_title("bars: 95 % interval of the difference to the most steps", fontsize=10)


def _draw_classes(panel: Axes, groups: Sequence[Mapping[str, Any]]) -> None:
    """What is gained over selection, by a task's number of classes."""
    panel.axhline(0, color="grey", label="classifier selection")
    # differences are paired by task: direct fine-tuning is measured on fewer tasks
    above = {
        TINA: ("tab:red", [group["tina_minus"][SELECTION] for group in groups]),
        DIRECT: ("tab:blue", [group.get("gap") for group in groups]),
    }
    for shift, (method, (color, found)) in enumerate(above.items()):
        panel.plot([], [], "o", color=color, label=method.replace("_", " "))
        for x, (diff, group) in enumerate(zip(found, groups, strict=True)):
            if diff:
                value, ci95 = 100 * diff["diff"], [100 * end for end in diff["ci95"]]
                tasks = group["methods"][method].get("tasks", group["tasks"])
                bar = _spread(value, ci95, tasks)
                panel.errorbar(x + 0.12 * shift, value, yerr=bar, fmt="o", color=color, capsize=3)
    panel.set_xticks(range(len(groups)), [span(group) for group in groups])
    panel.set_xlabel("classes of a task")
    panel.set_ylabel("points above selection, 95 % interval")
    panel.legend()


def _label(method: str, axis: Mapping[str, Any]) -> str:
    """A method's name, with its number of tasks where it was measured on fewer than the rest."""
    tasks = axis["methods"][method].get("tasks", axis["tasks"])
    return method.replace("_", " ") + (f" ({tasks} tasks)" if tasks < axis["tasks"] else "")


def _spread(
    value: float, ci95: Sequence[float], tasks: int | None = None
) -> list[list[float]] | None:
    """An interval as matplotlib's error bars take it, below and above; of few tasks none."""
    if tasks is not None and tasks < FEWEST:
        return None
    return [[max(0, value - ci95[0])], [max(0, ci95[1] - value)]]
