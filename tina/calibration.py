"""How readily and how surely generated classifiers answer with new classes: fitted to some.

Training shows the denoiser no class that is new to the generic model. So how far unfamiliar classes
are favoured and doubted (`PromptConfig`) is fitted after it, to `select` images of tasks with
classes that were kept out. What is made least is the Brier score: it is best where probabilities
are right, and a few wrong answers, given for sure, do not decide, as they do in the cross-entropy
(docs/log.md).

Axes: B tasks, K classes, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from tina.classifiers import predict
from tina.datasets import Dataset
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.tasks import TaskSpace

TASKS = 60  # for each number of new classes


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of probabilities from the truth, mean of N images, 0..2 (Brier 1950).

    Args:
        logits: (N, K).
        labels: int64 (N,).
    """
    truth = F.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) - truth).square().sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one task's classifier.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        newness: 1 - familiarity (K,).
    """

    logits: Tensor
    labels: Tensor
    newness: Tensor

    def score(self, favour: Tensor, doubt: Tensor) -> Tensor:
        """The Brier score of what had neither, with both; see `Generator.finish`."""
        temperature = 1 + doubt * self.newness.mean()
        return brier((self.logits + favour * self.newness) / temperature, self.labels)


def fit(answers: Sequence[Answers]) -> tuple[float, float]:
    """The favour and the doubt, not negative, with which the mean score is least."""

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean score and its gradient."""
        favour, doubt = pair = torch.from_numpy(at).requires_grad_(True).unbind()
        score = torch.stack([each.score(favour, doubt) for each in answers]).mean()
        slope = torch.stack(torch.autograd.grad(score, pair))
        return score.item(), slope.numpy()

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2)
    favour, doubt = found.x.round(2).tolist()
    return favour, doubt


@torch.no_grad()
def answer(
    generator: Generator,
    dataset: Dataset,
    store: InputStore,
    tasks: Sequence[Sequence[int]],
    *,
    partition: str = "select",
) -> list[Answers]:
    """What a generator's classifiers for tasks, by class ids, answer on their images."""
    embeddings, mask = generator.vocabulary.of(tasks)
    body, rows = generator.generate(embeddings, mask, seeds=[0] * len(tasks))
    newness = 1 - generator.vocabulary.familiarity(embeddings)
    found = []
    for i, class_ids in enumerate(tasks):
        k = len(class_ids)
        lesson = Lesson.of(dataset, class_ids, seed=0, partition=partition)
        theta = generator.theta(body[i], rows[i, :k])
        logits = predict(generator.family, theta, store, lesson.index, num_classes=k)
        found.append(
            Answers(logits=logits.double(), labels=lesson.labels, newness=newness[i, :k].double())
        )
    return found


def calibrate(
    generator: Generator, dataset: Dataset, store: InputStore, space: TaskSpace
) -> Generator:
    """A trained generator with favour and doubt fitted; with none where no class was kept out."""
    plain = generator.with_prompt(favour=0.0, doubt=0.0)
    if not space.excluded:
        return plain
    most = min(generator.max_classes, len(space.excluded))
    rng = np.random.default_rng(space.config.seed)
    answers: list[Answers] = []
    for unseen in sorted({max(1, most // parts) for parts in (10, 5, 2, 1)}):
        answers += answer(plain, dataset, store, space.sample_unseen(rng, TASKS, unseen))
    favour, doubt = fit(answers)
    return generator.with_prompt(favour=favour, doubt=doubt)
