"""The report for people: a table in the terminal, and the same in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tina.evaluation import (
    CLASS_MEAN,
    DIRECT,
    GENERIC,
    MIXER,
    NEAREST,
    REGRESSOR,
    RIDGE,
    SELECTION,
    SHUFFLED,
    SWAPPED,
    TINA,
    UNTRAINED,
    ZERO_SHOT,
)
from tina.generator import Generator

ORDER = (
    DIRECT,
    TINA,
    REGRESSOR,
    RIDGE,
    NEAREST,
    CLASS_MEAN,
    MIXER,
    SELECTION,
    UNTRAINED,
    ZERO_SHOT,
    GENERIC,
    SWAPPED,
    SHUFFLED,
)
Report = Mapping[str, Any]
FEWEST = 10
"""Tasks from which on an interval is shown: of fewer the bootstrap's are too narrow, for in each
resample some stand several times and the spread between tasks is underestimated."""


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
    assert set(axis["methods"]) <= set(ORDER), "a method without a place is in no table"
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
    return f"gap closed {_share(axis, on, f'{on} tasks')}"


def _share(gap: Mapping[str, Any], tasks: int, *more: str) -> str:
    """What part of a gap is closed, with its interval on so many tasks."""
    low, high = gap["gap_closed_ci95"]
    said = [f"{low:.2f} to {high:.2f}"] if tasks >= FEWEST else []
    said += more
    return f"{gap['gap_closed']:.2f}" + (f" ({', '.join(said)})" if said else "")


def above_inherited(name: str, axis: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The gap above what names inherit, where they inherit more than selection has."""
    found: Mapping[str, Any] | None = axis.get("above_inherited")  # older reports have none
    measurable = found is not None and found["gap_closed_ci95"] is not None
    return found if measurable and name == "unseen_class" else None


def _caption(name: str, axis: Mapping[str, Any]) -> str:
    below, gap = axis["tina_minus"][SELECTION]["tasks_below"], _gap(axis)
    if above := above_inherited(name, axis):
        gap += f", {_share(above, axis['methods'][DIRECT]['tasks'])} of what {UNTRAINED} leaves"
    return (
        f"{name.replace('_', ' ')}: {axis['tasks']} tasks, "
        f"at least {axis['images_per_class']} report images per class, "
        f"chance {_percent(axis['chance'])} %; {gap}; "
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
    header = ["unseen classes", "tasks", TINA, SELECTION, UNTRAINED, "Tina minus it, points"]
    rows = []
    for found in counts:
        row = [str(found["unseen"]), str(found["tasks"])]
        row += [_percent(found["methods"][m]["accuracy"]) for m in (TINA, SELECTION, UNTRAINED)]
        rows.append([*row, _points(found["tina_minus"][UNTRAINED], found["tasks"])])
    return _table(header, rows)


def _counts_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy by a task's number of classes."""
    header = ["classes", "tasks", TINA, SELECTION, "Tina minus it, points"]
    header += [f"tasks with {DIRECT}", "Tina minus it there"]
    rows = []
    for found in groups:
        row = [span(found), str(found["tasks"])]
        row += [_percent(found["methods"][m]["accuracy"]) for m in (TINA, SELECTION)]
        row.append(_points(found["tina_minus"][SELECTION], found["tasks"]))
        if direct := found["methods"].get(DIRECT):
            tasks = direct["tasks"]
            row += [str(tasks), _points(found["tina_minus"][DIRECT], tasks)]
        else:
            row += ["0", ""]
        rows.append(row)
    return _table(header, rows)


def span(group: Mapping[str, Any]) -> str:
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
    lent = f"From ImageNet it has {len(words.lent)} more. " * bool(words.lent)
    return (
        f"# Tina: {name}\n\n"
        f"Generates weights of `{generator.family.name}` classifiers for up to "
        f"{generator.max_classes} classes of {generator.dataset}. "
        f"Prompt encoder: {space.model} ({space.dim} values). "
        f"Trained classes: {', '.join(words.own_names)}. {lent}It knows "
        f"{len(words.names) - len(words.trained_names):,} further words by their embeddings.\n\n"
        f"Measured on {report['hardware']}, commit {report['commit']}:\n\n{markdown(report)}"
    )
