"""What does diffusion add: weight space alone, function space alone, both, one step without noise?

    python -m benchmarks.objectives runs/cifar100_cnn5k --steps 1000
    python -m benchmarks.objectives runs/cifar100_cnn5k --steps 1000 --only both regressor

Each objective trains the run's generator anew for equally many steps on one thread. Its averaged
weights are measured on `select` images of class sets that are no task of the run; differences to
classifier selection are paired by set and image, and their standard errors draw both anew. Nothing
here reads `report` images. A row per objective is appended to results/objectives.jsonl.

The regressor is the same network with `diffusion.schedule` none: zeros in the place of noise and
one step, so that it makes one classifier per prompt. The others are sampled with several seeds:
their mean, the best of them by the (here unknowable) accuracy, and the mean of their weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import append, as_command, load
from tina.checkpoint import load_generator
from tina.classifiers import predict
from tina.config import DiffusionConfig
from tina.engine import LocalEngine
from tina.errors import ConfigError
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.jobconfig import TrainConfig
from tina.metrics import Array, resample
from tina.run import Run
from tina.training import Progress, train
from tina.zoo import Zoo

SETS, SEEDS = 60, 4
RESAMPLES = 1000
DRAWS = 100  # of as many sets as are still wanted
BOTH, WEIGHT, REGRESSOR = "both", "weight", "regressor"
OBJECTIVES: dict[str, dict[str, Any]] = {
    BOTH: {},
    # alone it must teach the noisiest levels too
    WEIGHT: {"function_loss": 0.0, "weight_loss": 1.0, "min_snr": 0.0, "zoo_batch": 32},
    "function": {"weight_loss": 0.0},
    REGRESSOR: {"weight_loss": 0.0},
}
NOISELESS = DiffusionConfig(schedule="none", timesteps=1, sampling_steps=1)


def select_lessons(run: Run, count: int) -> tuple[list[tuple[int, ...]], list[Lesson]]:
    """Class sets that are no task of the run, always the same, and their `select` images.

    Raises:
        ConfigError: There are not as many.
    """
    rng, sets = np.random.default_rng(999), list[tuple[int, ...]]()
    taken = {frozenset(task.class_ids) for task in run.space.train}
    for _ in range(DRAWS):
        for found in run.space.sample_fresh(rng, count - len(sets)):
            if frozenset(found) not in taken:
                taken.add(frozenset(found))
                sets.append(found)
        if len(sets) == count:
            break
    else:
        raise ConfigError(f"{run.place.location} leaves no {count} class sets that are no task")
    return sets, [Lesson.of(run.dataset, s, seed=0, partition="select") for s in sets]


def selected(generator: Generator, sets: Sequence[Sequence[int]]) -> list[Tensor]:
    """Classifier selection: a theta for each set."""
    return [generator.theta(generator.generic.body, generator.generic.select(s)) for s in sets]


def measure(
    generator: Generator, store: InputStore, lessons: Sequence[Lesson], thetas: Sequence[Tensor]
) -> list[Array]:
    """What classifiers answer on their lessons: (2, N) each, 100 where right, and cross-entropy."""
    found = []
    for theta, lesson in zip(thetas, lessons, strict=True):
        k = len(lesson.class_ids)
        logits = predict(generator.family, theta, store, lesson.index, num_classes=k)
        found.append(judged(logits, lesson.labels))
    return found


def judged(logits: Tensor, labels: Tensor) -> Array:
    """Of logits (N, K): 100 where right, and cross-entropy (2, N)."""
    hits = 100.0 * (logits.argmax(1) == labels)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([hits, loss]).double().numpy()


def by_set(found: Sequence[Array]) -> Array:
    """Accuracy in percent and mean cross-entropy (T, 2) of what `measure` returns."""
    return np.stack([answers.mean(1) for answers in found])


def against(
    found: Sequence[Array], base: Sequence[Array], lessons: Sequence[Lesson]
) -> dict[str, float]:
    """Mean differences to selection with their standard errors, sets and images drawn anew."""
    images = [lesson.index.numpy() for lesson in lessons]
    diff = by_set(found).mean(0) - by_set(base).mean(0)
    values = {}
    for i, name in enumerate(("accuracy_points", "cross_entropy")):
        both = [[answers[i : i + 1] for answers in side] for side in (found, base)]
        drawn = resample(both, images, count=RESAMPLES, seed=0)
        values[name] = round(float(diff[i]), 4)
        values[f"{name}_se"] = round(float((drawn[:, 0] - drawn[:, 1]).std()), 4)
    return values


def generated(
    generator: Generator, sets: Sequence[Sequence[int]], *, seeds: int, **options: Any
) -> list[list[Tensor]]:
    """Per seed a theta for each set."""
    prompts = generator.vocabulary.of(sets)
    return [prompted(generator, *prompts, seed=seed, **options) for seed in range(seeds)]


@torch.no_grad()
def prompted(
    generator: Generator, embeddings: Tensor, mask: Tensor, *, seed: int = 0, **options: Any
) -> list[Tensor]:
    """A theta for each prompt: embeddings (B, K, E), mask bool (B, K)."""
    body, rows = generator.generate(embeddings, mask, seeds=[seed] * len(mask), **options)
    kept = mask.sum(1).tolist()
    return [generator.theta(b, r[:k]) for b, r, k in zip(body, rows, kept, strict=True)]


def learn(
    run: Run, generator: Generator, objective: str, *, steps: int, zoo: Zoo | None = None
) -> None:
    """Train an untrained generator in place by one objective, on the run's zoo or another."""
    config: TrainConfig = replace(
        run.config.train,
        **OBJECTIVES[objective],
        steps=steps,
        checkpoint_every=steps,
        accumulation=1,
    )
    denoiser = generator.denoiser.train().requires_grad_(True)
    done = train(
        config,
        engine=LocalEngine(denoiser, config),
        source=run.source(generator, config, zoo),
        start=Progress.start(denoiser),
        report=lambda progress, figures: None,
        validate=None,
    )
    denoiser.load_state_dict(dict(done.ema))
    denoiser.eval().requires_grad_(False)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with its zoo and start/")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each objective")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    args = parser.parse_args(argv)
    before = load()
    torch.set_num_threads(1)
    run = Run.open(args.run)
    sets, lessons = select_lessons(run, SETS)
    for name in args.only:
        begin = time.perf_counter()
        generator = load_generator(run.start)
        if name == REGRESSOR:
            generator = replace(generator, config=replace(generator.config, diffusion=NOISELESS))
        learn(run, generator, name, steps=args.steps)
        spent = time.perf_counter() - begin
        store = run.store
        base = measure(generator, store, lessons, selected(generator, sets))
        seeds = generated(generator, sets, seeds=1 if name == REGRESSOR else SEEDS)
        scores = [measure(generator, store, lessons, thetas) for thetas in seeds]
        figures: dict[str, object] = {
            "objective": name,
            "dataset": run.dataset.name,
            "steps": args.steps,
            "seconds": round(spent),
            "selection": [round(float(v), 4) for v in by_set(base).mean(0)],
            "one_sample": against(scores[0], base, lessons),
        }
        if name != REGRESSOR:
            mixed = [torch.stack(thetas).mean(0) for thetas in zip(*seeds, strict=True)]
            best = np.stack([by_set(score) for score in scores]).max(0) - by_set(base)
            (one_step,) = generated(generator, sets, seeds=1, steps=1)
            figures |= {
                "best_of_seeds": round(float(best[:, 0].mean()), 4),
                "mean_of_weights": against(
                    measure(generator, store, lessons, mixed), base, lessons
                ),
                "theta_spread": mean(
                    float((a - b).norm() / a.norm()) for a, b in zip(*seeds[:2], strict=True)
                ),
                "one_step": against(measure(generator, store, lessons, one_step), base, lessons),
            }
        append("objectives", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
