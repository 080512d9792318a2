"""What is a text worth that a checkpoint does not know, placed among its words by MiniLM?

    python -m benchmarks.texts tina-cifar100-cnn5k  # appends a row to results/texts.jsonl

Of sets of ten classes some are asked for by a text that MiniLM places among the checkpoint's words
(`tina.mapped`), others by their own vectors. Accuracy on `select` images, and the difference to the
same sets with all of their own vectors, with standard errors that draw sets and images anew.
Nothing here reads `report` images, and nothing was chosen by these.

own       all names by the vectors that the checkpoint has of them
placed    names placed as if the checkpoint had never known them: without their own vectors
apart     the same without those of any word that shares one with them, as "fox" and "red fox"
described descriptions without the names (of CIFAR-100), each placed

with what they inherit alone, without the denoiser, as `untrained`. `new` are sets with so many
classes that nothing was trained on, whose names are replaced, `known` ones of trained classes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.descriptions import DESCRIPTIONS
from benchmarks.examples import CLASSES, NEW, SETS, draw
from benchmarks.objectives import against, by_set, measure, prompted
from benchmarks.record import append, as_command, checkpoint_folder, load
from tina.checkpoint import load_generator
from tina.controls import nothing
from tina.datasets import load_dataset
from tina.finetune import Lesson
from tina.generator import Generator
from tina.inputs import InputStore
from tina.jobconfig import DataConfig
from tina.mapped import ALPHA, MappedEncoder
from tina.metrics import Array
from tina.prompts import Vocabulary


def placed(encoder: MappedEncoder, vocabulary: Vocabulary, count: int, *, apart: bool) -> Tensor:
    """Where the first names of a vocabulary would be placed if they were not known: (count, E).

    The residuals of rows B left out of a ridge regression are (A^-1)_BB^-1 (A^-1 Y)_B, where A is
    the kernel matrix with the ridge: nothing is solved anew for each name.
    """
    gram = encoder.kernel(encoder.keys)
    inverse = torch.linalg.inv(gram + ALPHA * torch.eye(len(gram), dtype=gram.dtype))
    words = [set(re.findall(r"\w+", name)) for name in vocabulary.names]
    found = []
    for own in range(count):
        kin = [i for i, w in enumerate(words) if i == own or (apart and w & words[own])]
        residuals = torch.linalg.solve(inverse[kin][:, kin], encoder.duals[kin])
        found.append((vocabulary.embeddings[kin].double() - residuals)[kin.index(own)])
    return F.normalize(torch.stack(found), dim=-1).float()


def known_sets(classes: Sequence[int]) -> list[list[int]]:
    """Sets of trained classes."""
    rng = np.random.default_rng(0)
    return [rng.choice(classes, CLASSES, replace=False).tolist() for _ in range(SETS)]


def compare(name: str) -> dict[str, object]:
    """The figures of a checkpoint."""
    generator: Generator = load_generator(checkpoint_folder(name))
    vocabulary, family = generator.vocabulary, generator.family
    dataset = load_dataset(DataConfig(name=generator.dataset, image_size=family.image_size))
    store = InputStore(family, dataset.views)
    encoder = MappedEncoder(vocabulary)
    classes = dataset.class_names
    own = vocabulary.embeddings[: len(classes)]
    ways = {
        "own": own,
        "placed": placed(encoder, vocabulary, len(classes), apart=False),
        "apart": placed(encoder, vocabulary, len(classes), apart=True),
    }
    if DESCRIPTIONS.keys() >= set(classes):
        ways["described"] = encoder.encode_text([DESCRIPTIONS[name] for name in classes])
    trained = set(generator.generic.class_ids)

    def score(sets: Sequence[list[int]], replaced: list[int]) -> dict[str, object]:
        lessons = [Lesson.of(dataset, s, seed=0, partition="select") for s in sets]

        def answers(vectors: Tensor, **options: Any) -> list[Array]:
            prompts = own.clone()
            prompts[replaced] = vectors[replaced]
            embeddings = torch.stack([prompts[s] for s in sets])
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
            thetas = prompted(generator, embeddings, mask, **options)
            return measure(generator, store, lessons, thetas)

        base, rows = answers(own), dict[str, object]()
        for kind, vectors in ways.items():
            tina = base if kind == "own" else answers(vectors)
            untrained = answers(vectors, denoise=nothing)
            difference = against(tina, base, lessons)
            rows[kind] = {
                "tina": round(float(by_set(tina)[:, 0].mean()), 2),
                "untrained": round(float(by_set(untrained)[:, 0].mean()), 2),
                "points": difference["accuracy_points"],
                "points_se": difference["accuracy_points_se"],
            }
        return rows

    new = [c for c in range(len(classes)) if c not in trained]
    known = [c for c in range(len(classes)) if c in trained]
    cosine = F.cosine_similarity
    middle = own[known].mean(0)
    return {
        "dataset": generator.dataset,
        "words": len(vocabulary.names),
        "sets": SETS,
        "cosine_to_own": {
            kind: round(float(cosine(v - middle, own - middle).mean()), 3)
            for kind, v in ways.items()
        },
        "familiarity_of_new": {
            kind: round(float(vocabulary.familiarity(v[new]).mean()), 3) for kind, v in ways.items()
        },
        "new_of_ten": {str(n): score(draw(generator, len(classes), n), new) for n in NEW},
        "ten_known": score(known_sets(known), known),
    }


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="packaged names or folders")
    for name in parser.parse_args().checkpoints:
        before = load()
        append("texts", {"checkpoint": name} | compare(name), load_before=before)


if __name__ == "__main__":
    as_command(main)
