"""The report: every method of DESIGN 4.7 on held-out tasks and `report` images, with intervals.

Axes: T tasks, S seeds, N images of a task, K classes, n values of theta.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tina.baselines import (
    PENALTIES,
    Baseline,
    class_mean,
    classifier_selection,
    nearest_pmodel,
    ridge,
)
from tina.classifiers import InputStore, predict
from tina.config import EvaluationConfig
from tina.configio import config_to_dict
from tina.datasets import Dataset
from tina.finetune import Lesson, accuracy, finetune
from tina.generator import Generator
from tina.metrics import Score, calibration_error, interval, overlap, resample
from tina.tasks import Task, TaskSpace
from tina.zoo import Zoo

TINA, SELECTION, DIRECT = "tina", "classifier_selection", "direct_finetuning"
SWAPPED, SHUFFLED = "tina_swapped_condition", "tina_shuffled_prompt"
Thetas = Sequence[Sequence[Tensor]]
"""Per task, per seed: theta (n,) for the task's K classes."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that the report reads; nothing in it is chosen on `report` images.

    Args:
        zoo: Training and validation p-models.
        direct: Direct fine-tuning on a subset of the held-out tasks, and the twins of some of them:
            the same task fine-tuned again with other batches.
        on_progress: Called with the number of tasks scored.
    """

    generator: Generator
    config: EvaluationConfig
    dataset: Dataset
    space: TaskSpace
    zoo: Zoo
    direct: Zoo
    store: InputStore
    on_progress: Callable[[int], object] = lambda tasks: None

    def report(self, **facts: Any) -> dict[str, Any]:
        """The report as plain values; `facts` (commit, hardware, ...) go in as given."""
        config = self.generator.config
        axes = {axis: self._axis(axis, tasks) for axis, tasks in self.space.held_out.items()} | {
            axis: {"missing": reason} for axis, reason in self.space.missing.items()
        }
        return {
            "dataset": self.dataset.name,
            "family": self.generator.family.name,
            **facts,
            "seeds": list(range(self.config.seeds)),
            "prompt_encoder": vars(self.generator.vocabulary.space),
            "generator": {
                "parameters": sum(p.numel() for p in self.generator.denoiser.parameters()),
                "steps": config.diffusion.sampling_steps,
                "schedule": config_to_dict(config.diffusion),
            },
            "classifier": config_to_dict(config.classifier),
            "zoo": self._zoo_facts(),
            "axes": axes,
            "accuracy_by_steps": self._steps_curve(),
            "novelty": self._novelty(),
            "timing": self._timing(),
        }

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
        """Generated classifiers for tasks.

        Args:
            names: Class ids whose prompts are used instead of the tasks' own.
            conditions: Class ids whose embeddings the denoiser sees, the inherited rows kept.
            untrained: Replace the denoiser by its state at step 0, which predicts zero.
        """
        names = names or [task.class_ids for task in tasks]
        found: list[list[Tensor]] = [[] for _ in tasks]
        for start in range(0, len(tasks), 64):
            part = slice(start, start + 64)
            embeddings, mask = self.generator.vocabulary.of(names[part])
            shown = self.generator.vocabulary.of(conditions[part])[0] if conditions else None
            for seed in range(seeds or self.config.seeds):
                body, rows = self.generator.generate(
                    embeddings,
                    mask,
                    seeds=[seed] * len(mask),
                    steps=steps,
                    conditions=shown,
                    denoise=(lambda x, *_: torch.zeros_like(x)) if untrained else None,
                )
                for i, task in enumerate(tasks[part]):
                    theta = self.generator.theta(body[i], rows[i, : task.num_classes])
                    found[start + i].append(theta)
        return found

    def _contenders(self, tasks: Sequence[Task]) -> dict[str, Thetas]:
        """Every method that makes one classifier for every task, without its images."""
        train = self.zoo.only("train")

        def of(baseline: Baseline) -> Thetas:
            return [[self.generator.theta(*baseline(task))] for task in tasks]

        rng = np.random.default_rng(0)
        shuffled = [rng.permutation(task.class_ids).tolist() for task in tasks]
        return {
            TINA: self.generate(tasks),
            "untrained": self.generate(tasks, untrained=True, seeds=1),
            SELECTION: of(classifier_selection(self.generator)),
            "nearest_pmodel": of(nearest_pmodel(self.generator, train)),
            "class_mean": of(class_mean(self.generator, train)),
            "ridge": of(self._tuned_ridge(train)),
            SWAPPED: self.generate(tasks, conditions=_other_classes(tasks)),
            SHUFFLED: self.generate(tasks, names=shuffled),
        }

    def _tuned_ridge(self, train: Zoo) -> Baseline:
        """Ridge with the penalty that does best on `select` images of validation tasks."""

        def value(penalty: float) -> float:
            baseline = ridge(self.generator, train, penalty=penalty)
            return mean(
                accuracy(
                    self.generator.family,
                    self.generator.theta(*baseline(task)),
                    self.store,
                    Lesson.of(self.dataset, task.class_ids, seed=0, partition="select"),
                )
                for task in self.space.val
            )

        return ridge(self.generator, train, penalty=max(PENALTIES, key=value))

    # -- scoring ---------------------------------------------------------------------------------

    def _images(self, task: Task) -> Lesson:
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
        """Scores of classifiers on their tasks' report images."""
        scores = []
        for task, of_seeds in zip(tasks, thetas, strict=True):
            lesson = self._images(task)
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
            lesson = self._images(task)
            logits = self._logits(theta, lesson, len(generic.class_ids))
            labels = place[torch.tensor(task.class_ids)[lesson.labels]]
            scores.append(Score.of(logits.unsqueeze(0), labels))
        return scores

    def _axis(self, axis: str, tasks: Sequence[Task]) -> dict[str, Any]:
        scores: dict[str, list[Score]] = {}
        for name, thetas in self._contenders(tasks).items():
            scores[name] = self.score(tasks, thetas)
            self.on_progress(len(tasks))
        scores["generic"] = self._score_generic(tasks)
        reference = self._direct_thetas(tasks)
        subset = [i for i, task in enumerate(tasks) if task.task_id in reference]
        if subset:
            of_subset = [tasks[i] for i in subset]
            thetas = [[reference[task.task_id]] for task in of_subset]
            scores[DIRECT] = self.score(of_subset, thetas)
        names = [name for name in scores if name != DIRECT]
        boot = self._resampled({name: scores[name] for name in names})
        methods = {name: _summary(scores[name], boot[name]) for name in names}
        minus = {
            name: {
                "diff": _accuracy(scores[TINA]) - _accuracy(scores[name]),
                "ci95": interval(boot[TINA] - boot[name]),
            }
            for name in names
            if name != TINA
        }
        found: dict[str, Any] = {
            "tasks": len(tasks),
            "images_per_class": min(
                int(torch.bincount(self._images(task).labels).min()) for task in tasks
            ),
            "chance": mean(1 / task.num_classes for task in tasks),
            "methods": methods,
            "tina_minus": minus,
            "gap_closed": None,
            "gap_closed_ci95": None,
        }
        if subset:
            same = {name: [scores[name][i] for i in subset] for name in (TINA, SELECTION)}
            same[DIRECT] = scores[DIRECT]
            boot = self._resampled(same)
            methods[DIRECT] = _summary(same[DIRECT], boot[DIRECT]) | {"tasks": len(subset)}
            minus[DIRECT] = {
                "diff": _accuracy(same[TINA]) - _accuracy(same[DIRECT]),
                "ci95": interval(boot[TINA] - boot[DIRECT]),
            }
            base = _accuracy(same[SELECTION])
            gap = _accuracy(same[DIRECT]) - base
            found["gap"] = {"diff": gap, "ci95": interval(boot[DIRECT] - boot[SELECTION])}
            found["gap_closed"] = (_accuracy(same[TINA]) - base) / gap if gap else None
            # where the gap itself may be zero, the ratio's interval is unbounded: it has none
            if found["gap"]["ci95"][0] > 0:
                drawn = boot[DIRECT] > boot[SELECTION]
                ratio = (boot[TINA] - boot[SELECTION])[drawn]
                found["gap_closed_ci95"] = interval(ratio / (boot[DIRECT] - boot[SELECTION])[drawn])
        return found

    def _resampled(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
        means = resample(list(scores.values()), count=self.config.bootstrap, seed=0)
        return dict(zip(scores, means.T, strict=True))

    def _direct_thetas(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        known = dict(zip(self.direct.task_ids, self.direct.theta, strict=True))
        return {
            task.task_id: self._narrow(known[task.task_id], task.num_classes)
            for task in tasks
            if task.task_id in known
        }

    def _narrow(self, theta: Tensor, k: int) -> Tensor:
        """Theta of K classes from the zoo's layout."""
        family = self.generator.family
        body, rows = family.layout(self.generator.max_classes).split(theta)
        return family.layout(k).join(body, rows[:k])

    # -- beyond accuracy -------------------------------------------------------------------------

    def _zoo_facts(self) -> dict[str, Any]:
        train = self.zoo.only("train")
        return {
            "p_models": len(train.task_ids),
            "steps": int(train.steps[0]),
            "select_accuracy": float(train.accuracy.mean()),
        }

    def _steps_curve(self) -> list[dict[str, float]]:
        """Accuracy on `select` images of validation tasks, where it may be looked at to choose."""
        curve = []
        lessons = [
            Lesson.of(self.dataset, task.class_ids, seed=0, partition="select")
            for task in self.space.val
        ]
        for steps in self.config.sampling_steps:
            thetas = self.generate(self.space.val, steps=steps, seeds=1)
            hits = [
                accuracy(self.generator.family, theta[0], self.store, lesson)
                for theta, lesson in zip(thetas, lessons, strict=True)
            ]
            curve.append({"steps": steps, "accuracy": mean(hits)})
        return curve

    def _novelty(self) -> dict[str, Any]:
        """Is a generated classifier a copy of a training p-model (Zeng et al., 2506.07998)?

        Distances are L2 over the body; overlaps are of mispredicted report images. Beside each
        stands the same between two independent fine-tunings of one task, where there are twins.
        """
        family, train = self.generator.family, self.zoo.only("train")
        tasks = self.space.held_out["unseen_combination"][: self.config.direct_tasks]
        bodies = family.layout(self.generator.max_classes).split(train.theta)[0]
        generated = self.generate(tasks, seeds=2)
        nearest = nearest_pmodel(self.generator, train)
        distance, spread, seed_agreement, same_errors = [], [], [], []
        copies = [[self.generator.theta(*nearest(task))] for task in tasks]
        scores = self.score(tasks, generated)
        for task, thetas, score, copy in zip(
            tasks, generated, scores, self.score(tasks, copies), strict=True
        ):
            body = family.layout(task.num_classes).split(thetas[0])[0]
            distance.append(float((bodies - body).norm(dim=1).min()))
            spread.append(float((thetas[0] - thetas[1]).norm() / thetas[0].norm()))
            seed_agreement.append(abs(float(score.hit[0].mean() - score.hit[1].mean())))
            same_errors.append(overlap(score, copy))
        twin_distance, twin_errors = [], []
        for task in tasks:
            pair = self._direct_thetas([task, twin(task)])
            if len(pair) == 2:
                first, second = pair.values()
                layout = family.layout(task.num_classes)
                apart = layout.split(first)[0] - layout.split(second)[0]
                twin_distance.append(float(apart.norm()))
                one, other = self.score([task, task], [[first], [second]])
                twin_errors.append(overlap(one, other))
        return {
            "l2_to_nearest_pmodel": mean(distance),
            "error_overlap_with_nearest_pmodel": mean(same_errors),
            "l2_between_two_finetunings": mean(twin_distance) if twin_distance else None,
            "error_overlap_between_two_finetunings": mean(twin_errors) if twin_errors else None,
            "theta_spread_over_seeds": mean(spread),
            "accuracy_spread_over_seeds": mean(seed_agreement),
        }

    def _timing(self) -> dict[str, float]:
        """Medians on this machine; fine-tuning is timed over a twentieth of its steps."""
        task = self.space.held_out["unseen_combination"][0]

        def ms_per_model(batch: int, repeats: int) -> float:
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                self.generate([task] * batch, seeds=1)
                times.append(time.perf_counter() - begin)
            return 1000 * median(times) / batch

        recipe = self.generator.config.classifier.direct
        short = replace(recipe, steps=max(1, recipe.steps // 20))
        theta = self.generator.theta(*classifier_selection(self.generator)(task))
        lesson = Lesson.of(self.dataset, task.class_ids, seed=0)
        begin = time.perf_counter()
        finetune(self.generator.family, [theta], [lesson], self.store, short, stacked=False)
        seconds = (time.perf_counter() - begin) * recipe.steps / short.steps
        return {
            "ms_per_model_batch1": ms_per_model(1, 9),
            "ms_per_model_batch64": ms_per_model(64, 3),
            "finetune_s_per_model": seconds,
        }


def twin(task: Task) -> Task:
    """The same task with other batches."""
    return replace(task, seed=task.seed + 1)


def _other_classes(tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """For each task as many classes of the tasks after it; its own only where there is no other."""
    others = []
    for i, task in enumerate(tasks):
        after = [*tasks[i + 1 :], *tasks[: i + 1]]
        classes = dict.fromkeys(c for other in after for c in other.class_ids)
        others.append(tuple(classes)[: task.num_classes])
    return others


def _accuracy(scores: Sequence[Score]) -> float:
    return mean(score.accuracy for score in scores)


def _summary(scores: Sequence[Score], samples: Any) -> dict[str, Any]:
    per_task = [score.accuracy for score in scores]
    return {
        "accuracy": mean(per_task),
        "ci95": interval(samples),
        "p05": float(np.quantile(per_task, 0.05)),
        "ece": calibration_error(scores),
    }
