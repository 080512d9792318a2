"""The report: every method on held-out tasks and `report` images, with intervals.

Its costly part is a list of cells, a method on a few tasks each, that can be scored anywhere and in
any order. What is generated for a cell is one batch, so a cell's scores do not depend on where.

Axes: T tasks, S seeds, N images of a task, K classes, n values of theta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tina.baselines import (
    PENALTIES,
    Baseline,
    class_mean,
    classifier_selection,
    clip_zero_shot,
    nearest_pmodel,
    ridge,
)
from tina.classifiers import narrow, predict
from tina.comparison import DIRECT, SELECTION, TINA, UNTRAINED, by_steps, compare, mean_accuracy
from tina.configio import config_to_dict
from tina.controls import nothing, other_classes, shuffled_classes
from tina.datasets import Dataset
from tina.diffusion import as_x0
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.jobconfig import EvaluationConfig
from tina.metrics import Score
from tina.mixer import train_mixer
from tina.tasks import AXES, Task, TaskSpace
from tina.zoo import Zoo

__all__ = [
    "DIRECT",
    "MIXER",
    "REGRESSOR",
    "SELECTION",
    "SHUFFLED",
    "SWAPPED",
    "TINA",
    "UNTRAINED",
    "ZERO_SHOT",
    "Cell",
    "Evaluation",
    "Spread",
]

GENERIC, ZERO_SHOT = "generic", "clip_zero_shot"
NEAREST, CLASS_MEAN, RIDGE = "nearest_pmodel", "class_mean", "ridge"
SWAPPED, SHUFFLED = "tina_swapped_condition", "tina_shuffled_prompt"
MIXER, REGRESSOR = "taper", "one_step_regressor"
VALIDATION = "validation"
CLASS_GROUPS = 5  # at most, of neighbouring numbers of classes
CELL_TASKS = 16  # few enough to keep many workers busy, enough for one generated batch
Thetas = Sequence[Sequence[Tensor]]
"""Per task, per seed: theta (n,) for the task's K classes."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is scored at once: one method on a few tasks.

    Args:
        axis: The tasks' axis, or `validation`, where numbers of steps are compared.
        method: A row of the report, or a number of steps.
    """

    axis: str
    method: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that the report reads; nothing in it is chosen on `report` images.

    Args:
        zoo: Training and validation p-models.
        direct: Direct fine-tuning on a subset of the held-out tasks, and the twins of some of them:
            the same task fine-tuned again with other batches.
        regressor: The same transformer, trained without noise.
    """

    generator: Generator
    config: EvaluationConfig
    dataset: Dataset
    space: TaskSpace
    zoo: Zoo
    direct: Zoo
    store: InputStore
    regressor: Generator | None = None

    def report(self, scores: Mapping[Cell, Sequence[Score]], **facts: Any) -> dict[str, Any]:
        """The report as plain values.

        Args:
            scores: Of every cell.
            facts: Commit, hardware, novelty, timing, ...; they go in as given.
        """
        config = self.generator.config
        found: dict[str, dict[str, list[Score]]] = {}
        for cell in self.cells:
            found.setdefault(cell.axis, {}).setdefault(cell.method, []).extend(scores[cell])
        axes = {
            axis: self._axis(tasks, found[axis]) for axis, tasks in self.space.held_out.items()
        } | {axis: {"missing": reason} for axis, reason in self.space.missing.items()}
        return {
            "dataset": self.dataset.name,
            "family": self.generator.family.name,
            **facts,
            "seeds": list(range(self.config.seeds)),
            "evaluation": config_to_dict(self.config),
            "prompt_encoder": vars(self.generator.vocabulary.space),
            "generator": {
                "parameters": sum(p.numel() for p in self.generator.denoiser.parameters()),
                "steps": config.diffusion.sampling_steps,
                "schedule": config_to_dict(config.diffusion),
            },
            "classifier": config_to_dict(config.classifier),
            "zoo": self._zoo_facts(),
            "axes": axes,
            "accuracy_by_steps": by_steps(
                {steps: found[VALIDATION][_at(steps)] for steps in self._steps},
                [self.images(task).index.numpy() for task in self.space.val],
                bootstrap=self.config.bootstrap,
            ),
            "by_unseen_classes": [
                {"unseen": count, **self._axis(tasks, found[_unseen(count)])}
                for count, tasks in self.space.unseen.items()
            ],
            "by_num_classes": self._by_num_classes(found[AXES[0]]),
        }

    # -- cells -----------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All that has to be scored: every method on each task of an axis, once."""
        rows: list[tuple[str, str, Sequence[Task]]] = [
            (VALIDATION, _at(steps), self.space.val) for steps in self._steps
        ]
        for axis, tasks in self.space.held_out.items():
            rows += [(axis, method, tasks) for method in (*self.contenders, GENERIC)]
            rows.append((axis, DIRECT, [t for t in tasks if t.task_id in self._direct]))
        for count, tasks in self.space.unseen.items():
            rows += [(_unseen(count), method, tasks) for method in (TINA, UNTRAINED, SELECTION)]
        return tuple(
            Cell(axis=axis, method=method, tasks=tuple(tasks[start : start + CELL_TASKS]))
            for axis, method, tasks in rows
            for start in range(0, len(tasks), CELL_TASKS)
        )

    def score_cell(self, cell: Cell) -> list[Score]:
        """Scores of a cell's tasks; the same in every process with as many threads."""
        if cell.method == GENERIC:
            return self._score_generic(cell.tasks)
        return self.score(cell.tasks, self._methods[cell.method](cell.tasks))

    def score_here(self) -> Iterator[tuple[Cell, list[Score]]]:
        """All cells, one after another in this process."""
        for cell in self.cells:
            yield cell, self.score_cell(cell)

    # -- methods ---------------------------------------------------------------------------------

    def generate(
        self,
        tasks: Sequence[Task],
        *,
        steps: int | None = None,
        seeds: int | None = None,
        names: Sequence[Sequence[int]] | None = None,
        conditions: Sequence[Sequence[int]] | None = None,
        untrained: bool = False,
    ) -> Thetas:
        """Generated classifiers for tasks, all in one batch.

        Args:
            names: Class ids whose prompts are used instead of the tasks' own.
            conditions: Class ids whose embeddings the denoiser sees, the inherited rows kept.
            untrained: Replace the network by its state at step 0, whose output is zero.
        """
        vocabulary, diffusion = self.generator.vocabulary, self.generator.config.diffusion
        embeddings, mask = vocabulary.of(names or [task.class_ids for task in tasks])
        shown = vocabulary.of(conditions)[0] if conditions else None
        found: list[list[Tensor]] = [[] for _ in tasks]
        for seed in range(seeds or self.config.seeds):
            body, rows = self.generator.generate(
                embeddings,
                mask,
                seeds=[seed] * len(mask),
                steps=steps,
                conditions=shown,
                denoise=as_x0(nothing, diffusion) if untrained else None,
            )
            for i, task in enumerate(tasks):
                found[i].append(self.generator.theta(body[i], rows[i, : task.num_classes]))
        return found

    @cached_property
    def contenders(self) -> dict[str, Callable[[Sequence[Task]], Thetas]]:
        """Every method that makes classifiers for tasks, without their images."""
        train = self.zoo.only("train")
        on_clip = self.generator.family.on_clip

        def of(baseline: Baseline) -> Callable[[Sequence[Task]], Thetas]:
            return lambda tasks: [[self.generator.theta(*baseline(task))] for task in tasks]

        return {
            TINA: self.generate,
            UNTRAINED: partial(self.generate, untrained=True, seeds=1),
            SELECTION: of(classifier_selection(self.generator)),
            NEAREST: of(nearest_pmodel(self.generator, train)),
            CLASS_MEAN: of(class_mean(self.generator, train)),
            # these two are tuned or trained when they are first asked for
            RIDGE: of(lambda task: self._tuned_ridge(task)),
            **({MIXER: of(lambda task: self._mixer(task))} if self.config.mixer_steps else {}),
            **({REGRESSOR: self._regress} if self.regressor else {}),
            **({ZERO_SHOT: of(clip_zero_shot(self.generator))} if on_clip else {}),
            SWAPPED: lambda tasks: self.generate(
                tasks, conditions=[self._others[task.task_id] for task in tasks]
            ),
            SHUFFLED: lambda tasks: self.generate(
                tasks, names=[shuffled_classes(task) for task in tasks]
            ),
        }

    @cached_property
    def _methods(self) -> dict[str, Callable[[Sequence[Task]], Thetas]]:
        """How the classifiers of a cell are made, by its method."""
        return {
            **self.contenders,
            DIRECT: lambda tasks: [[self.direct_theta(task)] for task in tasks],
            **{_at(steps): partial(self.generate, steps=steps, seeds=1) for steps in self._steps},
        }

    @property
    def _steps(self) -> list[int]:
        """The numbers of steps that are compared: no more than there are levels of noise."""
        most = self.generator.config.diffusion.timesteps
        return [steps for steps in self.config.sampling_steps if steps <= most]

    @cached_property
    def _others(self) -> dict[str, tuple[int, ...]]:
        """By held-out task: the classes whose conditions it is shown as a control."""
        return {
            task.task_id: others
            for tasks in self.space.held_out.values()
            for task, others in zip(tasks, other_classes(tasks), strict=True)
        }

    @cached_property
    def _tuned_ridge(self) -> Baseline:
        """Ridge with the penalty that does best on validation tasks."""
        train, tasks = self.zoo.only("train"), self.space.val

        def value(baseline: Baseline) -> float:
            thetas = [[self.generator.theta(*baseline(task))] for task in tasks]
            return mean_accuracy(self.score(tasks, thetas))

        return max(
            (ridge(self.generator, train, penalty=penalty) for penalty in PENALTIES), key=value
        )

    @cached_property
    def _mixer(self) -> Baseline:
        """A mixer of the training p-models."""
        return train_mixer(
            self.generator,
            self.zoo.only("train"),
            self.space,
            self.dataset,
            self.store,
            steps=self.config.mixer_steps,
            seed=0,
        )

    def _regress(self, tasks: Sequence[Task]) -> Thetas:
        """What the regressor makes of the prompts; it has one classifier for each."""
        assert self.regressor
        return replace(self, generator=self.regressor).generate(tasks, seeds=1)

    @cached_property
    def _direct(self) -> dict[str, Tensor]:
        """Direct fine-tuning by task id, in the zoo's layout."""
        return dict(zip(self.direct.task_ids, self.direct.theta, strict=True))

    def direct_theta(self, task: Task) -> Tensor:
        """Direct fine-tuning of one task, in the layout of its K classes."""
        generator, theta = self.generator, self._direct[task.task_id]
        return narrow(generator.family, theta, task.num_classes, generator.max_classes)

    # -- scoring ---------------------------------------------------------------------------------

    def images(self, task: Task) -> Lesson:
        """`report` images for held-out tasks; `select` ones for others, which may be chosen by."""
        if task.split != "held_out":
            return Lesson.of(self.dataset, task.class_ids, seed=0, partition="select")
        lesson = Lesson.of(self.dataset, task.class_ids, seed=0, partition="report")
        most = self.config.images_per_class
        if most is None:
            return lesson
        keep = torch.cat(
            [torch.nonzero(lesson.labels == k).flatten()[:most] for k in range(task.num_classes)]
        )
        return replace(lesson, index=lesson.index[keep], labels=lesson.labels[keep])

    def _logits(self, theta: Tensor, lesson: Lesson, k: int) -> Tensor:
        return predict(self.generator.family, theta, self.store, lesson.index, num_classes=k)

    def score(self, tasks: Sequence[Task], thetas: Thetas) -> list[Score]:
        """Scores of classifiers on their tasks' images."""
        scores = []
        for task, of_seeds in zip(tasks, thetas, strict=True):
            lesson = self.images(task)
            logits = [self._logits(theta, lesson, task.num_classes) for theta in of_seeds]
            scores.append(Score.of(torch.stack(logits), lesson.labels))
        return scores

    def _score_generic(self, tasks: Sequence[Task]) -> list[Score]:
        """The generic model over all the classes it knows."""
        generic, scores = self.generator.generic, []
        place = torch.full((self.dataset.num_classes,), -1)
        place[list(generic.class_ids)] = torch.arange(len(generic.class_ids))
        theta = self.generator.theta(generic.body, generic.rows)
        for task in tasks:
            lesson = self.images(task)
            logits = self._logits(theta, lesson, len(generic.class_ids))
            labels = place[torch.tensor(task.class_ids)[lesson.labels]]
            scores.append(Score.of(logits.unsqueeze(0), labels))
        return scores

    def _axis(self, tasks: Sequence[Task], scores: Mapping[str, list[Score]]) -> dict[str, Any]:
        direct = self._direct if DIRECT in scores else {}
        subset = [i for i, task in enumerate(tasks) if task.task_id in direct]
        lessons = [self.images(task) for task in tasks]
        return {
            "tasks": len(tasks),
            "images_per_class": min(int(torch.bincount(x.labels).min()) for x in lessons),
            "chance": mean(1 / task.num_classes for task in tasks),
            **compare(
                scores, [x.index.numpy() for x in lessons], subset, bootstrap=self.config.bootstrap
            ),
        }

    def _by_num_classes(self, scores: Mapping[str, list[Score]]) -> list[dict[str, Any]]:
        """The first axis by how many classes a task has; empty where all have as many."""
        tasks, found = self.space.held_out[AXES[0]], []
        counts = range(self.space.config.min_classes, self.space.config.max_classes + 1)
        direct = iter(scores.get(DIRECT, ()))
        of_task = {
            task.task_id: {TINA: tina, SELECTION: selection}
            | ({DIRECT: next(direct)} if task.task_id in self._direct else {})
            for task, tina, selection in zip(tasks, scores[TINA], scores[SELECTION], strict=True)
        }
        for part in np.array_split(counts, min(CLASS_GROUPS, len(counts))) if counts[1:] else ():
            some = [task for task in tasks if part[0] <= task.num_classes <= part[-1]]
            if some:
                rows = [of_task[task.task_id] for task in some]
                methods = {m: [r[m] for r in rows if m in r] for m in (TINA, SELECTION, DIRECT)}
                found.append({"classes": part[[0, -1]].tolist(), **self._axis(some, methods)})
        return found

    def _zoo_facts(self) -> dict[str, Any]:
        train = self.zoo.only("train")
        return {
            "p_models": len(train.task_ids),
            "steps": int(train.steps[0]),
            "select_accuracy": float(train.accuracy.mean()),
        }


def _at(steps: int) -> str:
    return f"{steps}_steps"


def _unseen(count: int) -> str:
    return f"{count}_unseen"


Spread = Callable[[Evaluation], Iterable[tuple[Cell, list[Score]]]]
"""Scores all cells of an evaluation, in any order."""
