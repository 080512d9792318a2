"""A run's folder: where each stage leaves what the next one needs.

<storage>/<name>/, a folder or a place in an object store (`tina.storage`):
    config.yaml            the resolved configuration
    generic.safetensors    the generic model, with its trunk
    tower.safetensors      the image tower, where prompts have one
    features-*.safetensors what its trunk makes of the images
    zoo/  direct/          p-models; direct fine-tuning of held-out tasks and their twins
    start/                 the untrained generator: classifier selection
    train/ tensorboard/    resumable training states; curves
    trained/               the trained generator
    report.json  plots/    the evaluation
    checkpoint/            the trained generator with its measured numbers, written last
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tina.batches import BatchSource
from tina.checkpoint import attach_clip, load_generator, save_generator
from tina.claim import CONFIG, claim, give_up
from tina.codec import fit_codec
from tina.config import RecipeConfig
from tina.configio import config_to_dict, read_config
from tina.curvature import measure_curvature
from tina.datasets import Dataset, load_dataset
from tina.encoders import build_encoder
from tina.errors import ConfigError, DataError
from tina.evaluation import Cell, Evaluation, Spread
from tina.families import Family, build_family, useful_side
from tina.files import hash_bytes, hash_file, write_text
from tina.fitting import task_space
from tina.generator import Generator, new_denoiser
from tina.generic import GenericModel, check_trained_on, load_generic
from tina.inputs import InputStore, features_name
from tina.jobconfig import JobConfig, TrainConfig
from tina.lent import borrow
from tina.metrics import Score
from tina.novelty import novelty, timing, twin
from tina.plots import plot_report
from tina.prompts import Vocabulary, check_distinct
from tina.provenance import commit, hardware
from tina.report import model_card
from tina.storage import Place
from tina.stores import below, split
from tina.tasks import Task, TaskSpace
from tina.tensors import pack_tensors
from tina.tower import Tower, tower_family
from tina.validation import validator
from tina.zoo import Zoo, check_images, describe_zoo, read_zoo

CURVATURE_TASKS = 100
"""Tasks whose mean curvature the codec is made of."""


class Run:
    """One configuration and its folder; what is loaded is loaded once, when asked for.

    Args:
        base: Place of another run, whose generic model and zoo this one uses.
    """

    def __init__(self, config: JobConfig, base: Place | None = None) -> None:
        self.config = config
        self.place = Place(below(config.storage, config.name))
        self.base = base or self.place
        self._claimed: int | None = None

    @classmethod
    def open(cls, location: str | Path) -> Run:
        """The run that a folder or a place in an object store holds.

        Raises:
            ConfigError: It holds none.
        """
        place = Place(location)
        file = place.fetch(CONFIG)
        if not file.is_file():
            raise ConfigError(f"{location} holds no run: it has no {CONFIG}")
        storage, name = split(str(location))
        with place.named():
            config = read_config(JobConfig, file)
        return cls(replace(config, storage=storage, name=name))  # it may have been moved since

    @property
    def folder(self) -> Path:
        """Where this process reads and writes the run's files."""
        return self.place.folder

    @property
    def generic_file(self) -> Path:
        """The generic model."""
        return self.base.fetch("generic.safetensors")

    @property
    def tower_file(self) -> Path:
        """The image tower."""
        return self.base.fetch("tower.safetensors")

    @property
    def start(self) -> Path:
        """The untrained generator."""
        return self.place.fetch("start", whole=True)

    @property
    def trained(self) -> Path:
        """The trained generator."""
        return self.place.fetch("trained", whole=True)

    @property
    def checkpoint(self) -> Path:
        """The trained generator with its measured numbers."""
        return self.place.fetch("checkpoint", whole=True)

    @property
    def report_file(self) -> Path:
        """The evaluation's figures."""
        return self.place.fetch("report.json")

    def claim(self) -> None:
        """Make the folder this configuration's, every `precision: auto` settled; see `tina.claim`.

        Raises:
            ConfigError: It was made with another.
        """
        self.config, self._claimed = claim(self.config, self.place)

    def give_up(self) -> None:
        """Leave the name to a mended configuration, where this one has come to nothing."""
        give_up(self.place, self._claimed)

    @cached_property
    def all_views(self) -> Dataset:
        """The images with every view that the configuration asks for."""
        return load_dataset(self.config.data, largest=useful_side(self.config.classifier.family))

    @cached_property
    def dataset(self) -> Dataset:
        """The images with the views that the generated network is trained on.

        Features of a frozen trunk are kept, one row per view, so moved images are for trunks alone.
        """
        return self.all_views.unmoved() if self.family.has_trunk else self.all_views

    @cached_property
    def space(self) -> TaskSpace:
        """The tasks."""
        return task_space(self.dataset, self.config.tasks)

    @cached_property
    def family(self) -> Family:
        """The classifier family; a CLIP trunk is attached, a trained one comes with `generic`."""
        _, channels, size, _ = self.all_views.images.shape
        family = build_family(self.config.classifier.family, channels=channels, image_size=size)
        attach_clip(family, self.config.prompt)
        return family

    @cached_property
    def generic(self) -> GenericModel:
        """The generic model; must have been trained."""
        return load_generic(self.generic_file, self.family)

    @cached_property
    def tower(self) -> Tower | None:
        """The image tower, where prompts have one.

        Raises:
            DataError: It has not been trained.
        """
        if not self.config.prompt.tower:
            return None
        if not self.tower_file.exists():
            raise DataError(f"{self.base.location} has no image tower: run ray_jobs.build_zoo")
        family = tower_family(self.family)
        return Tower(family=family, generic=load_generic(self.tower_file, family))

    @cached_property
    def store(self) -> InputStore:
        """All images as the generated network takes them."""
        return self.inputs("cpu")

    def inputs(self, device: str) -> InputStore:
        """The same on a device."""
        assert self.generic  # brings the trunk
        return self.shown(device)

    def shown(self, device: str) -> InputStore:
        """All images as the family's trunk, which must be attached, shows them on a device."""
        family, data = self.family, self.dataset
        file = self.base.fetch(features_name(family, data, self.config.prompt))
        missing = family.has_trunk and not file.exists()
        store = InputStore(family, data.views, device=device, features=file)
        if missing:
            self.base.keep(file.name)
        return store

    def zoo_tasks(self, kind: str) -> list[Task]:
        """Tasks of the `zoo` or the `direct` folder.

        Direct fine-tuning runs on the first held-out tasks of each axis; an eighth of them, at
        least two, have a twin for the novelty figures.
        """
        if kind == "zoo":
            return [*self.space.train, *self.space.val]
        evaluation = self.config.evaluation
        held_out = dict(self.space.held_out)
        tasks = list(held_out.pop("unseen_combination")[: evaluation.direct_tasks])
        twins = [twin(task) for task in tasks[: max(2, len(tasks) // 8)]]
        for others in held_out.values():
            tasks += others[: evaluation.direct_tasks_elsewhere]
        return tasks + twins

    def recipe(self, kind: str) -> RecipeConfig:
        """Recipe of the `zoo` or the `direct` folder."""
        classifier = self.config.classifier
        return classifier.finetune if kind == "zoo" else classifier.direct

    def describe_zoo(self, kind: str) -> dict[str, Any]:
        """What `zoo.json` of a folder says."""
        generic, most = hash_file(self.generic_file), self.config.tasks.max_classes
        return describe_zoo(self.dataset, self.family, generic, self.recipe(kind), most)

    def check_data(self) -> None:
        """Make sure that `report` images were in no training: others are drawn from other data.

        Raises:
            DataError: The data set is not the one that all else was made of.
        """
        self.check_images()
        for kind in ("zoo", "direct"):
            check_images(self.base.fetch(kind), self.dataset)

    def check_images(self) -> None:
        """Make sure that this machine's are those that the generic model was trained on.

        Raises:
            DataError: They are others, and would be parted otherwise.
        """
        for file in (self.generic_file, self.tower_file):
            check_trained_on(file, self.dataset)

    def read_zoo(self, kind: str) -> Zoo:
        """The rows of a folder."""
        return read_zoo(self.base.fetch(kind))

    def check_prompts(self) -> None:
        """Make sure before anything is trained that the class names can be embedded.

        Raises:
            ConfigError, DataError, PromptError: They cannot, or two of them are one.
        """
        names = self.dataset.class_names
        check_distinct(names, build_encoder(self.config.prompt).encode_text(names))

    def new_generator(self) -> Generator:
        """The untrained generator, its codec fitted to the generic model's curvature."""
        config, encoder = self.config.generator, build_encoder(self.config.prompt)
        names, trained = self.dataset.class_names, self.generic.class_ids
        vocabulary = Vocabulary.by(encoder, names, trained)
        if self.family.on_imagenet:
            vocabulary = borrow(vocabulary, encoder, classes=len(names))
        layout = self.family.layout(self.config.tasks.max_classes)
        seed = self.config.train.seed
        curvature = measure_curvature(
            self.family,
            self.generic,
            self.dataset,
            self.store,
            self.space.sample_fresh(np.random.default_rng(seed), CURVATURE_TASKS),
            seed=seed,
        )
        codec = fit_codec(layout, curvature, chunk=config.denoiser.chunk)
        return Generator(
            config=config,
            dataset=self.dataset.name,
            family=self.family,
            codec=codec,
            vocabulary=vocabulary,
            generic=self.generic,
            denoiser=new_denoiser(config, codec, dim=vocabulary.space.dim, seed=seed),
            max_classes=layout.num_classes,
            tower=self.tower,
        )

    def trained_generator(self) -> Generator:
        """The trained generator; what training does not read of it is as it is configured now.

        Raises:
            DataError: It is to have an image tower, and there is none.
        """
        found, config = load_generator(self.trained), self.config.generator
        config = replace(config, prompt=config.prompt.settled(found.config.prompt))
        return found if found.config == config else replace(found, config=config, tower=self.tower)

    def source(
        self, generator: Generator, config: TrainConfig, zoo: Zoo | None = None
    ) -> BatchSource:
        """Training batches for a generator; the zoo is read here unless it is given."""
        return BatchSource(
            generator=generator,
            config=config,
            zoo=(zoo or self.read_zoo("zoo")).only("train"),
            space=self.space,
            dataset=self.dataset,
            store=self.store,
        )

    def validator(
        self, generator: Generator
    ) -> Callable[[Mapping[str, Tensor] | None], list[float]]:
        """See `tina.validation`."""
        return validator(generator, self.dataset, self.store, self.space.val)

    def evaluation(self, generator: Generator) -> Evaluation:
        """What a generator is measured by.

        Raises:
            DataError: The images are not those that the zoo learned from.
        """
        self.check_data()
        wanted = {task.task_id for task in self.zoo_tasks("direct")}
        return Evaluation(
            generator=generator,
            config=self.config.evaluation,
            dataset=self.dataset,
            space=self.space,
            zoo=self.read_zoo("zoo"),
            # an earlier evaluation may have asked for more
            direct=self.read_zoo("direct").of(wanted),
            store=self.store,
            regressor=self.regressor(),
        )

    def regressor(self) -> Generator | None:
        """The generator of the run that `evaluation.regressor` names, if it names one.

        Raises:
            ConfigError: There is none, or it differs from this run in more than the noise.
        """
        if not (name := self.config.evaluation.regressor):
            return None
        other = Run.open(below(self.config.storage, name))
        mine, its = config_to_dict(self.config), config_to_dict(other.config)
        keys = ("data", "tasks", "classifier", "prompt", "denoiser", "train")
        if odd := ", ".join(key for key in keys if mine[key] != its[key]):
            raise ConfigError(f"evaluation.regressor {name} has another {odd} than this run")
        if other.config.diffusion.schedule != "none" or not other.trained.is_dir():
            raise ConfigError(f"evaluation.regressor {name} is no trained run of schedule none")
        found = other.trained_generator()
        if self.generic_file.exists() and not torch.equal(found.generic.rows, self.generic.rows):
            raise ConfigError(f"evaluation.regressor {name} began with another generic model")
        return found

    def evaluate(
        self,
        generator: Generator,
        *,
        spread: Spread = Evaluation.score_here,
        on_progress: Callable[[int, int], object] = lambda done, cells: None,
    ) -> dict[str, Any]:
        """Measure a generator and write `report.json` and the plots.

        Args:
            spread: Where the cells are scored.
            on_progress: Called with the number of cells that are scored, and of all.
        """
        evaluation = self.evaluation(generator)
        scores: dict[Cell, list[Score]] = {}
        for cell, found in spread(evaluation):
            scores[cell] = found
            on_progress(len(scores), len(evaluation.cells))
        report = evaluation.report(
            scores,
            checkpoint=hash_bytes(pack_tensors(generator.denoiser.state_dict())),
            commit=commit(),
            hardware=hardware(gpu=False),  # reports are made on processors
            novelty=novelty(evaluation),
            timing=timing(evaluation),
        )
        write_text(self.report_file, json.dumps(report, indent=1))
        plot_report(report, self.folder / "plots")
        self.place.keep("plots", "report.json")
        return report

    def release(self, generator: Generator, report: Mapping[str, Any]) -> None:
        """Write the checkpoint directory, its model card carrying the report's numbers."""
        card = model_card(self.config.name, generator, report)
        save_generator(generator, self.checkpoint, card=card)
        self.place.keep("checkpoint")
