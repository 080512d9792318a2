"""The cheap explanations that a generator has to beat, each a function from a task to theta.

Axes: Z p-models, K classes, E embedding width, n_body parameters before the head, R values of a
head row, V seen classes.

All but selection itself start where the generator does: a class that no p-model had keeps the row
that its name inherits. None sees an image of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tina.generator import Generator
from tina.tasks import Task
from tina.zoo import Zoo

Baseline = Callable[[Task], tuple[Tensor, Tensor]]
"""Body (n_body,) and rows (K, R) for a task."""

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


def classifier_selection(generator: Generator) -> Baseline:
    """Slice the task's rows out of the generic head; the mean row for an unseen class."""
    generic = generator.generic
    return lambda task: (generic.body, generic.select(task.class_ids))


def clip_zero_shot(generator: Generator) -> Baseline:
    """CLIP's own classifier on its image tower: 100 times the cosine to each name's embedding.

    Source: Radford et al. 2021, section 3.1.2 (100 bounds its learned temperature).
    """
    embeddings = generator.vocabulary.embeddings
    rows = F.pad(100 * embeddings / embeddings.shape[1] ** 0.5, (0, 1))  # no bias
    return lambda task: (generator.generic.body, rows[list(task.class_ids)])


def _split(generator: Generator, zoo: Zoo) -> tuple[Tensor, Tensor]:
    """Bodies (Z, n_body) and rows (Z, K_max, R)."""
    return generator.family.layout(generator.max_classes).split(zoo.theta)


def class_mean(generator: Generator, zoo: Zoo) -> Baseline:
    """Mean body of all p-models; per class the mean of its rows over the p-models that have it."""
    bodies, rows = _split(generator, zoo)
    found: dict[int, list[Tensor]] = {}
    for z, class_ids in enumerate(zoo.class_ids):
        for k, class_id in enumerate(class_ids):
            found.setdefault(class_id, []).append(rows[z, k])
    means = {class_id: torch.stack(parts).mean(0) for class_id, parts in found.items()}
    body = bodies.mean(0)

    def predict(task: Task) -> tuple[Tensor, Tensor]:
        _, own = generator.inherit_classes(task.class_ids)
        picked = [means.get(c, row) for c, row in zip(task.class_ids, own, strict=True)]
        return body, torch.stack(picked)

    return predict


def nearest_pmodel(generator: Generator, zoo: Zoo) -> Baseline:
    """The p-model whose classes' embeddings lie nearest to the task's, with the rows it shares."""
    bodies, rows = _split(generator, zoo)
    names = generator.condition(generator.vocabulary.embeddings)
    similar = F.normalize(names, dim=-1)
    similar = similar @ similar.T

    def predict(task: Task) -> tuple[Tensor, Tensor]:
        wanted = list(task.class_ids)
        near = similar[wanted]
        z = max(
            range(len(zoo.class_ids)),
            key=lambda z: (
                float(near[:, list(zoo.class_ids[z])].amax(1).mean()),
                -len(zoo.class_ids[z]),  # of those that have all its classes, the closest set
            ),
        )
        place = {c: k for k, c in enumerate(zoo.class_ids[z])}
        _, own = generator.inherit_classes(wanted)
        picked = [rows[z, place[c]] if c in place else own[k] for k, c in enumerate(wanted)]
        return bodies[z], torch.stack(picked)

    return predict


def ridge(generator: Generator, zoo: Zoo, *, penalty: float) -> Baseline:
    """A linear map from prompt embedding to theta's residual, by penalised least squares.

    The body is regressed on the task's mean condition, a row on its own condition and the mean.
    """
    bodies, rows = _split(generator, zoo)
    conditions = generator.condition(generator.vocabulary.embeddings)

    def features(class_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        own = conditions[list(class_ids)]
        mean = own.mean(0)
        return _with_one(mean), _with_one(torch.cat([own, mean.expand_as(own)], 1))

    pairs = [features(class_ids) for class_ids in zoo.class_ids]
    body_map = _least_squares(
        torch.stack([body for body, _ in pairs]), bodies - generator.generic.body, penalty
    )
    residuals = [
        rows[z, : len(class_ids)] - generator.inherit_classes(class_ids)[1]
        for z, class_ids in enumerate(zoo.class_ids)
    ]
    row_map = _least_squares(torch.cat([x for _, x in pairs]), torch.cat(residuals), penalty)

    def predict(task: Task) -> tuple[Tensor, Tensor]:
        of_task, of_rows = features(task.class_ids)
        body, own = generator.inherit_classes(task.class_ids)
        return body + of_task @ body_map, own + of_rows @ row_map

    return predict


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def _least_squares(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """argmin ||x w - y||^2 + penalty * mean(diag(xx')) * ||w||^2, in the smaller of two forms."""
    scale = penalty * x.square().sum(1).mean()
    if len(x) > x.shape[1]:
        return torch.linalg.solve(x.T @ x + scale * torch.eye(x.shape[1]), x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + scale * torch.eye(len(x)), y)
