"""The report for people: a table in the terminal, a table in Markdown, plots as PNG."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tina.evaluation import (
    DIRECT,
    MIXER,
    REGRESSOR,
    SELECTION,
    SHUFFLED,
    SWAPPED,
    TINA,
    UNTRAINED,
    ZERO_SHOT,
)
from tina.files import write_whole
from tina.generator import Generator

ORDER = (
    DIRECT,
    TINA,
    REGRESSOR,
    "ridge",
    "nearest_pmodel",
    "class_mean",
    MIXER,
    SELECTION,
    UNTRAINED,
    ZERO_SHOT,
    "generic",
    SWAPPED,
    SHUFFLED,
)
Report = Mapping[str, Any]
FEWEST = 10
"""Tasks from which on an interval is shown: of fewer the bootstrap's are too narrow, for in each
resample some stand several times and the spread between tasks is underestimated."""
NARROWEST = 0.02  # accuracy that a plot by sampling steps spans at least: less looks like a trend


def axes_of(report: Report) -> dict[str, Any]:
    """The axes that were measured."""
    return {name: axis for name, axis in report["axes"].items() if "missing" not in axis}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(diff: Mapping[str, Any], tasks: int) -> str:
    """A difference between methods on so many tasks, with its interval, in points."""
    low, high = (100 * x for x in diff["ci95"])
    interval = f" ({low:+.1f} to {high:+.1f})" if tasks >= FEWEST else ""
    return f"{100 * diff['diff']:+.1f}{interval}"


def _rows(axis: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name in ORDER:
        if name not in axis["methods"]:
            continue
        method = axis["methods"][name]
        tasks = method.get("tasks", axis["tasks"])
        low, high = method["ci95"]
        interval = f"{_percent(low)} to {_percent(high)}" if tasks >= FEWEST else ""
        row = [name, _percent(method["accuracy"]), interval]
        row += [_percent(method["p05"]), f"{method['ece']:.3f}"]
        minus = axis["tina_minus"].get(name)
        rows.append([*row, _points(minus, tasks) if minus else ""])
    return rows


HEADER = ["method", "accuracy %", "95 % interval", "worst 5 %", "ECE", "Tina minus it, points"]


def _gap(axis: Mapping[str, Any]) -> str:
    if "gap" not in axis:
        return "gap closed: not measured (no direct fine-tuning)"
    on = axis["methods"][DIRECT]["tasks"]
    if axis["gap_closed_ci95"] is None:
        return (
            "gap closed: undetermined, as direct fine-tuning is not measurably above selection: "
            f"{_points(axis['gap'], on)} points on {on} tasks"
        )
    low, high = axis["gap_closed_ci95"]
    interval = f"{low:.2f} to {high:.2f}, " if on >= FEWEST else ""
    return f"gap closed {axis['gap_closed']:.2f} ({interval}{on} tasks)"


def _caption(name: str, axis: Mapping[str, Any]) -> str:
    below = axis["tina_minus"][SELECTION]["tasks_below"]
    return (
        f"{name.replace('_', ' ')}: {axis['tasks']} tasks, "
        f"at least {axis['images_per_class']} report images per class, "
        f"chance {_percent(axis['chance'])} %; {_gap(axis)}; "
        f"below selection on {100 * below:.0f} % of the tasks"
    )


def print_report(report: Report) -> None:
    """Tables in the terminal, one per axis."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"[bold]{report['dataset']}, {report['family']}[/]: generator of "
        f"{report['generator']['parameters']:,} parameters, {report['generator']['steps']} steps, "
        f"{report['timing']['ms_per_model_batch1']:.0f} ms per model "
        f"(direct fine-tuning: {report['timing']['finetune_s_per_model']:.1f} s)"
    )
    for name, axis in report["axes"].items():
        if "missing" in axis:
            console.print(f"{name.replace('_', ' ')}: not measured, {axis['missing']}")
            continue
        table = Table(title=_caption(name, axis), title_justify="left")
        for i, column in enumerate(HEADER):
            table.add_column(column, justify="right" if i else "left")
        for row in _rows(axis):
            table.add_row(*row, style="bold" if row[0] == TINA else None)
        console.print(table)


def markdown(report: Report, only: str | None = None) -> str:
    """The same tables in Markdown, or that of one axis."""
    lines = []
    for name, axis in axes_of(report).items():
        if only not in (None, name):
            continue
        lines += [f"**{_caption(name, axis)}**", ""]
        lines += ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(axis)]
        lines.append("")
    if only is None:
        lines += _unseen_table(report["by_unseen_classes"])
        lines += _counts_table(report.get("by_num_classes", []))  # older reports have none
    return "\n".join(lines)


def _unseen_table(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy by the number of a task's classes that nothing was trained on."""
    header = ["unseen classes", "tasks", TINA, UNTRAINED, SELECTION, "Tina minus it, points"]
    rows = []
    for found in counts:
        row = [str(found["unseen"]), str(found["tasks"])]
        row += [_percent(found["methods"][m]["accuracy"]) for m in (TINA, UNTRAINED, SELECTION)]
        rows.append([*row, _points(found["tina_minus"][SELECTION], found["tasks"])])
    return _table(header, rows)


def _counts_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy by a task's number of classes."""
    header = ["classes", "tasks", TINA, SELECTION, "Tina minus it, points"]
    header += [f"tasks with {DIRECT}", "Tina minus it there"]
    rows = []
    for found in groups:
        row = [_span(found), str(found["tasks"])]
        row += [_percent(found["methods"][m]["accuracy"]) for m in (TINA, SELECTION)]
        row.append(_points(found["tina_minus"][SELECTION], found["tasks"]))
        if direct := found["methods"].get(DIRECT):
            tasks = direct["tasks"]
            row += [str(tasks), _points(found["tina_minus"][DIRECT], tasks)]
        else:
            row += ["0", ""]
        rows.append(row)
    return _table(header, rows)


def _span(group: Mapping[str, Any]) -> str:
    """A group's numbers of classes."""
    low, high = group["classes"]
    return str(low) if low == high else f"{low} to {high}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of numbers in Markdown, none without rows."""
    if not rows:
        return []
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return [lines[0], "|---:" * len(header) + "|", *lines[1:], ""]


def model_card(name: str, generator: Generator, report: Report) -> str:
    """What a checkpoint says of itself, its numbers the report's."""
    words, space = generator.vocabulary, generator.vocabulary.space
    return (
        f"# Tina: {name}\n\n"
        f"Generates weights of `{generator.family.name}` classifiers for up to "
        f"{generator.max_classes} classes of {generator.dataset}. "
        f"Prompt encoder: {space.model} ({space.dim} values). "
        f"Trained classes: {', '.join(words.trained_names)}. It knows "
        f"{len(words.names) - len(words.trained_names):,} further words by their embeddings.\n\n"
        f"Measured on {report['hardware']}, commit {report['commit']}:\n\n{markdown(report)}"
    )


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


def plot_report(report: Report, folder: Path) -> list[Path]:
    """Write the plots and return their paths.

    `accuracy.png`, `gap_closed.png`, `steps.png`; `classes.png` where tasks differ in their number
    of classes.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = axes_of(report)
    title = f"{report['dataset']}, {report['family']}"
    written = []

    def save(figure: Any, name: str) -> None:
        file = folder / name
        figure.suptitle(title)
        figure.tight_layout()
        write_whole(file, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
        plt.close(figure)
        written.append(file)

    figure, panels = plt.subplots(1, len(axes), figsize=(5.5 * len(axes), 4.2), squeeze=False)
    for panel, (name, axis) in zip(panels[0], axes.items(), strict=True):
        shown = [m for m in reversed(ORDER) if m in axis["methods"]]
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
    save(figure, "accuracy.png")

    gaps = {n: a for n, a in axes.items() if a["gap_closed_ci95"] is not None}
    figure, panel = plt.subplots(figsize=(5.5, 3.8))
    if not gaps:
        panel.text(
            0.5, 0.5, "undetermined: no measurable gap", ha="center", transform=panel.transAxes
        )
    for x, axis in enumerate(gaps.values()):
        value, tasks = axis["gap_closed"], axis["methods"][DIRECT]["tasks"]
        spread = _spread(value, axis["gap_closed_ci95"], tasks)
        panel.errorbar(x, value, yerr=spread, fmt="o", color="tab:red", capsize=4)
    panel.axhline(0, color="grey", label="classifier selection")
    panel.axhline(1, color="grey", linestyle="--", label="direct fine-tuning")
    panel.set_ylim(bottom=min(panel.get_ylim()[0], -0.05))  # the frame would hide the line at 0
    panel.set_xticks(range(len(gaps)), [name.replace("_", "\n") for name in gaps])
    panel.set_xlim(-0.5, max(1, len(gaps)) - 0.5)
    panel.set_ylabel("gap closed, 95 % interval")
    panel.legend()
    save(figure, "gap_closed.png")

    figure, panel = plt.subplots(figsize=(5.5, 3.8))
    curve = report["accuracy_by_steps"]
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
    save(figure, "steps.png")

    if groups := report["by_num_classes"]:
        figure, panel = plt.subplots(figsize=(5.5, 3.8))
        panel.axhline(0, color="grey", label="classifier selection")
        # differences are paired by task: direct fine-tuning is measured on fewer tasks
        above = {
            TINA: ("tab:red", [g["tina_minus"][SELECTION] for g in groups]),
            DIRECT: ("tab:blue", [g.get("gap") for g in groups]),
        }
        for shift, (method, (color, found)) in enumerate(above.items()):
            panel.plot([], [], "o", color=color, label=method.replace("_", " "))
            for x, (diff, group) in enumerate(zip(found, groups, strict=True)):
                if diff:
                    value, ci95 = 100 * diff["diff"], [100 * end for end in diff["ci95"]]
                    tasks = group["methods"][method].get("tasks", group["tasks"])
                    bar = _spread(value, ci95, tasks)
                    panel.errorbar(
                        x + 0.12 * shift, value, yerr=bar, fmt="o", color=color, capsize=3
                    )
        panel.set_xticks(range(len(groups)), [_span(group) for group in groups])
        panel.set_xlabel("classes of a task")
        panel.set_ylabel("points above selection, 95 % interval")
        panel.legend()
        save(figure, "classes.png")
    return written
