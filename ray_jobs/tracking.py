"""Where training's curves go: TensorBoard, or by a config key MLflow or Weights & Biases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from tina.configio import config_to_dict
from tina.errors import ConfigError
from tina.files import write_text
from tina.run import Run


class Tracker(NamedTuple):
    """One training's curves: `log` figures at a step, `save` all so far, `close` at the end."""

    log: Callable[[int, Mapping[str, float]], None]
    save: Callable[[], None]
    close: Callable[[], None]


NOWHERE = Tracker(lambda step, figures: None, lambda: None, lambda: None)


def check_tracking(run: Run) -> None:
    """Say before anything starts that a tracker's package is missing, or where it would write.

    Raises:
        ConfigError: It is not installed, or MLflow would write where no one looks.
    """
    kind = run.config.tracking
    if kind != "none" and not find_spec(kind):
        raise ConfigError(f"tracking is {kind}, which is not installed: pip install {kind}")
    if kind == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "tracking is mlflow, which without MLFLOW_TRACKING_URI writes into the working "
            "directory of a process of Ray's: name a server, or sqlite:////folder/mlflow.db"
        )


def identity(run: Run) -> str:
    """Names a training's curves, for as long as its states are there."""
    name = "train/tracking_id"
    file = run.place.fetch(name)
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(8))
        run.place.keep(name)
    return file.read_text()


def open_tracking(run: Run, *, start: int) -> Tracker:
    """Where a training's figures go.

    Args:
        start: Step that training starts or goes on from; what was logged after it TensorBoard
            drops, Weights & Biases and MLflow get a second time.
    """
    match run.config.tracking:
        case "tensorboard":
            return _tensorboard(run, start)
        case "mlflow":
            return _mlflow(run)
        case "wandb":
            return _wandb(run)
    return NOWHERE


def _tensorboard(run: Run, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=start + 1 if start else 0)

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    def save() -> None:
        writer.flush()
        run.place.keep("tensorboard")

    return Tracker(log, save, writer.close)


def _mlflow(run: Run) -> Tracker:
    import mlflow

    found = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.tina_id = '{identity(run)}'",
        output_format="list",
    )
    mlflow.start_run(
        run_id=found[0].info.run_id if found else None,
        run_name=run.config.name,
        tags={"tina_id": identity(run), "tina_run": run.place.location},
    )

    def log(step: int, figures: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(figures), step=step)

    return Tracker(log, NOWHERE.save, mlflow.end_run)


def _wandb(run: Run) -> Tracker:
    import wandb

    logged = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "tina"),
        name=run.config.name,
        id=identity(run),
        dir=str(run.folder),
        config=config_to_dict(run.config),
        resume="allow",
    )
    # its own steps never go back, and a validation's accuracy is an earlier state's
    logged.define_metric("*", step_metric="step")

    def log(step: int, figures: Mapping[str, float]) -> None:
        logged.log({"step": step, **figures})

    def close() -> None:
        logged.finish()
        if (run.folder / "wandb").exists():  # what it has written offline
            run.place.keep("wandb")

    return Tracker(log, NOWHERE.save, close)
