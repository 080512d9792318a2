"""Build the zoo on Ray Data: tasks stream through a pool of actors that fine-tune p-models.

A row depends on its task, the generic model and the recipe alone. Run again: only rows that are
missing are computed.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from ray_jobs.job import run_job, start_ray
from tina.config import JobConfig
from tina.files import hash_bytes, write_whole
from tina.generic import save_generic, train_generic
from tina.run import Run
from tina.zoo import build_rows, open_zoo, zoo_schema


def ensure_generic(run: Run) -> None:
    """Train the generic model unless the run has one."""
    if run.generic_file.exists():
        return
    recipe = run.config.classifier.generic
    passes = 1 + run.family.has_trunk  # the trunk, then the head on it
    with tqdm(total=passes * recipe.steps, desc="generic model", unit="step") as bar:
        generic = train_generic(
            run.family,
            run.dataset,
            run.space.seen,
            recipe,
            seed=run.config.classifier.seed,
            progress=bar.update,
        )
    save_generic(run.generic_file, generic, run.family)


class Teacher:
    """An actor that fine-tunes blocks of p-models: stacked on a GPU, one by one on a CPU."""

    def __init__(self, config: JobConfig, kind: str) -> None:
        self.run, self.kind = Run(config), kind
        self.tasks = {task.task_id: task for task in self.run.zoo_tasks(kind)}
        if not torch.cuda.is_available():
            torch.set_num_threads(1)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Rows for a batch of task ids."""
        run = self.run
        rows = build_rows(
            [self.tasks[task_id] for task_id in batch["task_id"]],
            family=run.family,
            dataset=run.dataset,
            store=run.store,
            generic=run.generic,
            recipe=run.recipe(self.kind),
            max_classes=run.config.tasks.max_classes,
            stacked=torch.cuda.is_available(),
        )
        schema = zoo_schema(run.family.layout(run.config.tasks.max_classes).size)
        return pa.Table.from_pylist(rows, schema=schema)


def build_zoo(run: Run, kind: str) -> None:
    """Fill the `zoo` or the `direct` folder of a run."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    folder = run.folder / kind
    tasks = run.zoo_tasks(kind)
    done = open_zoo(folder, run.describe_zoo(kind))
    missing = [{"task_id": task.task_id} for task in tasks if task.task_id not in done]
    label = {"zoo": "zoo", "direct": "direct fine-tuning"}[kind]
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=label, unit="model")
    if missing:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        DataContext.get_current().enable_progress_bars = False  # one bar, in models, is ours
        block = run.config.cluster.zoo_block
        gpu = torch.cuda.is_available()
        rows: Any = ray.data.from_items(missing, override_num_blocks=-(-len(missing) // block))
        rows = rows.map_batches(
            Teacher,
            fn_constructor_args=(run.config, kind),
            batch_size=block,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=run.config.cluster.zoo_workers),
            num_cpus=0 if gpu else 1,
            num_gpus=1 if gpu else 0,
        )
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            ids = "".join(table["task_id"].to_pylist())
            file = folder / f"part-{hash_bytes(ids.encode())[:16]}.parquet"
            write_whole(file, partial(pq.write_table, table))
            bar.update(len(table))
    bar.close()


def work(run: Run) -> None:
    """The whole job."""
    ensure_generic(run)
    start_ray()
    build_zoo(run, "zoo")


if __name__ == "__main__":
    sys.exit(
        run_job(work, sys.argv[1:], name="build_zoo", about="Fine-tune the p-models of a zoo.")
    )
