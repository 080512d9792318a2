"""The zoo: one Parquet row per p-model, with `zoo.json` beside it.

Axes: K classes, n values of theta at the zoo's largest number of classes.

A row depends on its task, the generic model and the recipe alone. `zoo.json` pins those; a folder
with another one is refused, so rows of two recipes never mix.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tina.classifiers import widen
from tina.config import RecipeConfig
from tina.configio import config_to_dict
from tina.datasets import Dataset
from tina.errors import DataError, one_line
from tina.families import Family
from tina.files import read_table, write_text
from tina.finetune import Lesson, OnSteps, accuracy, finetune
from tina.generic import GenericModel
from tina.inputs import InputStore
from tina.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
ZOO = "zoo.json"


def zoo_schema(theta_size: int) -> pa.Schema:
    """Arrow types of a zoo row."""
    import pyarrow as pa

    return pa.schema(
        {
            "task_id": pa.string(),
            "class_ids": pa.list_(pa.int32()),
            "class_names": pa.list_(pa.string()),
            "split": pa.string(),
            "num_classes": pa.int32(),
            "theta": pa.list_(pa.float32(), theta_size),
            "accuracy": pa.float32(),
            "seed": pa.int64(),
            "steps": pa.int32(),
        }
    )


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """P-models read from Parquet, sorted by task id.

    Args:
        theta: (Z, n), at `max_classes`; rows of absent classes are zero.
        accuracy: (Z,), on `select` images.
    """

    task_ids: tuple[str, ...]
    class_ids: tuple[tuple[int, ...], ...]
    splits: tuple[str, ...]
    theta: Tensor
    accuracy: Tensor
    steps: Tensor

    def only(self, split: str) -> Zoo:
        """The rows of one split."""
        return self._rows([i for i, s in enumerate(self.splits) if s == split])

    def of(self, task_ids: Collection[str]) -> Zoo:
        """The rows of these tasks, where there are any."""
        return self._rows([i for i, name in enumerate(self.task_ids) if name in task_ids])

    def _rows(self, keep: Sequence[int]) -> Zoo:
        return Zoo(
            task_ids=tuple(self.task_ids[i] for i in keep),
            class_ids=tuple(self.class_ids[i] for i in keep),
            splits=tuple(self.splits[i] for i in keep),
            theta=self.theta[keep],
            accuracy=self.accuracy[keep],
            steps=self.steps[keep],
        )


def describe_zoo(
    dataset: Dataset, family: Family, generic_hash: str, recipe: RecipeConfig, max_classes: int
) -> dict[str, Any]:
    """What `zoo.json` says; equal descriptions mean equal rows for equal tasks."""
    return {
        "format_version": FORMAT_VERSION,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "family": family.name,
        "max_classes": max_classes,
        "layout": family.layout(max_classes).to_json(),
        "generic": generic_hash,
        "recipe": config_to_dict(recipe),
        "versions": {"torch": version("torch")},
    }


def open_zoo(folder: Path, description: Mapping[str, Any]) -> set[str]:
    """Make a zoo folder, or continue one; returns the task ids that it already holds.

    Raises:
        DataError: The folder holds a zoo of another description.
    """
    file = folder / ZOO
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(description, indent=1))
        return set()
    found = read_table(file, DataError)
    differing = [key for key in description if found.get(key) != description[key]]
    if differing:
        raise DataError(
            f"{folder} holds a zoo of another {', '.join(differing)}: "
            "choose another name or remove it; rows of two recipes are never mixed"
        )
    return set(read_zoo(folder).task_ids) if list(folder.glob("*.parquet")) else set()


def check_images(folder: Path, dataset: Dataset) -> None:
    """Make sure that a zoo, where there is one, was made of a data set as it is now.

    Raises:
        DataError: It was not: other images are cut into other partitions.
    """
    file = folder / ZOO
    if not file.exists():
        return
    if read_table(file, DataError).get("dataset_fingerprint") != dataset.fingerprint:
        raise DataError(
            f"{folder} was made of other images than {dataset.name} has now: "
            "training may have seen those of the report"
        )


def read_zoo(folder: Path) -> Zoo:
    """All rows of a zoo folder, each task once.

    Raises:
        DataError: No rows, unreadable Parquet, or a theta that is not finite.
    """
    table = read_rows(folder)
    try:
        return zoo_of(table)
    except DataError as error:
        raise DataError(f"{folder} holds {error}") from error


def read_rows(folder: Path) -> pa.Table:
    """The rows of a zoo folder as they are.

    Raises:
        DataError: No rows, or unreadable Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no zoo rows: build the zoo first")
    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
        return table.select(zoo_schema(1).names)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DataError(f"{folder} holds an unreadable zoo file: {one_line(error)}") from error


def zoo_of(table: pa.Table) -> Zoo:
    """The rows of a table in any order.

    Raises:
        DataError: No rows, or a theta that is not finite.
    """
    table = table.sort_by("task_id")
    ids = table["task_id"].to_pylist()
    if not ids:
        raise DataError("no zoo rows: build the zoo first")
    # two jobs at once may each have made a task's row: they are the same
    table = table.take([i for i, name in enumerate(ids) if not i or name != ids[i - 1]])
    ids = list(dict.fromkeys(ids))
    flat = table["theta"].combine_chunks().flatten().to_numpy().copy()
    theta = torch.from_numpy(flat).view(len(ids), -1)
    if not bool(torch.isfinite(theta).all()):
        raise DataError("a p-model with NaN or infinite weights")
    return Zoo(
        task_ids=tuple(ids),
        class_ids=tuple(tuple(row) for row in table["class_ids"].to_pylist()),
        splits=tuple(table["split"].to_pylist()),
        theta=theta,
        accuracy=torch.tensor(table["accuracy"].to_pylist()),
        steps=torch.tensor(table["steps"].to_pylist()),
    )


def build_rows(
    tasks: Sequence[Task],
    *,
    family: Family,
    dataset: Dataset,
    store: InputStore,
    generic: GenericModel,
    recipe: RecipeConfig,
    max_classes: int,
    stacked: bool,
    progress: OnSteps = lambda steps: None,
) -> list[dict[str, Any]]:
    """Fine-tune one p-model per task from the generic model; rows as `zoo_schema` says."""
    starts = [
        family.layout(task.num_classes).join(generic.body, generic.select(task.class_ids))
        for task in tasks
    ]
    lessons = [Lesson.of(dataset, task.class_ids, seed=task.seed) for task in tasks]
    thetas = finetune(family, starts, lessons, store, recipe, stacked=stacked, progress=progress)
    rows = []
    for task, theta in zip(tasks, thetas, strict=True):
        k = task.num_classes
        select = Lesson.of(dataset, task.class_ids, seed=task.seed, partition="select")
        rows.append(
            {
                "task_id": task.task_id,
                "class_ids": list(task.class_ids),
                "class_names": list(task.class_names),
                "split": task.split,
                "num_classes": k,
                "theta": widen(family, theta, k, max_classes).cpu().numpy(),
                "accuracy": accuracy(family, theta, store, select),
                "seed": task.seed,
                "steps": recipe.steps,
            }
        )
    return rows
