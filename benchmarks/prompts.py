"""What becomes of generated classifiers when prompts are not the names that were trained on?

    python -m benchmarks.prompts runs/cifar100_cnn5k     # appends a row to results/prompts.jsonl

Prompts name sets of ten trained classes that are no task of the run. In each, one, three or five
names of the ten are said otherwise (or, by pictures, all), and the classifier is judged on `select`
images of the classes that were meant: accuracy minus that under the true names, paired by set. What
an encoder cannot encode is left out and listed. Nothing here reads `report` images.

picture     one picture of the class in place of its name, from `select` images that no classifier
            is judged on: what says what is seen was trained on the `fit` ones
pictures    five of them
wording     the same name out of another vocabulary, with another template (table encoders): the
            table's last
synonym     another everyday word for it, or for a kind of it, that the generator knows
typo        two neighbouring letters exchanged
chatter     the name in a sentence about something else
hypernym    what the class is a kind of
german      the German word
wrong       another trained class
foreign     something that the data set does not know

Familiarity: the area under the ROC curve for telling foreign names from trained classes said
in other words, and accuracy over all such prompts before and after the tenth with the least
familiar name is refused. Only for CIFAR-100, whose classes the words below are for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.objectives import against, by_set, measure, prompted, select_lessons
from benchmarks.record import append, as_command, load
from tina.controls import nothing
from tina.encoders import PromptEncoder, TableEncoder, build_encoder
from tina.finetune import Lesson
from tina.generator import Generator
from tina.metrics import Array
from tina.prompts import Vocabulary
from tina.run import Run
from tina.superclasses import CIFAR100_SUPERCLASSES

SETS, SHARES = 60, (0.1, 0.25, 0.5)
PICTURES = {"picture": 1, "pictures": 5}
SHOWN = 10  # `select` images of each class that are there for prompts
FOREIGN = (
    *("violin", "pizza", "scarf", "trumpet", "umbrella", "guitar", "refrigerator", "candle"),
    *("wheelchair", "necklace", "sandwich", "scissors", "microphone", "pasta", "flag", "drum"),
)
HYPERNYMS = dict(
    zip(
        CIFAR100_SUPERCLASSES,
        (
            *("aquatic mammal", "fish", "flower", "container", "fruit", "device", "furniture"),
            *("insect", "carnivore", "building", "landscape", "herbivore", "mammal"),
            *("invertebrate", "person", "reptile", "rodent", "tree", "vehicle", "machine"),
        ),
        strict=True,
    )
)
SYNONYMS = {
    "bear": "brown bear",
    "beetle": "ground beetle",
    "bicycle": "mountain bike",
    "bottle": "water bottle",
    "bowl": "mixing bowl",
    "bridge": "suspension bridge",
    "bus": "school bus",
    "butterfly": "cabbage butterfly",
    "camel": "arabian camel",
    "couch": "sofa",
    "crab": "rock crab",
    "crocodile": "african crocodile",
    "cup": "coffee mug",
    "elephant": "indian elephant",
    "fox": "red fox",
    "keyboard": "computer keyboard",
    "lamp": "table lamp",
    "lizard": "green lizard",
    "maple tree": "maple",
    "motorcycle": "moped",
    "mushroom": "agaric",
    "orange": "clementine",
    "pickup truck": "truck",
    "plate": "dish",
    "rabbit": "hare",
    "rocket": "missile",
    "shark": "great white shark",
    "snake": "water snake",
    "spider": "garden spider",
    "squirrel": "fox squirrel",
    "table": "dining table",
    "tank": "army tank",
    "telephone": "dial telephone",
    "television": "tv",
    "wardrobe": "armoire",
    "whale": "grey whale",
    "willow tree": "willow",
    "worm": "flatworm",
}
GERMAN = (
    "Biber Delfin Otter Seehund Wal Zierfisch Scholle Rochen Hai Forelle Orchidee Mohn Rose "
    "Sonnenblume Tulpe Flasche Schüssel Dose Tasse Teller Apfel Pilz Orange Birne Paprika Uhr "
    "Tastatur Lampe Telefon Fernseher Bett Stuhl Sofa Tisch Kleiderschrank Biene Käfer "
    "Schmetterling Raupe Schabe Bär Leopard Löwe Tiger Wolf Brücke Schloss Haus Straße Hochhaus "
    "Wolke Wald Berg Ebene Meer Kamel Rind Schimpanse Elefant Känguru Fuchs Stachelschwein "
    "Opossum Waschbär Stinktier Krabbe Hummer Schnecke Spinne Wurm Baby Junge Mädchen Mann Frau "
    "Krokodil Dinosaurier Eidechse Schlange Schildkröte Hamster Maus Kaninchen Spitzmaus "
    "Eichhörnchen Ahorn Eiche Palme Kiefer Weide Fahrrad Bus Motorrad Lieferwagen Zug "
    "Rasenmäher Rakete Straßenbahn Panzer Traktor"
)
"""In the order of CLASSES."""
CLASSES = [name for names in CIFAR100_SUPERCLASSES.values() for name in names]


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Says a class otherwise, as an embedding (E,); None where the encoder has no word for it."""

    generator: Generator
    encoder: PromptEncoder
    run: Run

    @property
    def kinds(self) -> dict[str, Callable[[str, np.random.Generator], Tensor | None]]:
        """How, by name."""
        return {
            **{kind: partial(self.shown, count=count) for kind, count in PICTURES.items()},
            "wording": self.wording,
            "synonym": lambda name, rng: self.vocabulary.lookup(SYNONYMS.get(name, "")),
            "typo": lambda name, rng: self.text(typo(name, rng)),
            "chatter": lambda name, rng: self.text(f"my neighbour once had a {name} in the garden"),
            "hypernym": lambda name, rng: self.text(hypernym(name)),
            "german": lambda name, rng: self.text(GERMAN.split()[CLASSES.index(name)]),
            "wrong": lambda name, rng: self.vocabulary.lookup(other(name, self.trained, rng)),
            "foreign": lambda name, rng: self.foreign[rng.integers(len(self.foreign))],
        }

    @property
    def vocabulary(self) -> Vocabulary:
        """The generator's."""
        return self.generator.vocabulary

    @cached_property
    def trained(self) -> list[str]:
        """Trained names."""
        return self.vocabulary.trained_names

    @cached_property
    def foreign(self) -> Tensor:
        """Embeddings (V, E) of the foreign names."""
        if isinstance(self.encoder, TableEncoder):
            found = [self.vocabulary.lookup(name) for name in FOREIGN]
            return torch.stack([vector for vector in found if vector is not None])
        return self.encoder.encode_text(FOREIGN)

    def text(self, text: str) -> Tensor | None:
        """Free text."""
        if isinstance(self.encoder, TableEncoder):
            return None
        return self.encoder.encode_text([text])[0]

    def shown(self, name: str, rng: np.random.Generator, *, count: int) -> Tensor:
        """So many pictures of the class."""
        places = for_prompts(self.run, [self.vocabulary.names.index(name)])
        few = torch.from_numpy(rng.permutation(len(places))[:count])
        return self.generator.embed_shots(self.run.dataset.views[places[few]])

    def wording(self, name: str, rng: np.random.Generator) -> Tensor | None:
        """The same name elsewhere in a table."""
        if not isinstance(self.encoder, TableEncoder):
            return None
        found = self.encoder.wordings(name)
        return found[-1] if len(found) else None


def for_prompts(run: Run, class_ids: Sequence[int]) -> Tensor:
    """The `select` images of classes that are shown in prompts, and judged by in none."""
    each = [run.dataset.indices("select", [c])[:SHOWN] for c in class_ids]
    return torch.cat(each)


def unseen(run: Run, lesson: Lesson) -> Lesson:
    """A lesson without the images that prompts may show."""
    kept = ~torch.isin(lesson.index, for_prompts(run, lesson.class_ids))
    return replace(lesson, index=lesson.index[kept], labels=lesson.labels[kept])


def typo(name: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters exchanged, but not the first."""
    at = int(rng.integers(1, len(name) - 1)) if len(name) > 2 else 0
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def hypernym(name: str) -> str:
    """What the class is a kind of."""
    (group,) = (g for g, names in CIFAR100_SUPERCLASSES.items() if name in names)
    return HYPERNYMS[group]


def other(name: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """Another of the names."""
    rest = [x for x in names if x != name]
    return rest[rng.integers(len(rest))]


def said_otherwise(
    speaker: Speaker, sets: Sequence[Sequence[int]], kind: str, share: float
) -> tuple[Tensor, Tensor] | None:
    """Embeddings (B, K, E) of sets of K classes, a share of whose names is said otherwise.

    Names that cannot be said so stay as they are; None if hardly any can.

    Returns:
        With them, which were said otherwise: bool (B, K).
    """
    embeddings = speaker.vocabulary.of(sets)[0].clone()
    changed = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    for i, classes in enumerate(sets):
        rng = np.random.default_rng([i, round(100 * share)])
        wanted = int(np.ceil(share * len(classes)))
        for k in rng.permutation(len(classes)).tolist():
            if not wanted:
                break
            said = speaker.kinds[kind](speaker.vocabulary.names[classes[k]], rng)
            if said is not None:
                embeddings[i, k], changed[i, k], wanted = said, True, wanted - 1
    return (embeddings, changed) if changed.any(1).float().mean() > 0.9 else None


def kept(familiarities: Sequence[float], accuracies: Sequence[float]) -> float:
    """Mean accuracy without the least familiar tenth; of equals a random one is left out."""
    familiarity, accuracy = np.array(familiarities), np.array(accuracies)
    count = len(accuracy) - len(accuracy) // 10
    edge = np.sort(familiarity)[-count]
    above = accuracy[familiarity > edge]
    tied = accuracy[familiarity == edge].mean() * (count - len(above))
    return float((above.sum() + tied) / count)


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run on CIFAR-100")
    args = parser.parse_args()
    before = load()
    run = Run.open(args.run)
    generator = run.trained_generator()
    speaker = Speaker(generator=generator, encoder=build_encoder(run.config.prompt), run=run)
    sets, whole = select_lessons(run, SETS)
    lessons = [unseen(run, lesson) for lesson in whole]
    true, mask = generator.vocabulary.of(sets)

    def score(embeddings: Tensor, *, untrained: bool = False) -> list[Array]:
        thetas = prompted(generator, embeddings, mask, denoise=nothing if untrained else None)
        return measure(generator, run.store, lessons, thetas)

    base = score(true)
    found: dict[str, dict[str, object]] = {}
    skipped: list[str] = []
    familiar: list[float] = []
    foreign: list[float] = []
    prompts: list[tuple[float, float]] = []
    for kind in speaker.kinds:
        for share in (*SHARES, 1.0) if kind in PICTURES else SHARES:
            said = said_otherwise(speaker, sets, kind, share)
            if said is None:
                skipped.append(kind)
                break
            embeddings, changed = said
            scores, untrained = score(embeddings), score(embeddings, untrained=True)
            values = generator.vocabulary.familiarity(embeddings)
            found.setdefault(kind, {})[f"{share:.0%}"] = {
                "changed_of_ten": round(10 * float(changed.float().mean()), 1),
                "familiarity": round(float(values[changed].mean()), 3),
                "tina_points": against(scores, base, lessons),
                "tina_minus_untrained_points": round(
                    float((by_set(scores) - by_set(untrained))[:, 0].mean()), 2
                ),
            }
            if kind in PICTURES:  # what comes below is about words
                continue
            prompts += list(
                zip(values.amin(1).tolist(), by_set(scores)[:, 0].tolist(), strict=True)
            )
            if kind != "wrong":  # which is a trained name: nothing could tell
                (foreign if kind == "foreign" else familiar).extend(values[changed].tolist())
    labels = [1] * len(familiar) + [0] * len(foreign)
    figures: dict[str, object] = {
        "encoder": generator.vocabulary.space.model,
        "sets": SETS,
        "true_names": round(float(by_set(base)[:, 0].mean()), 2),
        "kinds": found,
        "not_sayable": skipped,
        "familiarity": {
            "auroc_foreign": round(float(roc_auc_score(labels, familiar + foreign)), 3),
            "accuracy_all_noisy": round(float(np.mean([a for _, a in prompts])), 2),
            "accuracy_without_the_least_familiar_tenth": round(
                kept(*zip(*prompts, strict=True)), 2
            ),
        },
    }
    append("prompts", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
