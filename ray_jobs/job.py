"""What every job shares: configuration from the command line, a Ray cluster, exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch
import yaml

from tina.config import JobConfig
from tina.configio import config_to_dict, parse_config
from tina.errors import TinaError
from tina.run import Run, commit


def run_job(work: Callable[[Run], None], argv: Sequence[str], *, name: str, about: str) -> int:
    """Parse, run, and turn a user's error into one line.

    Returns:
        0 when the work is done, 2 for what the user can mend.
    """
    argv = list(argv)
    dry = "--dry-run" in argv
    try:
        config = parse_config(
            JobConfig,
            [word for word in argv if word != "--dry-run"],
            prog=f"python -m ray_jobs.{name}",
            description=f"{about} Example: python -m ray_jobs.{name} "
            "--config configs/quickstart.yaml --storage $PWD/runs --train.lr 3e-4 "
            "(--dry-run prints the resolved configuration)",
        )
        if dry:
            print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
            return 0
        # the code that started the run is the one to name, whatever is checked out at its end
        os.environ.setdefault("TINA_COMMIT", commit())
        run = Run(config)
        run.claim()
        work(run)
    except (TinaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def start_ray() -> None:
    """Join the cluster that the environment names, or start a local one."""
    import ray

    if ray.is_initialized():
        return
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    variables = {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        variables["DS_ACCELERATOR"] = "cpu"
    for name in ("TINA_COMMIT", "TINA_DATA", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        if name in os.environ:
            variables[name] = os.environ[name]
    ray.init(
        log_to_driver=True,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": variables},
    )
