"""Train the generator on Ray Train; what its ranks do is in `ray_jobs.rank`.

Run again with the same name: the latest state is continued, with the same result at the same number
of ranks, and with the same samples at another.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_jobs.engine import WORLD, read_world
from ray_jobs.job import run_job, start_ray
from ray_jobs.rank import PROGRESS, train_on_rank
from ray_jobs.resources import on_gpu, require
from ray_jobs.tracking import check_tracking
from tina.calibration import calibrate
from tina.checkpoint import load_generator, save_generator
from tina.errors import ConfigError, DataError, one_line
from tina.generator import Generator
from tina.run import Run
from tina.stores import Store, below
from tina.training import Progress
from tina.zoo import ZOO, open_zoo, read_rows

if TYPE_CHECKING:
    from ray.train import Checkpoint, UserCallback
    from ray.train.torch import TorchTrainer


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
            f"Ray cannot read which states {run.place.below('train').location} holds: "
            f"{one_line(error)}; if a crash has cut off its list (checkpoint_manager_snapshot.json)"
            ", remove that folder to train anew"
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
