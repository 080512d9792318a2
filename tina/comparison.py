"""What the report says of scores: methods with intervals, Tina against each, the gap closed, steps.

Axes: T tasks, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tina.metrics import Array, Score, calibration_error, interval, resample

Images = Sequence[NDArray[np.int64]]
TINA, SELECTION, DIRECT = "tina", "classifier_selection", "direct_finetuning"
UNTRAINED = "untrained"
"""What the prompt inherits: for known classes selection's rows, for new ones more than these."""


def compare(
    scores: Mapping[str, Sequence[Score]],
    images: Images,
    subset: Sequence[int],
    *,
    bootstrap: int,
) -> dict[str, Any]:
    """What one axis says of its methods; all differences are paired by task.

    Args:
        scores: Per method its scores on the T tasks; direct fine-tuning's, on the subset alone.
        images: Per task which images it is scored on.
        subset: Places of the tasks that direct fine-tuning was run on; may be empty.
        bootstrap: B.

    Returns:
        Figures of a report; `above_inherited` has the gap from there instead of from selection.
    """
    others = {name: found for name, found in scores.items() if name != DIRECT}
    boot = _resampled(others, images, bootstrap)
    methods = {name: _summary(others[name], boot[name]) for name in others}
    minus = {name: _minus(others, boot, TINA, name) for name in others if name != TINA}
    figures: dict[str, Any] = {
        "methods": methods,
        "tina_minus": minus,
        "gap_closed": None,
        "gap_closed_ci95": None,
    }
    if subset:
        bases = [name for name in (SELECTION, UNTRAINED) if name in scores]
        same = {name: [scores[name][i] for i in subset] for name in (TINA, *bases)}
        same[DIRECT] = list(scores[DIRECT])
        boot = _resampled(same, [images[i] for i in subset], bootstrap)
        methods[DIRECT] = _summary(same[DIRECT], boot[DIRECT]) | {"tasks": len(subset)}
        minus[DIRECT] = _minus(same, boot, TINA, DIRECT)
        figures |= _gap(same, boot, SELECTION)
        if UNTRAINED in bases:
            figures["above_inherited"] = _gap(same, boot, UNTRAINED)
    return figures


def by_steps(
    scores: Mapping[int, Sequence[Score]], images: Images, *, bootstrap: int
) -> list[dict[str, Any]]:
    """Accuracy by the number of sampling steps; each less that of the most, paired by task.

    Args:
        scores: Per number of steps the scores on the T tasks; may be empty.
        images: As in `compare`.
        bootstrap: B.
    """
    named = {str(steps): found for steps, found in scores.items()}
    boot = _resampled(named, images, bootstrap) if named else {}
    return [
        {
            "steps": steps,
            "accuracy": mean_accuracy(found),
            "tasks": len(found),
            "minus_most": _minus(named, boot, str(steps), str(max(scores))),
        }
        for steps, found in scores.items()
    ]


def mean_accuracy(scores: Sequence[Score]) -> float:
    """Mean over tasks."""
    return mean(score.accuracy for score in scores)


def _gap(
    scores: Mapping[str, Sequence[Score]], boot: Mapping[str, Array], base: str
) -> dict[str, Any]:
    """How far direct fine-tuning is above a base, and how much of that Tina gains."""
    least = mean_accuracy(scores[base])
    gap = mean_accuracy(scores[DIRECT]) - least
    ci95 = interval(boot[DIRECT] - boot[base])
    figures: dict[str, Any] = {
        "gap": {"diff": gap, "ci95": ci95},
        "gap_closed": (mean_accuracy(scores[TINA]) - least) / gap if gap else None,
        "gap_closed_ci95": None,
    }
    # where the gap itself may be zero, the ratio's interval is unbounded: it has none
    if ci95[0] > 0:
        drawn = boot[DIRECT] > boot[base]
        ratio = (boot[TINA] - boot[base])[drawn]
        figures["gap_closed_ci95"] = interval(ratio / (boot[DIRECT] - boot[base])[drawn])
    return figures


def _minus(
    scores: Mapping[str, Sequence[Score]], boot: Mapping[str, Array], one: str, other: str
) -> dict[str, Any]:
    pairs = zip(scores[one], scores[other], strict=True)
    return {
        "diff": mean_accuracy(scores[one]) - mean_accuracy(scores[other]),
        "ci95": interval(boot[one] - boot[other]),
        "tasks_below": mean(a.accuracy < b.accuracy for a, b in pairs),
    }


def _resampled(
    scores: Mapping[str, Sequence[Score]], images: Images, count: int
) -> dict[str, Array]:
    hits = [[score.hit for score in found] for found in scores.values()]
    means = resample(hits, images, count=count, seed=0)
    return dict(zip(scores, means.T, strict=True))


def _summary(scores: Sequence[Score], samples: Array) -> dict[str, Any]:
    per_task = [score.accuracy for score in scores]
    return {
        "accuracy": mean(per_task),
        "ci95": interval(samples),
        "p05": float(np.quantile(per_task, 0.05)),
        "ece": calibration_error(scores),
    }
