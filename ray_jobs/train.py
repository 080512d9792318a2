"""Train the generator on Ray Train, each rank driving a DeepSpeed engine.

Run again with the same name: the latest state is continued, with the same result at the same number
of ranks, and with the same samples at another.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import torch

from ray_jobs.engine import WORLD, DeepSpeedEngine, read_world
from ray_jobs.job import on_gpu, require, run_job, start_ray
from ray_jobs.process import settle_in
from ray_jobs.tracking import NOWHERE, check_tracking, open_tracking
from tina.calibration import calibrate
from tina.checkpoint import load_generator, save_generator
from tina.engine import Weights
from tina.errors import ConfigError, DataError
from tina.generator import Generator
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.storage import Place
from tina.stores import Store, below
from tina.training import Progress, Validate, train
from tina.zoo import ZOO, open_zoo, read_rows, zoo_of

if TYPE_CHECKING:
    from ray.train import Checkpoint, UserCallback
    from ray.train.torch import TorchTrainer

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
        self._lender = self._lender or run
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
    settle_in(threads=None if torch.cuda.is_available() else max(1, int(cpus)))
    for chatty in ("ray.train", "ray.data"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    run = Run(config, base)
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


def check_ready(run: Run) -> None:
    """Make sure before anything starts that it can be trained.

    Raises:
        ConfigError: The cluster cannot hold the ranks, or a tracker is not installed.
    """
    if not run.trained.exists():
        check_tracking(run)
        require_ranks(run)


def require_ranks(run: Run) -> dict[str, float]:
    """Resources of a rank, of which the cluster holds enough.

    Raises:
        ConfigError: It does not.
    """
    cluster = run.config.cluster
    each = {"CPU": cluster.train_cpus} | ({"GPU": 1.0} if on_gpu() else {})
    require(cluster.train_workers, each, key="cluster.train_workers", wait_s=cluster.wait_s)
    return each


def check_zoo(run: Run) -> None:
    """Make sure that a run's zoo is there, whole and its own.

    Raises:
        DataError: It is not.
    """
    folder = run.base.fetch("zoo")
    if not (folder / ZOO).is_file():
        raise DataError(f"{run.base.location} holds no zoo: run ray_jobs.build_zoo first")
    done = open_zoo(folder, run.describe_zoo("zoo"))
    tasks = [task.task_id for task in run.zoo_tasks("zoo")]
    if missing := len(set(tasks) - done):
        raise DataError(
            f"{run.base.below('zoo').location} lacks {missing} of {len(tasks)} p-models: "
            "run ray_jobs.build_zoo again"
        )


def last_state(run: Run) -> Checkpoint | None:
    """The latest state of a training, if it has come to one.

    Raises:
        DataError: Ray cannot read its list of them, which it writes in place.
    """
    from ray.train import Result
    from ray.train.v2._internal.exceptions import RayTrainError

    try:
        place = run.place.for_ray("train")
        checkpoint = Result.from_path(place.pop("storage_path"), **place).checkpoint
    except RuntimeError:  # it ended before its first
        return None
    except RayTrainError as error:
        raise DataError(
            f"Ray cannot read which states {run.place.below('train').location} holds; a crash may "
            "have cut off its list (checkpoint_manager_snapshot.json): remove that folder to train "
            "anew"
        ) from error
    return cast("Checkpoint | None", checkpoint)


@contextmanager
def part_of(state: Checkpoint, name: str) -> Iterator[Path]:
    """A folder with one of a state's files: in an object store the others may be large."""
    store = Store(state.filesystem, state.path)
    with tempfile.TemporaryDirectory() as folder:
        store.bring(store.listing(name), Path(folder))
        yield Path(folder)


def check_stage(run: Run) -> None:
    """Make sure that a training goes on in the ZeRO stage that it began in.

    Raises:
        ConfigError: It would not.
    """
    state = last_state(run)
    if state is None:
        return
    with part_of(state, WORLD) as folder:
        began = read_world(folder)["zero_stage"]
    if began != run.config.cluster.zero_stage:
        raise ConfigError(
            f"{run.place.location} holds a training begun with cluster.zero_stage {began}, and "
            f"DeepSpeed reads its states in no other: go on with {began} or choose another name"
        )


def build_trainer(
    run: Run, *, callbacks: Sequence[UserCallback] = (), judge: Any = None
) -> TorchTrainer:
    """The training of a run, its states in `train/`.

    Args:
        judge: That of several trainings. These read the zoo for themselves, as a short one would
            wait longer for Ray Data's processes. Default: one of its own.

    Raises:
        ConfigError: The cluster cannot hold the ranks, or it would go on in another ZeRO stage.
    """
    import ray.data
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    check_stage(run)
    cluster, each = run.config.cluster, require_ranks(run)
    if not run.start.exists():
        run.claim()  # another job may have changed it since this one began
        save_generator(run.new_generator(), run.start, card="Untrained: classifier selection.\n")
        run.place.keep("start")
    run.claim()  # or it may have begun, with another configuration
    streams: dict[str, Any] = {}
    if judge is None:
        streams["zoo"] = ray.data.from_arrow(read_rows(run.base.fetch("zoo")))
        streams["zoo"].context.enable_progress_bars = False
    return TorchTrainer(
        train_on_rank,
        train_loop_config={"config": run.config, "base": run.base, "judge": judge},
        scaling_config=ScalingConfig(
            num_workers=cluster.train_workers, use_gpu="GPU" in each, resources_per_worker=each
        ),
        datasets=streams,
        # every rank takes the whole zoo: which rows a step reads must not depend on their number
        dataset_config=DataConfig(datasets_to_split=[]),
        run_config=RunConfig(
            name="train",
            **run.place.for_ray(),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=list(callbacks),  # type: ignore[arg-type]
        ),
    )


def train_generator(run: Run) -> Generator:
    """Train, or continue; the generator with the averaged weights that validation chose.

    Raises:
        DataError: There is no zoo to learn from, or it is not whole, or no image tower.
        ConfigError: The cluster cannot hold the ranks, a tracker is not installed, or a training
            that is to go on began in another ZeRO stage.
    """
    if run.trained.exists():
        return run.trained_generator()
    check_zoo(run)
    check_tracking(run)
    result = build_trainer(run).fit()
    assert result.checkpoint, "training reported no state"
    with part_of(result.checkpoint, PROGRESS) as folder:
        progress = Progress.load(folder / PROGRESS)
    generator = load_generator(run.start)
    generator.denoiser.load_state_dict(dict(progress.best))
    if not run.config.train.unconditional:
        generator.denoiser.null_cond.zero_()  # nothing has trained it: `Generator.takes_guidance`
    # whatever the configuration names: another may leave it to what was fitted
    generator = calibrate(generator, run.dataset, run.store, run.space)
    prompt = generator.config.prompt
    fitted = {"favour": prompt.favour, "doubt": prompt.doubt}
    print(json.dumps({"train": result.metrics, "new_classes": fitted}))
    card = f"Trained for {progress.step} steps; accuracy on select images of validation tasks: "
    save_generator(generator, run.trained, card=f"{card}{progress.best_accuracy:.4f}.\n")
    run.place.keep("trained")
    return run.trained_generator()


def work(run: Run) -> None:
    """The whole job."""
    start_ray()
    train_generator(run)
    print(f"{below(run.place.location, 'trained')}: the trained generator")


if __name__ == "__main__":
    # workers get what they run by its name, which this module has only when it is imported
    from ray_jobs.train import work as job

    sys.exit(run_job(job, sys.argv[1:], name="train", about="Train the generator on a zoo."))
