"""What the benchmarks share: rows that say where they come from, percentiles, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tina.checkpoint import load_generator
from tina.configio import parse_config
from tina.datasets import Dataset
from tina.errors import TinaError
from tina.generator import Generator
from tina.inputs import InputStore, features_name
from tina.jobconfig import JobConfig
from tina.packaged import PRETRAINED, pretrained
from tina.provenance import commit, hardware
from tina.run import Run
from tina.storage import user_cache

RESULTS = Path(__file__).parent / "results"
PRESETS = Path(__file__).parents[1] / "configs"


def as_command(main: Callable[[], None]) -> None:
    """Run a benchmark; what the user can mend ends as one line and exit status 2, as in `tina`."""
    code()  # that of the beginning, whatever is changed meanwhile
    try:
        main()
    except (TinaError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


@cache
def code() -> str:
    """The commit that all rows of this process name."""
    return commit()


def checkpoint_folder(name: str) -> Path:
    """A checkpoint's folder, from its path or the name of one that comes with the package."""
    return PRETRAINED / name if name in pretrained() else Path(name).resolve()


def shown(generator: Generator, dataset: Dataset) -> InputStore:
    """A data set as a generator's classifiers take it; the user cache keeps a trunk's features."""
    name = features_name(generator.family, dataset, generator.config.prompt)
    file = user_cache() / "features" / name
    return InputStore(generator.family, dataset.views, features=file)


def packaged(preset: str) -> tuple[Run, Generator, InputStore]:
    """The data and tasks of a preset, its generator that comes with the package, and its images."""
    words = ["--config", str(PRESETS / f"{preset}.yaml"), "--storage", "/nowhere"]
    run = Run(parse_config(JobConfig, words))
    generator = load_generator(checkpoint_folder(f"tina-{preset.replace('_', '-')}"))
    return run, generator, shown(generator, run.dataset)


def each_checkpoint(name: str, about: str, compare: Callable[[str], dict[str, object]]) -> None:
    """The whole of a benchmark that appends a row for each checkpoint of its command line.

    Args:
        about: The benchmark's docstring.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="packaged names or folders")
    checkpoints, before = parser.parse_args().checkpoints, load()
    for checkpoint in checkpoints:
        append(name, {"checkpoint": checkpoint} | compare(checkpoint), load_before=before)


def append(name: str, figures: Mapping[str, object], *, load_before: float) -> None:
    """Print a row and append it to results/NAME.jsonl.

    Args:
        load_before: The machine's load before the measurement, `os.getloadavg()[0]`: what else ran.
    """
    row = {
        "date": date.today().isoformat(),
        "commit": code(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "numpy")},
        "load_before": round(load_before, 2),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in ms."""
    found = np.percentile(np.array(seconds) * 1000, [50, 90, 99])
    return {f"p{p}_ms": round(float(v), 1) for p, v in zip((50, 90, 99), found, strict=True)}


def load() -> float:
    """The machine's load over the last minute."""
    return os.getloadavg()[0]
