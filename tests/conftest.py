"""A tiny real run on the embedded digits, made once per session: no download, no GPU, no Ray."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.families import family_of
from tina.checkpoint import save_generator
from tina.config import ClassifierConfig, DenoiserConfig, DiffusionConfig, RecipeConfig
from tina.configio import config_to_dict
from tina.engine import LocalEngine
from tina.families import FAMILIES, Family
from tina.files import write_whole
from tina.generator import Generator
from tina.generic import save_generic, train_generic
from tina.jobconfig import DataConfig, EvaluationConfig, JobConfig, TaskConfig, TrainConfig
from tina.run import Run
from tina.training import Progress, train
from tina.zoo import build_rows, open_zoo, zoo_schema

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, where it is at hand."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data sets beside the project, at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module")
def port() -> int:
    """One that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return family_of(request.param)


def tiny_config(storage: Path, **changes: object) -> JobConfig:
    """A run that takes seconds; its numbers mean nothing."""
    short = RecipeConfig(steps=20, batch_size=16, lr=3e-3)
    values: dict[str, object] = {
        "name": "tiny",
        "storage": str(storage),
        "data": DataConfig(name="digits"),
        "tasks": TaskConfig(min_classes=2, max_classes=4, train=8, val=2, held_out=4),
        "classifier": ClassifierConfig(
            family="cnn5k",
            generic=RecipeConfig(steps=150, batch_size=32, lr=1e-2),
            finetune=short,
            direct=short,
        ),
        "denoiser": DenoiserConfig(width=32, depth=2, heads=2),
        "diffusion": DiffusionConfig(timesteps=100, sampling_steps=4),
        "train": TrainConfig(
            steps=12,
            zoo_batch=4,
            fresh_tasks=2,
            images_per_task=16,
            checkpoint_every=4,
        ),
        "evaluation": EvaluationConfig(
            direct_tasks=2,
            seeds=2,
            bootstrap=50,
            images_per_class=5,
            sampling_steps=(1, 4),
            mixer_steps=3,
        ),
    }
    return JobConfig(**values | changes)  # type: ignore[arg-type]


def write_rows(run: Run, kind: str) -> None:
    """What the build_zoo job does, without Ray."""
    folder = run.folder / kind
    open_zoo(folder, run.describe_zoo(kind))
    rows = build_rows(
        run.zoo_tasks(kind),
        family=run.family,
        dataset=run.dataset,
        store=run.store,
        generic=run.generic,
        recipe=run.recipe(kind),
        max_classes=run.config.tasks.max_classes,
        stacked=False,
    )
    schema = zoo_schema(run.family.layout(run.config.tasks.max_classes).size)
    table = pa.Table.from_pylist(rows, schema=schema)
    write_whole(folder / "part-0.parquet", partial(pq.write_table, table))


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny run's configuration as a YAML file, with its storage in `tmp_path / "runs"`."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(tiny_config(tmp_path / "runs"))))
    return file


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a generic model, a zoo and direct fine-tuning. Do not write into its folder."""
    run = Run(tiny_config(tmp_path_factory.mktemp("runs")))
    run.claim()
    recipe = run.config.classifier.generic
    generic = train_generic(run.family, run.dataset, run.space.seen, recipe, seed=0)
    save_generic(run.generic_file, generic, run.family, run.dataset)
    write_rows(run, "zoo")
    write_rows(run, "direct")
    return run


@pytest.fixture(scope="session")
def tiny_generator(tiny_run: Run) -> Generator:
    """A generator after a few real training steps. Do not change its weights."""
    generator = tiny_run.new_generator()
    config = tiny_run.config.train
    train(
        config,
        engine=LocalEngine(generator.denoiser, config),
        source=tiny_run.source(generator, config),
        start=Progress.start(generator.denoiser),
        report=lambda progress, figures: None,
        validate=lambda weights: partial(tiny_run.validator(generator), weights),
    )
    generator.denoiser.eval().requires_grad_(False)
    return generator


@pytest.fixture(scope="session")
def tiny_regressor(tiny_generator: Generator) -> Generator:
    """The same network, asked for one step from zeros."""
    diffusion = DiffusionConfig(schedule="none", timesteps=1, sampling_steps=1)
    return replace(tiny_generator, config=replace(tiny_generator.config, diffusion=diffusion))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint directory. Copy it before you change a byte."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_generator(tiny_generator, directory, card="A tiny checkpoint for tests.\n")
    return directory


def kept_out(generator: Generator, names: list[str]) -> Generator:
    """As if nothing had been trained on these classes; on all others it was."""
    known = [name not in names for name in generator.vocabulary.names]
    rest = [i for i, kept in enumerate(known) if kept]
    generic = replace(
        generator.generic,
        class_ids=tuple(generator.generic.class_ids[i] for i in rest),
        rows=generator.generic.rows[rest],
    )
    vocabulary = replace(generator.vocabulary, trained=torch.tensor(known))
    return replace(generator, vocabulary=vocabulary, generic=generic)


class Local:
    """A replica of the endpoint's generator without Ray between: its problems are raised."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    def __getattr__(self, name: str) -> Any:
        async def call(*args: object) -> Any:
            from serve.problems import Problem

            found = await getattr(self.replica, name)(*args)
            if isinstance(found, Problem):
                raise found
            return found

        return call


@pytest.fixture(scope="session")
def backend(tiny_checkpoint: Path) -> Local:
    """What the HTTP calls stand on, in this process."""
    from serve.replica import Replica

    options = {
        "threads": 1,
        "max_batch": 16,
        "max_steps": 100,
        "cache_bytes": 2**20,
        "threshold": 0.5,
    }
    return Local(Replica(str(tiny_checkpoint), device="cpu", **options))
