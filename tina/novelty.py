"""Beyond accuracy: is a generated classifier a copy, and what does it cost?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from tina.baselines import classifier_selection, nearest_pmodel
from tina.evaluation import Evaluation
from tina.finetune import Lesson, finetune
from tina.metrics import overlap
from tina.precision import has_bf16
from tina.tasks import Task

TIMED_STEPS, WARM_UP_STEPS = 50, 3
"""Of fine-tuning: the first step takes as long as many, and would count twentyfold."""


def twin(task: Task) -> Task:
    """The same task with other batches."""
    return replace(task, seed=task.seed + 1)


def novelty(evaluation: Evaluation) -> dict[str, Any]:
    """Is a generated classifier a copy of a training p-model (Zeng et al., 2506.07998)?

    Distances are L2 over the body, None where only a head is generated: its rows belong to other
    classes than a p-model's. Overlaps are of mispredicted report images. Beside each stands the
    same between two independent fine-tunings of one task, where there are twins.
    """
    generator, train = evaluation.generator, evaluation.zoo.only("train")
    tasks = evaluation.space.held_out["unseen_combination"][: evaluation.config.direct_tasks]
    bodies = generator.family.layout(generator.max_classes).split(train.theta)[0]
    generated = evaluation.generate(tasks, seeds=2)
    nearest = nearest_pmodel(generator, train)
    distance, spread, seed_agreement, same_errors = [], [], [], []
    copies = [[generator.theta(*nearest(task))] for task in tasks]
    for task, thetas, score, copy in zip(
        tasks,
        generated,
        evaluation.score(tasks, generated),
        evaluation.score(tasks, copies),
        strict=True,
    ):
        body = generator.family.layout(task.num_classes).split(thetas[0])[0]
        if body.numel():
            distance.append(float((bodies - body).norm(dim=1).min()))
        spread.append(float((thetas[0] - thetas[1]).norm() / thetas[0].norm()))
        seed_agreement.append(abs(float(score.hit[0].mean() - score.hit[1].mean())))
        same_errors.append(overlap(score, copy))
    return {
        "l2_to_nearest_pmodel": mean(distance) if distance else None,
        "error_overlap_with_nearest_pmodel": mean(same_errors),
        **_between_twins(evaluation, tasks),
        "theta_spread_over_seeds": mean(spread),
        "accuracy_spread_over_seeds": mean(seed_agreement),
    }


def _between_twins(evaluation: Evaluation, tasks: Sequence[Task]) -> dict[str, float | None]:
    family = evaluation.generator.family
    distance, same_errors = [], []
    for task in tasks:
        if not {task.task_id, twin(task).task_id} <= set(evaluation.direct.task_ids):
            continue
        pair = [evaluation.direct_theta(task), evaluation.direct_theta(twin(task))]
        first, second = (family.layout(task.num_classes).split(theta)[0] for theta in pair)
        if first.numel():
            distance.append(float((first - second).norm()))
        same_errors.append(overlap(*evaluation.score([task, task], [[theta] for theta in pair])))
    return {
        "l2_between_two_finetunings": mean(distance) if distance else None,
        "error_overlap_between_two_finetunings": mean(same_errors) if same_errors else None,
    }


def timing(evaluation: Evaluation) -> dict[str, float]:
    """On this machine: medians of generations, one fine-tuning.

    Fine-tuning is timed once, after a few steps that only warm up, over a twentieth of its steps or
    50, if those are more.
    """
    generator = evaluation.generator
    task = evaluation.space.held_out["unseen_combination"][0]

    def ms_per_model(batch: int, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            evaluation.generate([task] * batch, seeds=1)
            times.append(time.perf_counter() - begin)
        return 1000 * median(times) / batch

    recipe = generator.config.classifier.direct  # on the CPU here, perhaps on a GPU in the job
    steps = min(recipe.steps, max(TIMED_STEPS, recipe.steps // 20))
    theta = generator.theta(*classifier_selection(generator)(task))
    lesson = Lesson.of(evaluation.dataset, task.class_ids, seed=0)

    def tune(steps: int) -> None:
        fast = recipe.precision if has_bf16(cpu=True) else "fp32"
        part = replace(recipe, steps=steps, precision=fast)
        finetune(generator.family, [theta], [lesson], evaluation.store, part, stacked=False)

    tune(WARM_UP_STEPS)
    begin = time.perf_counter()
    tune(steps)
    seconds = (time.perf_counter() - begin) * recipe.steps / steps
    return {
        "ms_per_model_batch1": ms_per_model(1, 9),
        "ms_per_model_batch64": ms_per_model(64, 3),
        "finetune_s_per_model": seconds,
    }
