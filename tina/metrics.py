"""Accuracy, calibration and paired bootstrap intervals over tasks, seeds and images.

Axes: M methods, T tasks, S seeds, N images of a task, I images of all tasks, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One method on one task.

    Args:
        hit: bool (S, N).
        confidence: float (S, N), probability of the predicted class.
    """

    hit: NDArray[np.bool_]
    confidence: Array

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Score:
        """From logits (S, N, K) and labels (N,); a label of -1 is never hit."""
        top = logits.softmax(-1).max(-1)
        return cls(hit=(top.indices == labels).numpy(), confidence=top.values.double().numpy())

    @property
    def accuracy(self) -> float:
        """Mean over seeds and images."""
        return float(self.hit.mean())


def calibration_error(scores: Sequence[Score], *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) over all predictions of all tasks."""
    hit = np.concatenate([s.hit.ravel() for s in scores]).astype(float)
    confidence = np.concatenate([s.confidence.ravel() for s in scores])
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, hit, bins) - np.bincount(place, confidence, bins)
    return float(np.abs(gap).sum() / len(hit))


def resample(
    values: Sequence[Sequence[NDArray[Any]]],
    images: Sequence[NDArray[np.int64]],
    *,
    count: int,
    seed: int,
) -> Array:
    """Bootstrap means (B, M) of M methods' values on the same T tasks.

    Tasks and images are crossed: one image is in many tasks, and what is hard about it is hard in
    all of them; so are seeds, as all tasks of one begin with the same noise. So each resample
    draws tasks with replacement and, once for all tasks, seeds and a weight of each image
    (exponential: Rubin 1981's Bayesian bootstrap). Crossed draws err towards wider intervals (Owen
    2007). All methods share the draws of tasks and images, those of as many seeds the seeds' too,
    so differences are paired.

    Args:
        values: M lists of T arrays (S, N): what each image counts, such as `Score.hit`.
        images: Of each task, which images its N are; equal numbers are the same image.
    """
    rng = np.random.default_rng(seed)
    tasks = len(values[0])
    within = np.empty((count, tasks, len(values)))
    places = np.unique(np.concatenate(images))
    drawn_images = rng.exponential(size=(count, len(places)))  # (B, I)
    numbers = {len(method[0]) for method in values}
    seeds = {s: rng.multinomial(s, np.full(s, 1 / s), size=count) / s for s in sorted(numbers)}
    for t in range(tasks):
        weights = drawn_images[:, np.searchsorted(places, images[t])]  # (B, N)
        weights /= weights.sum(1, keepdims=True)
        for m, method in enumerate(values):
            per_seed = weights @ method[t].T.astype(float)  # (B, S)
            within[:, t, m] = (per_seed * seeds[len(method[t])]).sum(1)
    drawn = rng.integers(tasks, size=(count, tasks))
    means: Array = np.take_along_axis(within, drawn[:, :, None], 1).mean(1)
    return means


def interval(samples: Array) -> list[float]:
    """The central 95 % of bootstrap samples (B,)."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return [float(low), float(high)]


def overlap(first: Score, second: Score) -> float:
    """Overlap (intersection over union) of two methods' mispredicted images, first seeds."""
    a, b = ~first.hit[0], ~second.hit[0]
    return float((a & b).sum() / max(1, (a | b).sum()))
