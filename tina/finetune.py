"""Training classifiers on images: the generic model, and many p-models at once.

Axes: M models, N images of a batch, K classes (padded to the most among the models), n parameters.

Two ways that compute the same (a test holds them to it): a loop over models, best on CPU where
one runs per process, and one stacked step for all models with `torch.func`, best on GPU. Batches,
learning rates and updates are functions of the model's own seed and the recipe alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.optim.adamw import adamw

from tina.classifiers import narrow, predict, widen
from tina.config import RecipeConfig
from tina.datasets import Dataset
from tina.errors import NonFiniteError
from tina.families import Family
from tina.inputs import InputStore
from tina.precision import in_bf16

OnSteps = Callable[[int], object]
"""Called with the number of steps that have been done since the last call."""


def annealed(step: int, steps: int, *, warmup: int = 0) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch_order(n: int, batch_size: int, steps: int, *, seed: int) -> Tensor:
    """Positions (steps, batch) in a list of n images: whole permutations, one after another."""
    generator = torch.Generator().manual_seed(seed)
    need = steps * batch_size
    passes = [torch.randperm(n, generator=generator) for _ in range(-(-need // n))]
    return torch.cat(passes)[:need].view(steps, batch_size)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What one model is trained on.

    Args:
        class_ids: The K classes, in the order of the head's rows.
        index: int64 (n_images,), places in the data set.
        labels: int64 (n_images,), rows of the head.
        seed: Seed of the batches.
    """

    class_ids: tuple[int, ...]
    index: Tensor
    labels: Tensor
    seed: int

    @classmethod
    def of(
        cls, dataset: Dataset, class_ids: Sequence[int], *, seed: int, partition: str = "fit"
    ) -> Lesson:
        """All images of the classes in a partition."""
        index = dataset.indices(partition, class_ids)
        row = torch.full((dataset.num_classes,), -1)
        row[list(class_ids)] = torch.arange(len(class_ids))
        return cls(
            class_ids=tuple(class_ids),
            index=index,
            labels=row[dataset.labels[index]],
            seed=seed,
        )


def finetune(
    family: Family,
    thetas: Sequence[Tensor],
    lessons: Sequence[Lesson],
    store: InputStore,
    recipe: RecipeConfig,
    *,
    stacked: bool,
    progress: OnSteps = lambda steps: None,
) -> list[Tensor]:
    """Train M classifiers from given weights, all parameters of each.

    Args:
        thetas: M vectors, the i-th laid out for the i-th lesson's number of classes.
        stacked: One step for all models together rather than one model after another.

    Returns:
        The trained vectors, in the same layouts.

    Raises:
        NonFiniteError: Training diverged.
    """
    train = _train_stacked if stacked else _train_loop
    trained = train(family, thetas, lessons, store, recipe, progress)
    for theta, lesson in zip(trained, lessons, strict=True):
        if not bool(torch.isfinite(theta).all()):
            raise NonFiniteError(f"fine-tuning diverged on classes {lesson.class_ids}")
    return trained


class _AdamW:
    """AdamW over tensors, in place, its learning rate annealed.

    torch's own function rather than its optimiser class, which imports the compiler first: longer
    than a short fine-tuning takes.
    """

    def __init__(self, weights: Sequence[Tensor], recipe: RecipeConfig) -> None:
        self.weights, self.recipe = list(weights), recipe
        self.means = [torch.zeros_like(w) for w in weights]
        self.squares = [torch.zeros_like(w) for w in weights]
        self.steps = [torch.zeros((), device=w.device) for w in weights]

    @torch.no_grad()
    def step(self, step: int, gradients: Sequence[Tensor]) -> None:
        """Take a step of the recipe's."""
        recipe = self.recipe
        # the fused step goes through memory, and a convolution's gradient may lie in another order
        aligned = [
            g if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
            for g, w in zip(gradients, self.weights, strict=True)
        ]
        adamw(
            self.weights,
            aligned,
            self.means,
            self.squares,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=recipe.lr * annealed(step, recipe.steps, warmup=int(recipe.warmup * recipe.steps)),
            weight_decay=recipe.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _autocast(inputs: Tensor, recipe: RecipeConfig) -> torch.autocast:
    enabled = in_bf16(recipe.precision)
    return torch.autocast(inputs.device.type, torch.bfloat16, enabled=enabled)


def _train_loop(
    family: Family,
    thetas: Sequence[Tensor],
    lessons: Sequence[Lesson],
    store: InputStore,
    recipe: RecipeConfig,
    progress: OnSteps,
) -> list[Tensor]:
    trained = []
    for theta, lesson in zip(thetas, lessons, strict=True):
        k = len(lesson.class_ids)
        own = theta.clone().requires_grad_()
        optimiser = _AdamW([own], recipe)
        order = batch_order(len(lesson.index), recipe.batch_size, recipe.steps, seed=lesson.seed)
        for step, batch in enumerate(order):
            inputs = store[lesson.index[batch]]
            labels = lesson.labels[batch].to(inputs.device)
            with _autocast(inputs, recipe):
                logits = family.logits(own, inputs, num_classes=k)
            loss = F.cross_entropy(logits.to(own.dtype), labels)
            optimiser.step(step, torch.autograd.grad(loss, own))
            progress(1)
        trained.append(own.detach())
    return trained


def _train_stacked(
    family: Family,
    thetas: Sequence[Tensor],
    lessons: Sequence[Lesson],
    store: InputStore,
    recipe: RecipeConfig,
    progress: OnSteps,
) -> list[Tensor]:
    k_max = max(len(lesson.class_ids) for lesson in lessons)
    counts = torch.tensor([len(lesson.class_ids) for lesson in lessons])
    device = thetas[0].device
    absent = torch.arange(k_max).expand(len(lessons), -1).ge(counts[:, None]).to(device)  # (M, K)
    together = torch.stack(  # (M, n)
        [widen(family, t, len(x.class_ids), k_max) for t, x in zip(thetas, lessons, strict=True)]
    )
    optimiser = _AdamW([together], recipe)
    orders = [
        batch_order(len(x.index), recipe.batch_size, recipe.steps, seed=x.seed) for x in lessons
    ]
    index = torch.stack([x.index[o] for x, o in zip(lessons, orders, strict=True)], 1)
    labels = torch.stack([x.labels[o] for x, o in zip(lessons, orders, strict=True)], 1).to(device)

    def loss(theta: Tensor, inputs: Tensor, labels: Tensor, absent: Tensor) -> Tensor:
        with _autocast(inputs, recipe):
            logits = family.logits(theta, inputs, num_classes=k_max)
        return F.cross_entropy(logits.to(theta.dtype).masked_fill(absent, -torch.inf), labels)

    gradient = vmap(grad(loss))
    for step in range(recipe.steps):
        optimiser.step(step, [gradient(together, store[index[step]], labels[step], absent)])
        progress(len(lessons))
    return [narrow(family, t, k, k_max) for t, k in zip(together, counts.tolist(), strict=True)]


def accuracy(family: Family, theta: Tensor, store: InputStore, lesson: Lesson) -> float:
    """Share of a lesson's images that the classifier theta (n,) gives their label."""
    logits = predict(family, theta, store, lesson.index, num_classes=len(lesson.class_ids))
    return float((logits.argmax(1).cpu() == lesson.labels).float().mean())


def initial_theta(family: Family, num_classes: int, *, seed: int) -> Tensor:
    """Torch's default initialisation of the family's network, from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = family.module(num_classes)
    return family.layout(num_classes).flatten(
        {name: p.detach() for name, p in module.named_parameters()}
    )


def train_trunk(
    family: Family,
    dataset: Dataset,
    class_ids: Sequence[int],
    recipe: RecipeConfig,
    *,
    seed: int,
    progress: OnSteps = lambda steps: None,
) -> nn.Module:
    """Train a trunk together with a head on all given classes; the head is thrown away."""
    lesson = Lesson.of(dataset, class_ids, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = nn.Sequential(family.new_trunk(), family.module(len(class_ids)))
    network.to(memory_format=torch.channels_last)  # faster on CPU by a fifth to a quarter
    parameters = list(network.parameters())
    optimiser = _AdamW(parameters, recipe)
    order = batch_order(len(lesson.index), recipe.batch_size, recipe.steps, seed=seed)
    for step, batch in enumerate(order):
        x = family.scale(dataset.views[lesson.index[batch]])
        with _autocast(x, recipe):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), lesson.labels[batch])
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the trunk's loss is not finite at step {step}")
        optimiser.step(step, torch.autograd.grad(loss, parameters))
        progress(1)
    return network[0].to(memory_format=torch.contiguous_format)  # files take nothing else
