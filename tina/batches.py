"""Training batches: every draw a function of (seed, step, slot), whatever the number of ranks.

Axes: B = Z + J samples of a step (Z p-models of the zoo, J fresh tasks), L tokens, P values per
token, K classes (padded), E embedding width, R values of a head row, N images per fresh task.

A step has `zoo_batch` + `fresh_tasks` slots. They are cut into equal parts, one for each rank and
each accumulated pass; together the parts hold the same samples however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tina.datasets import Dataset
from tina.diffusion import noise_scale
from tina.generator import Generator
from tina.inputs import InputStore
from tina.jobconfig import TrainConfig
from tina.neighbours import draw_near
from tina.tasks import TaskSpace
from tina.zoo import Zoo

ZOO, FRESH = 0, 1  # kinds of slots, for their seeds
OTHERS_HIDDEN = 0.4  # of the trained classes, from one that is as if new (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One part of a step.

    Args:
        tokens: (Z, L, P), p-models.
        cond: (B, K, E), conditions; the first Z belong to `tokens`.
        mask: bool (B, K).
        body: (n_body,), inherited by every task.
        rows: (J, K, R), inherited by the fresh tasks.
        images: J inputs (N, ...) for the fresh tasks.
        labels: J times int64 (N,), rows of the head.
        noise: (B, L, P), of the noise level `t`.
        t: int64 (B,), timesteps.
        drop: bool (B,), samples that lose their condition; never a fresh task, which without it has
            no right answer.
        first: (J, L, P), pure noise from which fresh tasks get their own prediction.
        pure: bool (J,), fresh tasks that start from pure noise instead, at the last timestep.
    """

    tokens: Tensor
    cond: Tensor
    mask: Tensor
    body: Tensor
    rows: Tensor
    images: list[Tensor]
    labels: list[Tensor]
    noise: Tensor
    t: Tensor
    drop: Tensor
    first: Tensor
    pure: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device; all was drawn on the CPU, equal for all devices."""
        moved: dict[str, Any] = {
            key: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
            for key, value in vars(self).items()
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Where batches come from.

    Args:
        generator: For its codec, vocabulary and inherited weights.
        zoo: Training p-models.
    """

    generator: Generator
    config: TrainConfig
    zoo: Zoo
    space: TaskSpace
    dataset: Dataset
    store: InputStore

    @cached_property
    def _tokens(self) -> Tensor:
        return encode_zoo(self.generator, self.zoo)

    @cached_property
    def _pools(self) -> tuple[np.ndarray, np.ndarray]:
        """Per class of the data set, the places of its `fit` images, padded, and their number."""
        classes = range(self.dataset.num_classes)
        pools = [self.dataset.indices("fit", (c,)).numpy() for c in classes]
        counts = np.array([len(pool) for pool in pools])
        return np.stack([np.pad(pool, (0, counts.max() - len(pool))) for pool in pools]), counts

    @cached_property
    def _cosines(self) -> np.ndarray:
        """(C, C), between the names of the data set's C classes."""
        vectors = self.generator.vocabulary.embeddings[: self.dataset.num_classes]
        return (vectors @ vectors.T).numpy()

    def batches(self, steps: range, own: range, *, parts: int) -> Iterator[Batch]:
        """Parts `own` of each step in turn; a thread draws the next one while one is in use."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            coming: Future[Batch] | None = None
            for step, part in product(steps, own):
                ready = coming
                coming = thread.submit(self.batch, step, part=part, parts=parts)
                if ready:
                    yield ready.result()
            if coming:
                yield coming.result()

    def batch(self, step: int, *, part: int = 0, parts: int = 1) -> Batch:
        """One of the equal parts of a step."""
        config, generator = self.config, self.generator
        timesteps = generator.config.diffusion.timesteps
        shape = self._tokens.shape[1:]
        classes, noise, t, drop = [], [], [], []

        def slots(kind: int, count: int) -> list[np.random.Generator]:
            own = range(part * count // parts, (part + 1) * count // parts)
            return [np.random.default_rng([config.seed, step, kind, slot]) for slot in own]

        picks = []
        for rng in slots(ZOO, config.zoo_batch):
            picks.append(int(rng.integers(len(self.zoo.task_ids))))
            classes.append(self.zoo.class_ids[picks[-1]])
            t.append(int(rng.integers(timesteps)))
            drop.append(rng.random() < config.condition_dropout)
            noise.append(rng.standard_normal(shape, dtype=np.float32))
        images, labels, first, pure, hidden = [], [], [], [], []
        near = config.near_tasks * step / config.steps  # early they cost more than they bring
        for rng in slots(FRESH, config.fresh_tasks if config.function_loss > 0 else 0):
            (task,) = self.space.sample_fresh(rng, 1)
            if near and rng.random() < near:
                task = draw_near(rng, self.space, self._cosines, num_classes=len(task))
            rows = rng.integers(len(task), size=config.images_per_task)
            of_class = np.array(task)[rows]
            pools, counts = self._pools
            index = pools[of_class, rng.integers(counts[of_class])]
            images.append(self.store[torch.from_numpy(index)])
            labels.append(torch.from_numpy(rows))
            classes.append(tuple(task))
            pure.append(rng.random() < 0.5)
            t.append(timesteps - 1 if pure[-1] else int(rng.integers(timesteps)))
            drop.append(False)
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            first.append(rng.standard_normal(shape, dtype=np.float32))
            if config.new_classes:
                hidden.append(self._hide(rng, task))
        embeddings, mask = generator.vocabulary.of(classes, generator.max_classes)
        unknown = torch.from_numpy(np.stack(hidden)) if hidden else None
        _, inherited = generator.inherit(embeddings[len(picks) :], unknown)
        scale = noise_scale(generator.config.diffusion)
        return Batch(
            tokens=self._tokens[picks],
            cond=generator.condition(embeddings),
            mask=mask,
            body=generator.generic.body,
            rows=inherited,
            images=images,
            labels=labels,
            noise=torch.from_numpy(np.stack(noise)) * scale,
            t=torch.tensor(t),
            drop=torch.tensor(drop),
            first=torch.from_numpy(np.stack(first)) * scale if first else torch.empty(0, *shape),
            pure=torch.tensor(pure, dtype=torch.bool),
        )

    def _hide(self, rng: np.random.Generator, task: Sequence[int]) -> np.ndarray:
        """bool (max_classes, V): of which trained classes the classes of a task cannot inherit.

        In a share of the tasks each class inherits, with a chance drawn per task, as if it were new
        (in one of K + 1 of them none does): not of itself, and only of a part of the others, which
        differs each time, or a class would have one such mixture and training would learn it by
        heart.
        """
        generic = self.generator.generic
        hidden = np.zeros((self.generator.max_classes, len(self.generator.rows)), dtype=bool)
        if rng.random() < self.config.new_classes:
            new = np.flatnonzero(rng.random(len(task)) < rng.random())
            hidden[new] = rng.random((len(new), hidden.shape[1])) < OTHERS_HIDDEN
            hidden[new, [generic.class_ids.index(c) for c in np.array(task)[new]]] = True
        return hidden


def encode_zoo(generator: Generator, zoo: Zoo) -> Tensor:
    """Tokens (Z, L, P) of the p-models' residuals on what their prompts inherit."""
    layout = generator.codec.layout
    body, rows = layout.split(zoo.theta)
    embeddings, mask = generator.vocabulary.of(zoo.class_ids, layout.num_classes)
    inherited_body, inherited_rows = generator.inherit(embeddings)
    rows = (rows - inherited_rows) * mask.unsqueeze(-1)
    return generator.codec.encode(body - inherited_body, rows)
