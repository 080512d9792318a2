"""The generic model: trained once on all seen classes; every p-model and prompt inherits from it.

Axes: B batch, K classes of a task, V seen classes, n_body parameters before the head, R values of a
head row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from tina.backbone import ImageNetTrunk
from tina.config import RecipeConfig
from tina.datasets import Dataset
from tina.errors import DataError, one_line
from tina.families import Family
from tina.finetune import Lesson, OnSteps, finetune, initial_theta, train_trunk
from tina.inputs import InputStore
from tina.tensors import write_tensors
from tina.views import Views

IMAGES = "images"
"""In the file's metadata: the fingerprint of the data set."""
NECK_IMAGES = 64
"""Of each class, for a neck's mean and size."""


@dataclass(frozen=True, kw_only=True)
class GenericModel:
    """The classifier trained on all classes that are not excluded.

    Args:
        class_ids: The V seen classes, in the order of the rows.
        body: (n_body,).
        rows: (V, R).
    """

    class_ids: tuple[int, ...]
    body: Tensor
    rows: Tensor

    def select(self, class_ids: Sequence[int]) -> Tensor:
        """Classifier selection: the classes' own rows (K, R), the mean row for an unseen class."""
        place = {c: i for i, c in enumerate(self.class_ids)}
        mean = self.rows.mean(0)
        return torch.stack([self.rows[place[c]] if c in place else mean for c in class_ids])


def train_generic(
    family: Family,
    dataset: Dataset,
    class_ids: Sequence[int],
    recipe: RecipeConfig,
    *,
    seed: int,
    inputs: Callable[[], InputStore] | None = None,
    progress: OnSteps = lambda steps: None,
) -> GenericModel:
    """Train on all `fit` images of the given classes; first the trunk that a family trains.

    Args:
        dataset: With all views; a trunk is trained on every one, what follows it on unmoved ones.
        inputs: Gives all unmoved images as the trunk shows them, once it is there; default: it is
            shown what is trained on.

    Raises:
        NonFiniteError: Training diverged.
    """
    if family.trains_trunk:
        if family.on_imagenet:
            trunk = fit_trunk(family, dataset, class_ids)
        else:
            trunk = train_trunk(family, dataset, class_ids, recipe, seed=seed, progress=progress)
        family.attach_trunk(trunk)
        dataset = dataset.unmoved()
    lesson, views = Lesson.of(dataset, class_ids, seed=seed), dataset.views
    if family.has_trunk and not inputs:  # it need not see what is not trained on
        views = Views(images=views[lesson.index])
        lesson = replace(lesson, index=torch.arange(len(views)))
    store = inputs() if inputs else InputStore(family, views)
    theta = initial_theta(family, len(class_ids), seed=seed)
    (theta,) = finetune(family, [theta], [lesson], store, recipe, stacked=False, progress=progress)
    body, rows = family.layout(len(class_ids)).split(theta)
    return GenericModel(class_ids=tuple(class_ids), body=body, rows=rows)


@torch.no_grad()
def fit_trunk(family: Family, dataset: Dataset, class_ids: Sequence[int]) -> nn.Module:
    """A trunk that was trained elsewhere, its neck fitted to the first images of each class."""
    trunk = family.new_trunk().eval()
    assert isinstance(trunk, ImageNetTrunk)
    bar = tqdm(class_ids, desc="neck", unit="class", delay=2, mininterval=1)
    places = (
        part for c in bar for part in dataset.indices("fit", [c])[:NECK_IMAGES].split(family.batch)
    )
    trunk.neck.fit(torch.cat([trunk.pooled(family.scale(dataset.views[part])) for part in places]))
    return trunk


def save_generic(file: Path, generic: GenericModel, family: Family, dataset: Dataset) -> None:
    """Write a generic model, and the trunk that was trained with it.

    Args:
        dataset: What it was trained on.
    """
    write_tensors(file, as_tensors(generic, family), {IMAGES: dataset.fingerprint})


def as_tensors(generic: GenericModel, family: Family) -> dict[str, Tensor]:
    """A generic model by name, with the trunk that was trained with it."""
    class_ids = torch.tensor(generic.class_ids)
    return family.with_trunk({"body": generic.body, "rows": generic.rows, "class_ids": class_ids})


def of_tensors(tensors: Mapping[str, Tensor], family: Family) -> GenericModel:
    """Inverse of `as_tensors`; attaches the trunk to the family.

    Raises:
        KeyError: One is missing.
        RuntimeError: The trunk's are another's.
    """
    own = family.take_trunk(tensors)
    class_ids = tuple(own["class_ids"].long().tolist())
    return GenericModel(class_ids=class_ids, body=own["body"], rows=own["rows"])


def check_trained_on(file: Path, dataset: Dataset) -> None:
    """Make sure that a generic model, where there is one, was trained on a data set as it is now.

    Raises:
        DataError: It was not: other images are cut into other partitions. Or it is unreadable.
    """
    if not file.exists():
        return
    try:
        with safe_open(file, "pt") as opened:
            found = (opened.metadata() or {}).get(IMAGES)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a readable generic model: {error}") from error
    if found != dataset.fingerprint:
        raise DataError(
            f"{file} was trained on other images than {dataset.name} has now, perhaps on those of "
            "the report: choose another name, or remove the run"
        )


def load_generic(file: Path, family: Family) -> GenericModel:
    """Read what `save_generic` wrote; attaches the trunk to the family.

    Raises:
        DataError: Unreadable file, or another family's trunk.
    """
    try:
        return of_tensors(load_file(file), family)
    except (SafetensorError, KeyError, OSError, RuntimeError) as error:
        raise DataError(f"{file} is not a readable generic model: {one_line(error)}") from error
