"""What every job shares: configuration from the command line, a Ray cluster, exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch
import yaml
from tqdm import tqdm

from ray_jobs.failures import explain
from ray_jobs.process import settle_in
from ray_jobs.resources import SUBMITTED, own_share
from tina.configio import config_to_dict, parse_config
from tina.jobconfig import JobConfig
from tina.provenance import commit, cores
from tina.run import Run
from tina.stores import is_uri

TRACKERS = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"),
)
"""Where curves go, which are logged on rank 0's node."""


def run_job(
    work: Callable[[Run], None], argv: Sequence[str], *, name: str, about: str, needs: str = ""
) -> int:
    """Parse, run, and turn every error into a last line on stderr.

    Args:
        needs: Flags that the example in its help cannot do without.

    Returns:
        0 when the work is done, 2 for what the user can mend, 1 for any other failure, 130 when
        interrupted.
    """
    argv = list(argv)
    dry = "--dry-run" in argv
    try:
        config = parse_config(
            JobConfig,
            [word for word in argv if word != "--dry-run"],
            prog=f"python -m ray_jobs.{name}",
            description=f"{about} Example: python -m ray_jobs.{name} "
            f"{needs}--config configs/quickstart.yaml --storage $PWD/runs --name mine "
            "--train.lr 3e-4 "
            "(--dry-run prints the resolved configuration)",
        )
        if dry:
            print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
            return 0
        # the code that started the run is the one to name, whatever is checked out at its end
        os.environ.setdefault("TINA_COMMIT", commit())
        run = Run(config)
        with run.place.named():
            run.claim()
        settle_in()
        try:
            with run.place.named():
                work(run)
        except Exception:
            run.give_up()
            raise
    except KeyboardInterrupt:
        _leave(f"{name}: interrupted; the same command goes on from what there is")
        return 130
    except Exception as error:
        code, message = explain(error, name)
        _leave(f"error: {message}")
        return code
    return 0


def _leave(words: str) -> None:
    """The last line."""
    if "ray" in sys.modules:
        leave_ray()
    sys.stdout.flush()  # into a file it would come after it
    print(words, file=sys.stderr, flush=True)


def variables() -> dict[str, str]:
    """Environment variables that travel with a job, for those of its workers and for `submit`.

    Caches do not: another machine has its own. Nor do secrets: Ray shows these to everybody.
    """
    found = {"TINA_COMMIT": commit()}
    found |= {name: os.environ[name] for name in TRACKERS if name in os.environ}
    if place := os.environ.get("TINA_DATA"):  # a job runs in another working directory than yours
        found["TINA_DATA"] = place if is_uri(place) else os.path.abspath(os.path.expanduser(place))
    return found


def start_ray() -> None:
    """Join the cluster that the environment names, or start a local one."""
    import ray

    if ray.is_initialized():
        return
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    # an error in a Ray Data worker comes back as it was raised
    os.environ.setdefault("RAY_DATA_RAISE_ORIGINAL_MAP_EXCEPTION", "1")
    ray.init(
        log_to_driver=True,
        logging_level=logging.WARNING,
        # a submitted job's own environment reaches its workers, and must not be given twice
        runtime_env=None if SUBMITTED in os.environ else {"env_vars": variables() | path},
    )
    if SUBMITTED in os.environ and os.environ.get("OMP_NUM_THREADS") == "1" and not own_share():
        # what Ray gives to a job's process that asks for no CPUs, however many its node has
        torch.set_num_threads(cores())


def leave_ray() -> None:
    """Leave the cluster: what is printed from here on stays below its workers' last words."""
    import ray

    ray.shutdown()
    # The bars of workers that are gone would be drawn once more at exit.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


if __name__ == "__main__":
    # for --runtime-env-json of `ray job submit`: there is no git where the job runs
    print(json.dumps({"env_vars": variables()}))
