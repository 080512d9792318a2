"""What do a few pictures beside the words bring for classes that nothing was trained on?

    python -m benchmarks.examples cifar100_cnn5k     # appends a row to results/examples.jsonl

For presets whose generators come with the package. Sets of ten classes, of which one, two, five or
all were kept out of all training. With every class come one, five or ten pictures, `select` images
that no classifier is judged on. Accuracy on the other `select` images, and its difference to the
generator's without examples, with standard errors that draw sets and images anew. The prior's
settings (`tina.examples`) were chosen on such images of CIFAR-100. Nothing here reads `report`
images.

tina                  by the names alone
tina_images           pictures in the names' place
tina_examples         pictures beside the names
tina_examples_of_new  the same, of the new classes alone
untrained             what the names inherit, without the denoiser
untrained_examples    the same with pictures beside the names
centroids             nearest mean of the pictures' generic features (no names, no generator)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.objectives import against, by_set, measure, prompted
from benchmarks.prompts import for_prompts, unseen
from benchmarks.record import append, as_command, load, packaged
from tina.controls import nothing
from tina.examples import features, learn_from
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.metrics import Array
from tina.run import Run
from tina.views import Views

SETS, CLASSES, NEW, SHOTS = 100, 10, (1, 2, 5, 10), (1, 5, 10)


def draw(generator: Generator, classes: int, new: int) -> list[list[int]]:
    """Sets of that many classes of the data set, of which so many are new."""
    seen = set(generator.generic.class_ids)
    known, kept_out = (
        [c for c in range(classes) if (c in seen) == trained] for trained in (True, False)
    )
    rng = np.random.default_rng(new)
    return [
        [
            *rng.choice(kept_out, new, replace=False).tolist(),
            *rng.choice(known, CLASSES - new, replace=False).tolist(),
        ]
        for _ in range(SETS)
    ]


def places_shown(run: Run, sets: Sequence[Sequence[int]], shots: int) -> list[list[Tensor]]:
    """Places (shots,) of pictures of each class of each set."""
    found = []
    for i, classes in enumerate(sets):
        rng = np.random.default_rng(i)
        places = [for_prompts(run, [c]) for c in classes]
        found.append([p[rng.permutation(len(p))[:shots]] for p in places])
    return found


def as_prompts(
    generator: Generator, images: Views, store: InputStore, places: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Embeddings (B, K, E) of the pictures of each class of each set."""

    def embedding(few: Tensor) -> Tensor:
        # where there is no tower, what it would see is in the store
        return (
            generator.embed_shots(images[few])
            if generator.tower
            else generator.embed_seen(store[few])
        )

    return torch.stack([torch.stack([embedding(few) for few in each]) for each in places])


def learnt(
    generator: Generator,
    thetas: Sequence[Tensor],
    names: Tensor,
    store: InputStore,
    places: Sequence[Sequence[Tensor | None]],
) -> list[Tensor]:
    """The thetas that names, embeddings (B, K, E), gave, after the pictures beside them."""
    familiarity = generator.vocabulary.familiarity(names)
    inputs = [[None if p is None else store[p] for p in few] for few in places]
    return [learn_from(generator, *one) for one in zip(thetas, familiarity, inputs, strict=True)]


def centroids(generator: Generator, inputs: Sequence[Tensor]) -> Tensor:
    """The theta whose nearest class mean in generic features (F,) wins: a linear classifier."""
    family, body = generator.family, generator.generic.body
    means = torch.stack([features(family, body, x)[:, :-1].mean(0) for x in inputs])
    rows = torch.cat([means, -means.square().sum(1, keepdim=True) / 2], 1)
    return generator.theta(body, rows)


def compare(run: Run, generator: Generator, store: InputStore, new: int) -> dict[str, object]:
    """Accuracies with so many new classes."""
    sets = draw(generator, run.dataset.num_classes, new)
    lessons = [unseen(run, Lesson.of(run.dataset, s, seed=0, partition="select")) for s in sets]
    names, mask = generator.vocabulary.of(sets)
    plain = {
        "tina": prompted(generator, names, mask),
        "untrained": prompted(generator, names, mask, denoise=nothing),
    }

    def score(thetas: Sequence[Tensor]) -> list[Array]:
        return measure(generator, store, lessons, thetas)

    scores = {row: score(thetas) for row, thetas in plain.items()}

    def tell(found: list[Array]) -> dict[str, float]:
        difference = against(found, scores["tina"], lessons)
        return {
            "accuracy": round(float(by_set(found)[:, 0].mean()), 2),
            "points": difference["accuracy_points"],
            "points_se": difference["accuracy_points_se"],
        }

    rows: dict[str, object] = {row: tell(found) for row, found in scores.items()}
    for shots in SHOTS:
        places = places_shown(run, sets, shots)
        prompts = as_prompts(generator, run.dataset.views, store, places)
        taken = prompted(generator, prompts, mask)
        found = {"tina_images": learnt(generator, taken, prompts, store, places)}
        for row, thetas in plain.items():
            begin = time.perf_counter()
            found[f"{row}_examples"] = learnt(generator, thetas, names, store, places)
            if row == "tina":
                took = time.perf_counter() - begin
        if new > 1:  # one class alone is told from nothing
            of_new = [few[:new] + [None] * (len(few) - new) for few in places]
            new_ones = learnt(generator, plain["tina"], names, store, of_new)
            found["tina_examples_of_new"] = new_ones
        found["centroids"] = [centroids(generator, [store[p] for p in few]) for few in places]
        rows[f"{shots}_of_each"] = {row: tell(score(thetas)) for row, thetas in found.items()} | {
            "ms_to_learn": round(1000 * took / SETS, 1)
        }
    return rows


def main() -> None:
    """Measure and append, one preset after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", help="names of files in configs/")
    for name in parser.parse_args().presets:
        before = load()
        run, generator, store = packaged(name)
        figures: dict[str, object] = {
            "dataset": generator.dataset,
            "family": generator.family.name,
            "sets": SETS,
            "new_of_ten": {str(new): compare(run, generator, store, new) for new in NEW},
        }
        append("examples", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
