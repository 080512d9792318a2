"""What is a text worth that a checkpoint does not know, placed among its words by MiniLM?

    python -m benchmarks.texts tina-cifar100-cnn5k  # appends a row to results/texts.jsonl

Of sets of ten classes some are asked for by a text that MiniLM places among the checkpoint's words
(`tina.mapped`), others by their own vectors. Accuracy on `select` images, and the difference to the
same sets with all of their own vectors, with standard errors that draw sets and images anew, but no
other classes. Nothing here reads `report` images. By accuracies nothing was chosen: what is set in
`tina.mapped` was cross-validated over vocabularies, in which these names are.

own       all names by the vectors that the checkpoint has of them
placed    names placed as if the checkpoint did not know this one
apart     the same without any word that shares one with it, as "fox" and "red fox"
described descriptions without the names (of CIFAR-100), as if it did not know the new ones

with what they inherit alone, without the denoiser, as `untrained`. In `new_of_ten` so many classes
are new and asked for so, in `ten_known` all are trained and asked for so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.examples import CLASSES, NEW, SETS, draw
from benchmarks.objectives import against, by_set, measure, prompted
from benchmarks.record import as_command, checkpoint_folder, each_checkpoint, shown
from tina.checkpoint import load_generator
from tina.controls import nothing
from tina.datasets import load_dataset
from tina.finetune import Lesson
from tina.generator import Generator
from tina.jobconfig import DataConfig
from tina.mapped import ALPHA, MappedEncoder
from tina.metrics import Array
from tina.prompts import Vocabulary

DESCRIPTIONS = dict(
    line.split(": ")
    for line in """
apple: a round red or green fruit that grows on trees
aquarium fish: a small colourful pet that swims in a glass tank
baby: a very young child who cannot walk yet
bear: a big heavy furry animal that sleeps in winter
beaver: a brown animal with a flat tail that builds dams
bed: the soft piece of furniture you sleep on
bee: a striped insect that makes honey
beetle: an insect with hard shiny wing cases
bicycle: a vehicle with two wheels and pedals
bottle: a glass container with a narrow neck for drinks
bowl: a round deep dish for soup or salad
boy: a male child who goes to school
bridge: what carries a road over a river
bus: a long vehicle that carries many passengers through town
butterfly: an insect with large colourful wings
camel: a desert animal with humps on its back
can: a metal tin that soup or soda comes in
castle: a medieval building with thick walls and towers
caterpillar: the crawling larva that eats leaves and turns into a moth
cattle: farm animals that give milk and beef
chair: a seat with a back and four legs
chimpanzee: an intelligent black ape from Africa
clock: the thing on the wall that shows the time
cloud: white fluff in the sky that brings rain
cockroach: a brown pest insect that runs through dirty kitchens
couch: a soft seat for three in the living room
crab: a sea animal with claws that walks sideways
crocodile: a large reptile with many teeth that lurks in rivers
cup: what you drink coffee or tea from
dinosaur: a giant reptile that died out long ago
dolphin: a playful grey sea mammal that jumps out of the water
elephant: a huge grey animal with a trunk and tusks
flatfish: a fish that lies flat on the sea floor
forest: many trees that stand close together
fox: a red wild animal with a bushy tail
girl: a female child who goes to school
hamster: a tiny pet rodent that runs in a wheel
house: a building where one family lives
kangaroo: an animal from Australia that hops and has a pouch
keyboard: the board of keys that you type on
lamp: what stands on the desk and gives light
lawn mower: the machine that cuts the grass
leopard: a large wild cat with spots
lion: a big wild cat with a mane
lizard: a small reptile with four legs and a long tail
lobster: a red sea animal with two big claws
man: a grown male person with a beard
maple tree: a tall plant whose leaves turn red in autumn
motorcycle: a vehicle with two wheels and an engine
mountain: a high rocky peak covered with snow
mouse: a tiny grey rodent that eats cheese
mushroom: a fungus with a stem and a cap
oak tree: a tall plant with acorns
orange: a round citrus fruit that juice is made of
orchid: an exotic flower kept in pots on the window
otter: a sleek brown animal that swims and eats fish
palm tree: a tall plant on tropical beaches with coconuts
pear: a green fruit that is narrow at the top
pickup truck: a car with an open bed for loads
pine tree: a tall evergreen plant with needles and cones
plain: flat open land with grass
plate: the flat dish that dinner is served on
poppy: a red flower that grows in the fields
porcupine: an animal covered with long sharp quills
possum: a small animal that hangs by its tail and plays dead
rabbit: a small animal with long ears that hops
raccoon: a grey animal with a black mask that steals garbage
ray: a flat sea animal with a long thin tail
road: asphalt for cars to drive on
rocket: what carries astronauts into space
rose: a red flower with thorns for lovers
sea: waves of salt water out to the horizon
seal: a fat sea animal with flippers that lies on the ice
shark: a dangerous sea predator with a fin on its back
shrew: a tiny animal with a long pointed nose that eats insects
skunk: a black and white animal that stinks
skyscraper: a very tall office building with glass walls
snail: a slow slimy animal with a shell on its back
snake: a long reptile without legs
spider: an animal with eight legs that spins webs
squirrel: a small animal with a bushy tail that collects nuts
streetcar: a vehicle on rails that runs through the streets
sunflower: a tall yellow plant whose seeds are pressed for oil
sweet pepper: a red, green or yellow vegetable that is hollow inside
table: a flat top on four legs that you eat at
tank: an armoured military vehicle with a gun
telephone: what you call somebody with
television: the screen on which films and news are watched
tiger: a large orange wild cat with black stripes
tractor: the machine with big wheels that pulls a plough
train: a locomotive with carriages on rails
trout: a speckled fish from the river for dinner
tulip: a spring flower from Holland
turtle: a slow reptile that hides in its shell
wardrobe: a tall piece of furniture for hanging clothes
whale: the largest animal of the ocean
willow tree: a tall plant with hanging branches by the water
wolf: a wild grey animal that hunts in packs and howls
woman: a grown female person with long hair
worm: a long thin soft animal that lives in the soil
""".strip().splitlines()
)
"""As somebody says them who does not say their names; written once, before any measurement."""


def placed(encoder: MappedEncoder, queries: Tensor, unknown: Sequence[Sequence[int]]) -> Tensor:
    """Where texts would be placed if some words of each were not known: (N, E).

    With A the kernel matrix with its ridge and Y what it is to give, the duals without the rows B
    are A^-1 Y - (A^-1)_B (A^-1)_BB^-1 (A^-1 Y)_B: nothing is solved anew for each text. What all
    vectors are centred by stays.

    Args:
        queries: (N, S), see `MappedEncoder.query`.
        unknown: The places of those words.
    """
    gram = encoder.kernel(encoder.keys)
    inverse = torch.linalg.inv(gram + ALPHA * torch.eye(len(gram), dtype=gram.dtype))
    found = []
    for query, rows in zip(queries, map(list, unknown), strict=True):
        without = torch.linalg.solve(inverse[rows][:, rows], encoder.duals[rows])
        duals = encoder.duals - inverse[:, rows] @ without
        found.append(encoder.kernel(query) @ duals + encoder.mean)
    return F.normalize(torch.stack(found), dim=-1).float()


def kin(vocabulary: Vocabulary, place: int) -> list[int]:
    """The words that share one with a word, and itself."""
    words = [set(re.findall(r"\w+", name)) for name in vocabulary.names]
    return [i for i, found in enumerate(words) if i == place or found & words[place]]


def left_out(encoder: MappedEncoder, vocabulary: Vocabulary, middle: Tensor) -> Tensor:
    """Centred cosine (W,) of each word's own vector to where it would be placed if not known."""
    own = vocabulary.embeddings
    found = placed(encoder, encoder.keys, [[place] for place in range(len(own))])
    return F.cosine_similarity(found - middle, own - middle)


def known_sets(classes: Sequence[int]) -> list[list[int]]:
    """Sets of trained classes."""
    rng = np.random.default_rng(0)
    return [rng.choice(classes, CLASSES, replace=False).tolist() for _ in range(SETS)]


def compare(name: str) -> dict[str, object]:
    """The figures of a checkpoint."""
    generator: Generator = load_generator(checkpoint_folder(name))
    vocabulary, family = generator.vocabulary, generator.family
    dataset = load_dataset(DataConfig(name=generator.dataset, image_size=family.image_size))
    store = shown(generator, dataset)
    encoder = MappedEncoder(vocabulary)
    classes = dataset.class_names
    own = vocabulary.embeddings[: len(classes)]
    trained, every = set(generator.generic.class_ids), range(len(classes))
    names = encoder.keys[: len(classes)]
    ways = {
        "own": own,
        "placed": placed(encoder, names, [[c] for c in every]),
        "apart": placed(encoder, names, [kin(vocabulary, c) for c in every]),
    }
    if DESCRIPTIONS.keys() >= set(classes):
        texts = torch.stack([encoder.query(DESCRIPTIONS[name]) for name in classes])
        unknown = [[] if c in trained else [c] for c in every]
        ways["described"] = placed(encoder, texts, unknown)

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

    new = [c for c in every if c not in trained]
    known = [c for c in every if c in trained]
    cosine = F.cosine_similarity
    middle = own[known].mean(0)
    return {
        "dataset": generator.dataset,
        "words": len(vocabulary.names),
        "sets": SETS,
        "cosine_to_own": {
            kind: round(float(cosine(v - middle, own - middle).mean()), 3)
            for kind, v in ways.items()
        }
        | {"every_word": round(float(left_out(encoder, vocabulary, middle).mean()), 3)},
        "familiarity_of_new": {
            kind: round(float(vocabulary.familiarity(v[new]).mean()), 3) for kind, v in ways.items()
        },
        "new_of_ten": {str(n): score(draw(generator, len(classes), n), new) for n in NEW},
        "ten_known": score(known_sets(known), known),
    }


def main() -> None:
    """Measure and append."""
    each_checkpoint("texts", __doc__, compare)


if __name__ == "__main__":
    as_command(main)
