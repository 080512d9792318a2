"""How good are generated classifiers on a data set that their generator was not made from?

    python -m benchmarks.elsewhere tina-cifar100-cnn5k tina-cifar100-mini-imagenet-cnn5k \
        --data caltech101

Checkpoints (packaged names or folders) are given the same names, each as its vocabulary has them:
sets of ten classes of the data set, drawn among those that all of them know. Their classifiers are
judged on as many images of each class, out of `fit` and `select`, which have trained none of them
(whether that holds of what is called `folder` or `parquet`, the caller knows); `report` ones are
not read. Beside each stand what its prompts inherit without the denoiser, and the same names in a
random order, which must fall to chance; then five further images of each class as a prompt: in the
names' place, and beside them (`tina.examples`, whose settings were chosen on the generators'
own data, but for a change that was taken back as it lost on Caltech-101). What they bring over the
names, and differences to the first checkpoint are paired, and their standard errors draw sets and
images anew. A row is appended to results/elsewhere.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.examples import as_prompts, learnt
from benchmarks.objectives import against, by_set, measure, prompted
from benchmarks.record import append, as_command, checkpoint_folder, load, shown
from tina.checkpoint import load_generator
from tina.controls import nothing
from tina.datasets import Dataset, load_dataset
from tina.errors import ConfigError, DataError
from tina.finetune import Lesson
from tina.generator import Generator
from tina.jobconfig import DataConfig
from tina.metrics import Array
from tina.prompts import SAME

SETS, CLASSES, IMAGES, SHOTS = 200, 10, 20, 5


def size_for(generator: Generator) -> int | None:
    """Side of the images that a generator is judged on; none: as large as its family sees them.

    A trunk that was trained on larger images is shown these, as a user's photographs are.
    """
    family = generator.family
    return None if family.side > family.image_size else family.image_size


def common_classes(dataset: Dataset, generators: Sequence[Generator]) -> list[int]:
    """Ids of the classes whose names all generators know.

    Raises:
        DataError: They are fewer than a set has.
    """
    known = [
        class_id
        for class_id, name in enumerate(dataset.class_names)
        if all(g.vocabulary.lookup(name) is not None for g in generators)
    ]
    if len(known) < CLASSES:
        raise DataError(f"all of them know {len(known)} classes of {dataset.name}, not {CLASSES}")
    return known


def balanced(dataset: Dataset, class_ids: Sequence[int]) -> Lesson:
    """As many images of each class of a set, so that accuracy is over classes."""
    index = torch.cat([places(dataset, class_id)[:IMAGES] for class_id in class_ids])
    labels = torch.arange(len(class_ids)).repeat_interleave(IMAGES)
    return Lesson(class_ids=tuple(class_ids), index=index, labels=labels, seed=0)


def places(dataset: Dataset, class_id: int) -> Tensor:
    """Images of a class: those that are judged, then those that prompts may show.

    Raises:
        DataError: There are fewer.
    """
    both = [dataset.indices(partition, [class_id]) for partition in ("select", "fit")]
    found = torch.cat(both)[: IMAGES + SHOTS]
    if len(found) < IMAGES + SHOTS:
        name, most = dataset.class_names[class_id], IMAGES + SHOTS
        raise DataError(f"{name!r} has {len(found)} images in fit and select, not {most}")
    return found


def answers(
    generator: Generator, dataset: Dataset, lessons: Sequence[Lesson]
) -> dict[str, list[Array]]:
    """What `measure` returns of each row of the table, over the sets."""
    store = shown(generator, dataset)
    sets = [[dataset.class_names[c] for c in lesson.class_ids] for lesson in lessons]
    embeddings = torch.stack([known(generator, names) for names in sets])
    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    rng = np.random.default_rng(1)
    shuffled = torch.stack([one[rng.permutation(len(one))] for one in embeddings])
    examples = [[places(dataset, c)[IMAGES:] for c in lesson.class_ids] for lesson in lessons]
    thetas = {
        row: prompted(generator, prompts, mask, denoise=denoise)
        for row, prompts, denoise in (
            ("tina", embeddings, None),
            ("untrained", embeddings, nothing),
            ("tina_shuffled_prompt", shuffled, None),
        )
    }
    seen = as_prompts(generator, dataset.views, store, examples)
    taken = prompted(generator, seen, mask)
    thetas["tina_five_images"] = learnt(generator, taken, seen, store, examples)
    for row in ("tina", "untrained"):
        thetas[f"{row}_five_examples"] = learnt(generator, thetas[row], embeddings, store, examples)
    return {row: measure(generator, store, lessons, each) for row, each in thetas.items()}


def known(generator: Generator, names: Sequence[str]) -> Tensor:
    """Embeddings (K, E) of names that the generator knows."""
    vectors = [generator.vocabulary.lookup(name) for name in names]
    return torch.stack([vector for vector in vectors if vector is not None])


def familiarity(generator: Generator, names: Sequence[str]) -> dict[str, float]:
    """How near names are to what a generator was trained on, and how many are among that."""
    values = generator.vocabulary.familiarity(known(generator, names))
    return {
        "mean": round(float(values.mean()), 3),
        "trained_names": int((values > SAME).sum()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="packaged names or folders")
    parser.add_argument("--data", required=True, help="data set, as in data.name")
    parser.add_argument("--root", help="its folder or URI; default: TINA_DATA")
    args = parser.parse_args(argv)
    before = load()
    generators = {name: load_generator(checkpoint_folder(name)) for name in args.checkpoints}
    for name, generator in generators.items():
        if {*args.data.split("+")} & {*generator.dataset.split("+")} - {"folder", "parquet"}:
            raise ConfigError(f"{name} was made from {generator.dataset}")
    data = DataConfig(name=args.data, root=args.root)
    datasets = {
        name: load_dataset(
            replace(data, image_size=size_for(generator)), largest=generator.family.side
        )
        for name, generator in generators.items()
    }
    dataset = datasets[args.checkpoints[0]]
    classes = common_classes(dataset, list(generators.values()))
    rng = np.random.default_rng(0)
    sets = [rng.choice(classes, CLASSES, replace=False).tolist() for _ in range(SETS)]
    lessons = [balanced(dataset, chosen) for chosen in sets]
    found = {name: answers(g, datasets[name], lessons) for name, g in generators.items()}
    base = found[args.checkpoints[0]]["tina"]
    figures: dict[str, object] = {
        "dataset": args.data,
        "sets": SETS,
        "classes": [dataset.class_names[c] for c in classes],
        "images_per_class": IMAGES,
        "generators": {
            name: {
                "made_from": generator.dataset,
                "familiarity": familiarity(generator, [dataset.class_names[c] for c in classes]),
                "accuracy": {
                    row: round(float(by_set(scores)[:, 0].mean()), 2)
                    for row, scores in found[name].items()
                },
                "over_untrained": against(found[name]["tina"], found[name]["untrained"], lessons),
                "five_examples_over_names": against(
                    found[name]["tina_five_examples"], found[name]["tina"], lessons
                ),
                "over_the_first": against(found[name]["tina"], base, lessons),
            }
            for name, generator in generators.items()
        },
    }
    append("elsewhere", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
