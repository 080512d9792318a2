"""Build the zoo on Ray Data: tasks stream through a pool of actors that fine-tune p-models.

A row depends on its task, the generic model and the recipe alone; where models are stacked on a
GPU, to rounding. The pool grows as far as the cluster holds it and shrinks with it: an actor of a
lost node starts again elsewhere, its block is done again, and the driver writes every block once.
Run again: only rows that are missing are computed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ray_jobs.job import run_job, start_ray
from ray_jobs.pool import CPU, GPU, stream
from ray_jobs.process import settle_in
from ray_jobs.resources import capacity, on_gpu
from tina.config import RecipeConfig
from tina.families import Family
from tina.files import hash_bytes, write_whole
from tina.generic import save_generic, train_generic
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.storage import Place
from tina.tasks import Task
from tina.tower import tower_family
from tina.zoo import ZOO, build_rows, open_zoo, zoo_schema


def ensure_generic(run: Run) -> None:
    """Train the generic model, and the image tower where prompts have one, unless they are there.

    Raises:
        ConfigError, DataError, PromptError: The configured prompts cannot be had, which would be
            known too late; or what the run has was trained on other images.
    """
    run.check_data()
    if not run.generic_file.exists():
        run.check_prompts()
        _train(run, run.generic_file, run.family, run.config.classifier.generic, "generic model")
    if (recipe := run.config.prompt.tower) and not run.tower_file.exists():
        _train(run, run.tower_file, tower_family(run.family), recipe, "image tower")


def _train(run: Run, file: Path, family: Family, recipe: RecipeConfig, label: str) -> None:
    """Train a classifier of all seen classes and keep it."""
    # features that all workers need anyway; GPUs of theirs have them sooner
    shared = family is run.family and family.has_trunk and not on_gpu()
    # the trunk, then the head on it
    passes = 1 + (family.trains_trunk and not family.on_imagenet)
    with tqdm(total=passes * recipe.steps, desc=label, unit="step") as bar:
        generic = train_generic(
            family,
            run.all_views,
            run.space.seen,
            recipe,
            seed=run.config.classifier.seed,
            inputs=partial(run.shown, "cpu") if shared else None,
            progress=bar.update,
        )
    if run.base.fetch(file.name, again=True).exists():
        return  # another job of this run was faster, and its p-models may be on their way
    save_generic(file, generic, family, run.dataset)
    run.base.keep(file.name)


class Teacher:
    """An actor that fine-tunes blocks of p-models: stacked on a GPU, one by one on a CPU.

    All is loaded with the first block: of an error while an actor is made, Ray keeps only the text.
    """

    def __init__(
        self, config: JobConfig, base: Place, kind: str, tasks: Sequence[Task], device: str
    ) -> None:
        self.run, self.kind, self.device = Run(config, base), kind, device
        self.tasks = {task.task_id: task for task in tasks}
        self.tools: dict[str, Any] = {}  # what `build_rows` takes beside tasks
        settle_in(threads=1 if device == "cpu" else None)

    def load(self) -> None:
        """All that a block needs, on the device."""
        run, device = self.run, self.device
        run.check_images()
        generic = run.generic
        self.tools = {
            "family": run.family,
            "dataset": run.dataset,
            "store": run.inputs(device),
            "generic": replace(generic, body=generic.body.to(device), rows=generic.rows.to(device)),
            "recipe": run.recipe(self.kind),
            "max_classes": run.config.tasks.max_classes,
            "stacked": device != "cpu",
        }

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """Rows for a block of task ids, with what `Build` wants to know."""
        import ray

        (ids,) = blocks["task_ids"].to_pylist()
        with self.run.base.named():
            if not self.tools:
                self.load()
            tools, tasks = self.tools, [self.tasks[task_id] for task_id in ids.split()]
            begin = time.time()
            rows = build_rows(tasks, **tools)
        schema = zoo_schema(tools["family"].layout(tools["max_classes"]).size)
        table = pa.Table.from_pylist(rows, schema=schema)
        notes = {
            "worker": ray.get_runtime_context().get_actor_id(),
            "begin": begin,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts KiB
        }
        for name, value in notes.items():
            table = table.append_column(name, pa.array([value] * len(rows)))
        return table


@dataclass
class Build:
    """What one call of `build_zoo` did.

    Args:
        models: Rows written.
        seconds: From the first worker's first step to the last row.
        peaks: Most resident bytes of each worker.
    """

    models: int = 0
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    _begin: float = field(default=float("inf"), init=False)

    def take(self, table: pa.Table) -> pa.Table:
        """Count a block; its rows without the notes."""
        self.models += len(table)
        self._begin = min(self._begin, pc.min(table["begin"]).as_py())
        self.seconds = time.time() - self._begin
        worker, peak = table["worker"][0].as_py(), pc.max(table["peak"]).as_py()
        self.peaks[worker] = max(peak, self.peaks.get(worker, 0))
        return table.drop_columns(["worker", "begin", "peak"])

    def __str__(self) -> str:
        return (
            f"{self.models} models in {self.seconds:.1f} s "
            f"({self.models / self.seconds:.2f} models/s), workers: {len(self.peaks)}, "
            f"peak memory of a worker: {max(self.peaks.values()) / 2**20:.0f} MiB"
        )


def build_zoo(run: Run, kind: str, tasks: Sequence[Task] | None = None) -> Build:
    """Fill the `zoo` or the `direct` folder of a run.

    Args:
        tasks: In the place of those that the configuration has for this folder.

    Raises:
        DataError: The folder holds rows of another recipe.
        ConfigError: The cluster has no place for a worker.
    """
    folder = run.base.fetch(kind)
    tasks = run.zoo_tasks(kind) if tasks is None else tasks
    begun = (folder / ZOO).exists()
    done = open_zoo(folder, run.describe_zoo(kind))
    if not begun:
        run.base.keep(f"{kind}/{ZOO}")
    missing = [task for task in tasks if task.task_id not in done]
    label = {"zoo": "zoo", "direct": "direct fine-tuning"}[kind]
    build = Build()
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=label, unit="model") as bar:
        for block in finetuned(run, kind, missing) if missing else ():
            table = build.take(block)
            ids = "".join(table["task_id"].to_pylist())
            file = folder / f"part-{hash_bytes(ids.encode())[:16]}.parquet"
            write_whole(file, partial(pq.write_table, table))
            run.base.keep(f"{kind}/{file.name}")
            bar.update(len(table))
    if missing:
        print(f"{label}: {build}")
    return build


def finetuned(run: Run, kind: str, tasks: Sequence[Task]) -> Iterator[pa.Table]:
    """Tables of finished p-models with their notes, in the order in which they are done."""
    gpu, cluster = on_gpu(), run.config.cluster
    if run.family.has_trunk and not gpu:
        assert run.store  # here once, for all workers
    # a stacked block takes a GPU about as long however few it holds
    workers = 1 if gpu else min(cluster.zoo_workers, capacity(CPU))
    most = cluster.zoo_block_gpu if gpu else cluster.zoo_block
    blocks = [
        {"task_ids": " ".join(task.task_id for task in tasks[place])}
        for place in blocks_of(len(tasks), most=most, workers=workers)
    ]
    arguments = (run.config, run.base, kind, tasks, "cuda" if gpu else "cpu")
    return stream(Teacher, arguments, blocks, each=GPU if gpu else CPU, cluster=cluster)


def blocks_of(n: int, *, most: int, workers: int) -> list[slice]:
    """Where n tasks are cut: the last blocks are smaller, so that several workers end together.

    Guided self-scheduling (Polychronopoulos & Kuck 1987), with half of its shares: a worker has
    its next block before it has done the one.
    """
    blocks, begin = [], 0
    while begin < n:
        fair = most if workers <= 1 else -(-(n - begin) // (2 * workers))
        end = min(n, begin + min(most, fair))
        blocks.append(slice(begin, end))
        begin = end
    return blocks


def work(run: Run) -> None:
    """The whole job."""
    start_ray()
    ensure_generic(run)
    build_zoo(run, "zoo")


if __name__ == "__main__":
    # workers get what they run by its name, which this module has only when it is imported
    from ray_jobs.build_zoo import work as job

    sys.exit(run_job(job, sys.argv[1:], name="build_zoo", about="Fine-tune the p-models of a zoo."))
