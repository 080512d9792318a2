"""What each rank of a training does, and the actor that judges its states beside it.

Ray Train runs `train_on_rank` in its workers, each with a DeepSpeed engine of its own.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_jobs.engine import DeepSpeedEngine
from ray_jobs.process import settle_in
from ray_jobs.tracking import NOWHERE, open_tracking
from tina.checkpoint import load_generator
from tina.engine import Weights
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.storage import Place
from tina.training import Progress, Validate, train
from tina.zoo import zoo_of

PROGRESS = "progress.safetensors"
LOG_EVERY = 10  # steps
VALIDATED = {"val_accuracy", "val_step"}  # figures of a report that are an earlier state's
MOST_VALIDATED = 32  # trainings whose untrained generator a judge keeps


class Judge:
    """An actor that validates beside trainings: their ranks do not wait for it.

    It keeps nothing that it cannot load again, so one that is lost starts anew and is asked again.
    All that it is asked of have the same images and validation tasks.
    """

    def __init__(self) -> None:
        settle_in(threads=1)
        self._lender: Run | None = None
        self._validator = lru_cache(MOST_VALIDATED)(self._new_validator)

    def accuracies(self, config: JobConfig, base: Place, weights: Weights) -> list[float]:
        """Per validation task, accuracy on its `select` images of what the weights generate."""
        return self._validator(config, base)(weights)

    def _new_validator(
        self, config: JobConfig, base: Place
    ) -> Callable[[Weights | None], list[float]]:
        run = Run(config, base)
        if self._lender is None:
            run.check_images()
            self._lender = run
        return self._lender.validator(load_generator(run.start))


def start_judge() -> Any:
    """A judge that lives as long as its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    judge = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1)(Judge)
    # an actor that asks for nothing may land anywhere, on a small head that takes no work too
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return judge.options(scheduling_strategy=here).remote()


def train_on_rank(settings: dict[str, Any]) -> None:
    """What each worker of Ray Train runs."""
    import ray
    import ray.train

    config, base = settings["config"], settings["base"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    cpus = config.cluster.train_cpus
    gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # its node may have GPUs that are not for it
    settle_in(threads=None if gpu else max(1, int(cpus)))
    for chatty in ("ray.train", "ray.data"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    run = Run(config, base)
    run.check_images()
    zoo = None
    if settings["judge"] is None:
        shard = ray.train.get_dataset_shard("zoo")
        tables = list(shard.iter_batches(batch_size=None, batch_format="pyarrow"))
        zoo = zoo_of(pa.concat_tables(tables))
    generator = load_generator(run.start)
    denoiser = generator.denoiser.train().requires_grad_(True)
    denoiser.checkpointing = config.cluster.activation_checkpointing
    start = Progress.start(denoiser)
    if latest := ray.train.get_checkpoint():
        with latest.as_directory() as folder:
            engine = DeepSpeedEngine(denoiser, config, resume=Path(folder))
            start = Progress.load(Path(folder) / PROGRESS)
    else:
        engine = DeepSpeedEngine(denoiser, config, resume=None)
    log, save, close = open_tracking(run, start=start.step) if rank == 0 else NOWHERE
    show = progress_bar(config.train.steps, start.step) if rank == 0 else lambda step: None

    def report(progress: Progress, figures: dict[str, float]) -> None:
        folder = tempfile.mkdtemp()  # Ray removes it after an upload that nobody waits for
        engine.save(Path(folder))
        if rank == 0:
            progress.save(Path(folder) / PROGRESS)
        ray.train.report(
            {"step": progress.step, **figures},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
        log(progress.step, {k: v for k, v in figures.items() if k not in VALIDATED})
        save()

    def on_validated(step: int, accuracy: float) -> None:
        log(step, {"val_accuracy": accuracy})

    def on_step(step: int, figures: Mapping[str, float]) -> None:
        show(step)
        if step % LOG_EVERY == 0:
            log(step, {f"{name}_of_step": value for name, value in figures.items()})

    train(
        config.train,
        engine=engine,
        source=run.source(generator, config.train, zoo),
        start=start,
        report=report,
        validate=begin_validation(settings["judge"], config, base) if rank == 0 else None,
        rank=rank,
        world=world,
        on_step=on_step,
        on_validated=on_validated,
    )
    close()


def begin_validation(judge: Any, config: JobConfig, base: Place) -> Validate:
    """A validation that runs in a given actor, or in one of its own."""
    import ray

    judge = judge or start_judge()

    def begin(weights: Weights) -> Callable[[], list[float]]:
        result = judge.accuracies.remote(config, base, dict(weights))
        return lambda: list(ray.get(result))

    return begin


def progress_bar(steps: int, done: int) -> Callable[[int], None]:
    """A bar of fifty strokes: each costs a line wherever the output is not a terminal."""
    from ray.experimental import tqdm_ray

    bar = tqdm_ray.tqdm(total=steps, desc="generator")
    bar.update(done)
    shown = done

    def show(step: int) -> None:
        nonlocal shown
        if step == steps or step - shown >= steps / 50:
            bar.update(step - shown)
            shown = step
        if step == steps:
            bar.close()

    return show
