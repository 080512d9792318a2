"""How good a classifier is on a user's own pictures, which lie in a folder for each class.

Axes: K classes, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from tina.classifiers import Classifier
from tina.errors import DataError
from tina.images import read_image
from tina.names import normalise_name, readings
from tina.sources import image_files


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a classifier answered to labelled pictures.

    Args:
        class_names: Its K classes.
        answers: int64 (K, K): how many pictures of class i it took for class j.
        confidence: Mean probability of its answers, 0..1.
        others: Folders that are none of its classes, at which it was not asked to look.
        unread: Of each picture that could not be read, why.
    """

    class_names: tuple[str, ...]
    answers: Tensor
    confidence: float
    others: tuple[str, ...]
    unread: tuple[DataError, ...]

    @property
    def missing(self) -> list[str]:
        """Classes that no picture was of."""
        counts = self.answers.sum(1).tolist()
        return [name for name, n in zip(self.class_names, counts, strict=True) if not n]

    def plain(self) -> dict[str, Any]:
        """All of it as JSON has it: shares 0..1, intervals of 95 % (Wilson 1927)."""
        counts, right = self.answers.sum(1), self.answers.diagonal()
        shown = counts > 0
        return {
            **_share(int(right.sum()), int(counts.sum())),
            "mean_of_classes": float((right[shown].double() / counts[shown]).mean()),
            "by_chance": 1 / len(self.class_names),
            "confidence": self.confidence,
            "classes": {
                name: _share(int(r), int(n)) | {"answers": self._answers(row)}
                for name, r, n, row in zip(
                    self.class_names, right, counts, self.answers, strict=True
                )
            },
            "others": list(self.others),
            "unread": list(map(str, self.unread)),
        }

    def __str__(self) -> str:
        found = self.plain()
        width = max(len("class"), *map(len, self.class_names))
        lines = [f"{'class':<{width}}  pictures   right  95 % interval  taken for"]
        for name, of in found["classes"].items():
            if of["pictures"]:
                wrong = [f"{other} {n}" for other, n in of["answers"].items() if other != name]
                share = f"{of['accuracy']:6.1%}  {_ends(of):<13}  {', '.join(wrong)}"
                lines.append(f"{name:<{width}}  {of['pictures']:8}  {share}".rstrip())
        lines.append(
            f"{found['accuracy']:.1%} of {found['pictures']} pictures are told right "
            f"(95 % interval {_ends(found)}), {found['mean_of_classes']:.1%} in the mean of the "
            f"classes, by chance {found['by_chance']:.1%}; it was {found['confidence']:.1%} sure"
        )
        return "\n".join(lines)

    def _answers(self, row: Tensor) -> dict[str, int]:
        """Counts (K,) by name, the largest first, without those of 0."""
        found = zip(self.class_names, row.tolist(), strict=True)
        return dict(sorted(((name, n) for name, n in found if n), key=lambda x: -x[1]))


def _share(right: int, pictures: int) -> dict[str, Any]:
    if not pictures:
        return {"pictures": 0, "accuracy": None, "ci95": None}
    interval = binomtest(right, pictures).proportion_ci(method="wilson")
    return {
        "pictures": pictures,
        "accuracy": right / pictures,
        "ci95": [float(interval.low), float(interval.high)],
    }


def score(classifier: Classifier, folder: str | Path) -> Scored:
    """Ask a classifier for the class of every picture in a folder with a sub-folder per class.

    A sub-folder is called as the class is, give or take what a prompt may too (`tina.names`).

    Raises:
        DataError: It is no folder, has no pictures of the classifier's classes, or none that can be
            read.
    """
    found, others = labelled(Path(folder), classifier.class_names)
    answers = torch.zeros(
        len(classifier.class_names), len(classifier.class_names), dtype=torch.long
    )
    sure, unread = 0.0, []
    for file, label in tqdm(found, unit="picture", delay=2, disable=None):
        try:
            image = read_image(file, channels=classifier.family.channels)
        except DataError as error:  # the others can be looked at all the same
            unread.append(error)
            continue
        with torch.no_grad():
            top = classifier(image)[0].softmax(0).max(0)
        answers[label, top.indices] += 1
        sure += float(top.values)
    if len(unread) == len(found):
        raise DataError(f"none of {len(found)} pictures in {folder} can be read: {unread[0]}")
    return Scored(
        class_names=classifier.class_names,
        answers=answers,
        confidence=sure / (len(found) - len(unread)),
        others=others,
        unread=tuple(unread),
    )


def labelled(
    folder: Path, class_names: Sequence[str]
) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Picture files of the classes with the places of these, and the folders that are no class's.

    Raises:
        DataError: There is no such folder, or no picture of any class.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    # as it is written comes before any reading: "boot" and "boots" may be two classes
    exact = {normalise_name(name): place for place, name in enumerate(class_names)}
    read = {word: place for name, place in exact.items() for word in readings(name)} | exact
    found, others = [], []
    for name, files in image_files(folder).items():
        label = next((read[word] for word in readings(name) if word in read), None)
        if label is None:
            others.append(name)
        else:
            found += [(file, label) for file in files]
    if not found:
        has = f"it has {', '.join(others)}" if others else "it has none with pictures"
        wanted = ", ".join(class_names)
        raise DataError(f"{folder} needs sub-folders called as the classes are, {wanted}: {has}")
    return found, tuple(others)


def _ends(share: Mapping[str, Any]) -> str:
    low, high = share["ci95"]
    return f"{100 * low:.0f} to {100 * high:.0f} %"
