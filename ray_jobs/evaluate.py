"""Evaluate the trained generator on Ray Data: cells of the report stream through a pool of actors.

The report is the one that `Run.evaluate` writes in one process: only where a cell is scored
differs. Run again: the report is written anew, with the evaluation settings of this time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ray_jobs.build_zoo import build_zoo
from ray_jobs.job import run_job, start_ray
from ray_jobs.pool import CPU, stream
from ray_jobs.process import settle_in
from tina.checkpoint import check_manifest
from tina.errors import CheckpointError, ConfigError
from tina.evaluation import Cell, Evaluation
from tina.files import read_table
from tina.jobconfig import JobConfig
from tina.metrics import Score
from tina.report import print_report
from tina.run import Run
from tina.storage import MANIFEST, Place

PACKED = pa.schema(
    {
        "cell": pa.int32(),
        "images": pa.list_(pa.int32()),
        "hit": pa.list_(pa.bool_()),
        "confidence": pa.list_(pa.float64()),
    }
)


def pack(number: int, scores: Sequence[Score]) -> pa.Table:
    """A cell's scores as one row: arrays (S, N) of all its tasks side by side."""
    row = {
        "cell": number,
        "images": [score.hit.shape[1] for score in scores],
        "hit": np.concatenate([score.hit for score in scores], 1).ravel(),
        "confidence": np.concatenate([score.confidence for score in scores], 1).ravel(),
    }
    return pa.Table.from_pylist([row], schema=PACKED)


def unpack(table: pa.Table) -> Iterator[tuple[int, list[Score]]]:
    """What `pack` was given, bit for bit, for each row."""

    def values(name: str, i: int) -> Any:
        return table[name][i].values.to_numpy(zero_copy_only=False)

    for i in range(len(table)):
        ends = np.cumsum(values("images", i))
        hit, confidence = (
            np.split(values(name, i).reshape(-1, ends[-1]), ends[:-1], axis=1)
            for name in ("hit", "confidence")
        )
        yield (
            table["cell"][i].as_py(),
            [Score(hit=h, confidence=c) for h, c in zip(hit, confidence, strict=True)],
        )


class Examiner:
    """An actor that scores cells.

    What it needs is loaded with the first one: of an error while an actor is made, Ray keeps the
    text alone.
    """

    def __init__(self, config: JobConfig, base: Place) -> None:
        settle_in(threads=1)
        self.run = Run(config, base)
        self.evaluation: Evaluation | None = None

    def __call__(self, cells: pa.Table) -> pa.Table:
        """The scores of a cell, by its number."""
        (number,) = cells["cell"].to_pylist()
        with self.run.base.named():
            if self.evaluation is None:
                self.evaluation = self.run.evaluation(self.run.trained_generator())
            return pack(number, self.evaluation.score_cell(self.evaluation.cells[number]))


def spread(run: Run, evaluation: Evaluation) -> Iterator[tuple[Cell, list[Score]]]:
    """Every cell with its scores, in the order in which they are done.

    Raises:
        ConfigError: The cluster has no place for an actor.
    """
    cells = evaluation.cells
    numbers = [{"cell": number} for number in range(len(cells))]
    done = stream(Examiner, (run.config, run.base), numbers, each=CPU, cluster=run.config.cluster)
    with tqdm(total=len(cells), desc="evaluation", unit="cell") as bar:
        for table in done:
            for number, scores in unpack(table):
                yield cells[number], scores
                bar.update()


def evaluate(run: Run) -> dict[str, Any]:
    """Measure the trained generator, write the report, release the checkpoint with its numbers.

    A checkpoint that was released before keeps its card: its id is in what was made with it.

    Raises:
        ConfigError: There is no trained generator, or the checkpoint is of another one.
        DataError: The data set is not the one that the zoo was made of, or there is no image tower.
    """
    if not run.trained.is_dir():
        raise ConfigError(
            f"{run.place.location} holds no trained generator: run ray_jobs.train first"
        )
    generator = run.trained_generator()
    released = run.checkpoint.exists()
    if released and _tensors_of(run.checkpoint) != _tensors_of(run.trained):
        raise ConfigError(
            f"checkpoint/ in {run.place.location} holds another generator than trained/: "
            "remove one of them"
        )
    run.check_data()
    run.regressor()  # a wrong one must not be told of at the end
    start_ray()
    build_zoo(run, "direct")
    report = run.evaluate(generator, spread=partial(spread, run))
    if released:
        print(f"checkpoint/ in {run.place.location} was released before and keeps its card")
    else:
        run.release(generator, report)
    return report


def _tensors_of(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory as far as it is of trained tensors.

    Cards differ, configurations have keys that an earlier version did not know, and an image tower
    may have been added after training.
    """
    check_manifest(directory)
    manifest = read_table(directory / MANIFEST, CheckpointError)
    manifest.pop("tower.safetensors", None)
    return {name: digest for name, digest in manifest.items() if name.endswith(".safetensors")}


def work(run: Run) -> None:
    """The whole job."""
    print_report(evaluate(run))
    print(f"{run.place.location}: report.json, plots/, checkpoint/")


if __name__ == "__main__":
    # workers get what they run by its name, which this module has only when it is imported
    from ray_jobs.evaluate import work as job

    sys.exit(
        run_job(
            job,
            sys.argv[1:],
            name="evaluate",
            about="Measure the trained generator on held-out tasks.",
        )
    )
