"""The mixer baseline: a network that mixes p-models by the prompt, in the manner of TAPER.

Axes: Z p-models, J layers with the head as one, K classes, E embedding width, n_body parameters
before the head, R values of a head row.

A yardstick for the report and nothing else; the pipeline has no part of it. It knows the same
prompts and `fit` images as the generator, trained in function space alone, but all that it can say
is how much of each p-model goes into each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tina.baselines import Baseline
from tina.datasets import Dataset
from tina.finetune import Lesson, annealed
from tina.generator import Generator
from tina.inputs import InputStore
from tina.tasks import Task, TaskSpace
from tina.zoo import Zoo

TASKS, IMAGES, RATE, HIDDEN = 8, 64, 1e-3, 128


class Mixer(nn.Module):
    """From a task's conditions to what each p-model adds to what the task inherits.

    The output layer starts at zero: untrained, it is what the task inherits.
    """

    def __init__(self, generator: Generator, zoo: Zoo, *, num_classes: int) -> None:
        super().__init__()
        self.generator = generator
        self.layout = generator.family.layout(generator.max_classes)
        bodies, rows = self.layout.split(zoo.theta)
        self.bodies = bodies - generator.generic.body  # (Z, n_body)
        # a class's row in each p-model less the one it inherits; zero where it has none
        self.rows = torch.zeros(num_classes, len(rows), self.layout.row_size)
        for z, class_ids in enumerate(zoo.class_ids):
            _, own = generator.inherit_classes(class_ids)
            self.rows[list(class_ids), z] = rows[z, : len(class_ids)] - own
        last = nn.Linear(HIDDEN, (len(self.layout.body) + 1) * len(rows))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(generator.vocabulary.space.dim, HIDDEN)
        self.shares = nn.Sequential(first, nn.GELU(), last)

    def forward(self, class_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Body (n_body,) and rows (K, R) for a task."""
        vocabulary, ids = self.generator.vocabulary, list(class_ids)
        own_body, own_rows = self.generator.inherit_classes(ids)
        task = self.generator.condition(vocabulary.embeddings[ids]).mean(0)
        *layers, head = cast(Tensor, self.shares(task)).view(-1, len(self.bodies))  # (J, Z)
        parts = [
            share @ self.bodies[:, slot.offset : slot.offset + slot.numel]
            for share, slot in zip(layers, self.layout.body, strict=True)
        ]
        body = torch.cat(parts) if parts else own_body.new_empty(0)
        rows = torch.einsum("z,kzr->kr", head, self.rows[ids])
        return own_body + body, own_rows + rows


def train_mixer(
    generator: Generator,
    zoo: Zoo,
    space: TaskSpace,
    dataset: Dataset,
    store: InputStore,
    *,
    steps: int,
    seed: int,
) -> Baseline:
    """A mixer trained on fresh tasks, as a baseline.

    Args:
        zoo: The p-models that are mixed.
        steps: Optimiser steps, of 8 tasks and 64 images each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mixer = Mixer(generator, zoo, num_classes=dataset.num_classes)
    optimiser = torch.optim.AdamW(mixer.parameters(), lr=RATE, fused=True)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * annealed(step, steps)
        losses = []
        for class_ids in space.sample_fresh(rng, TASKS):
            lesson = Lesson.of(dataset, class_ids, seed=seed)
            drawn = torch.from_numpy(rng.integers(len(lesson.index), size=IMAGES))
            body, rows = mixer(class_ids)
            logits = generator.logits(body, rows, store[lesson.index[drawn]])
            losses.append(F.cross_entropy(logits, lesson.labels[drawn]))
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()

    @torch.no_grad()
    def predict(task: Task) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], mixer(task.class_ids))

    return predict
