"""How good are generated classifiers on validation tasks? What training chooses its state by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from tina.controls import nothing
from tina.datasets import Dataset
from tina.finetune import Lesson, accuracy
from tina.generator import Generator, new_denoiser
from tina.inputs import InputStore
from tina.tasks import Task


def validator(
    generator: Generator, dataset: Dataset, store: InputStore, tasks: Sequence[Task]
) -> Callable[[Mapping[str, Tensor] | None], list[float]]:
    """Per task, accuracy on its `select` images of what given weights generate.

    No weights stand for what the tasks inherit: classifier selection.
    """
    denoiser = new_denoiser(
        generator.config, generator.codec, dim=generator.vocabulary.space.dim, seed=0
    )
    judge = replace(generator, denoiser=denoiser.eval())
    lessons = [Lesson.of(dataset, task.class_ids, seed=0, partition="select") for task in tasks]

    def validate(weights: Mapping[str, Tensor] | None) -> list[float]:
        if weights is not None:
            denoiser.load_state_dict(dict(weights))
        embeddings, mask = generator.vocabulary.of([task.class_ids for task in tasks])
        body, rows = judge.generate(
            embeddings,
            mask,
            seeds=[0] * len(tasks),
            denoise=nothing if weights is None else None,
        )
        return [
            accuracy(
                generator.family,
                judge.theta(body[i], rows[i, : task.num_classes]),
                store,
                lesson,
            )
            for i, (task, lesson) in enumerate(zip(tasks, lessons, strict=True))
        ]

    return validate
