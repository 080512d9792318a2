"""What is a class worth that is a group of others, "fish" or "vehicle", by how it is asked for?

    python -m benchmarks.groups tina-cifar100-cnn5k  # appends a row to results/groups.jsonl

Sets of five of ten groups of CIFAR-100's classes. A group is all its classes that were trained on,
and every picture of any of them is its. Accuracy on their `select` images, and the difference to
asking by all of its classes' words, with standard errors that draw sets and images anew, but no
other groups. Nothing here reads `report` images.

word       the group's own word
one, two   the words of so many of its classes, drawn for each set
all        those of all of them, of which each row inherits alike
averaged   the mean of all their embeddings as if it were a word's
summed     the generic model's probabilities of all of them, added up: not one of K rows

with what they inherit alone, without the denoiser, as `untrained`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.objectives import against, by_set, judged, measure
from benchmarks.record import as_command, checkpoint_folder, each_checkpoint, shown
from tina.asked import Asked, together
from tina.checkpoint import load_generator
from tina.classifiers import predict
from tina.controls import nothing
from tina.datasets import Dataset, load_dataset
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.jobconfig import DataConfig
from tina.metrics import Array
from tina.superclasses import CIFAR100_SUPERCLASSES

SETS, GROUPS = 100, 5
WORDS = {
    "fish": "fish",
    "flowers": "flower",
    "fruit and vegetables": "fruit",
    "household furniture": "furniture",
    "insects": "insect",
    "large man-made outdoor things": "building",
    "people": "person",
    "reptiles": "reptile",
    "trees": "tree",
    "vehicles 1": "vehicle",
}
"""The groups that one word says which packaged generators know."""

Set = Sequence[str]
Say = Callable[[str, np.random.Generator], Tensor]
"""Of a group, the embeddings (M, E) of what it is asked for by."""


def lessons_of(
    dataset: Dataset, members: dict[str, list[int]], sets: Sequence[Set]
) -> list[Lesson]:
    """The `select` images of each set, labelled by their group."""
    found = []
    for groups in sets:
        own = [dataset.indices("select", members[group]) for group in groups]
        counts = torch.tensor([len(places) for places in own])
        labels = torch.arange(len(groups)).repeat_interleave(counts)
        ids = tuple(range(len(groups)))
        found.append(Lesson(class_ids=ids, index=torch.cat(own), labels=labels, seed=0))
    return found


@torch.no_grad()
def made(generator: Generator, asked: Sequence[Asked], **options: Any) -> list[Tensor]:
    """A theta for each set."""
    every, mask = together(asked)
    tokens = generator.denoised(every.embeddings, mask, seeds=[0] * len(asked), **options)
    body, rows = generator.finish(tokens, every, mask)
    return [generator.theta(*each) for each in zip(body, rows, strict=True)]


def summed(
    generator: Generator,
    store: InputStore,
    lessons: Sequence[Lesson],
    places: Sequence[list[list[int]]],
) -> list[Array]:
    """As `measure`, of the generic model; `places` are each group's rows in it."""
    generic, found = generator.generic, []
    theta = generator.theta(generic.body, generic.rows)
    for lesson, groups in zip(lessons, places, strict=True):
        rows = predict(generator.family, theta, store, lesson.index, num_classes=len(generic.rows))
        logits = torch.stack([rows[:, own].logsumexp(1) for own in groups], 1)
        found.append(judged(logits, lesson.labels))
    return found


def compare(name: str) -> dict[str, object]:
    """The figures of a checkpoint."""
    generator = load_generator(checkpoint_folder(name))
    vocabulary, family = generator.vocabulary, generator.family
    dataset = load_dataset(DataConfig(name=generator.dataset, image_size=family.image_size))
    store, own = shown(generator, dataset), vocabulary.embeddings
    place = {c: i for i, c in enumerate(generator.generic.class_ids)}
    members = {
        group: [
            c for n in CIFAR100_SUPERCLASSES[group] if (c := dataset.class_names.index(n)) in place
        ]
        for group in WORDS
    }
    rng = np.random.default_rng(0)
    sets = [rng.choice(list(WORDS), GROUPS, replace=False).tolist() for _ in range(SETS)]
    lessons = lessons_of(dataset, members, sets)

    def by_word(group: str, rng: np.random.Generator) -> Tensor:
        found = vocabulary.lookup(WORDS[group])
        assert found is not None, f"{name} does not know {WORDS[group]}"
        return found.unsqueeze(0)

    def some(count: int) -> Say:
        return lambda group, rng: own[rng.permutation(members[group])[:count]]

    def averaged(group: str, rng: np.random.Generator) -> Tensor:
        return F.normalize(own[members[group]].mean(0, keepdim=True), dim=-1)

    ways: dict[str, Say] = {
        "word": by_word,
        "one": some(1),
        "two": some(2),
        "all": some(len(dataset.class_names)),
        "averaged": averaged,
    }
    tina, untrained, familiarity = {}, {}, {}
    for way, say in ways.items():
        draws = np.random.default_rng(1)
        asked = [
            vocabulary.asked_by_any([say(group, draws) for group in groups]) for groups in sets
        ]
        tina[way] = measure(generator, store, lessons, made(generator, asked))
        untrained[way] = measure(generator, store, lessons, made(generator, asked, denoise=nothing))
        familiarity[way] = float(torch.stack([one.familiarity for one in asked]).mean())
    places = [[[place[c] for c in members[group]] for group in groups] for groups in sets]
    tina["summed"] = summed(generator, store, lessons, places)

    def tell(way: str) -> dict[str, float]:
        difference = against(tina[way], tina["all"], lessons)
        found = {
            "tina": float(by_set(tina[way])[:, 0].mean()),
            "points": difference["accuracy_points"],
            "points_se": difference["accuracy_points_se"],
        }
        if way in untrained:
            found["untrained"] = float(by_set(untrained[way])[:, 0].mean())
            found["familiarity"] = familiarity[way]
        return {key: round(value, 2) for key, value in found.items()}

    return {
        "dataset": generator.dataset,
        "sets": SETS,
        "groups": {WORDS[group]: len(ids) for group, ids in members.items()},
        "ways": {way: tell(way) for way in tina},
    }


def main() -> None:
    """Measure and append."""
    each_checkpoint("groups", __doc__, compare)


if __name__ == "__main__":
    as_command(main)
