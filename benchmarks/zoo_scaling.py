"""How does a zoo build scale with its workers, and does a worker's memory grow with the zoo?

    python -m benchmarks.zoo_scaling     # appends a row to results/zoo_scaling.jsonl

One Ray cluster on this machine, digits, cnn5k, blocks and recipe as in configs/quickstart.yaml.
After a warm-up the same zoo is built by one worker and by two, and by one and by two bare processes
without Ray, which is what the machine itself has to give; models per second count from the first
worker's first step. Rounds alternate their order, and the figures are medians of the rounds'
ratios: a shared machine changes its speed within minutes. Then one worker builds a small and a
large zoo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.record import append, as_command, load
from ray_jobs.build_zoo import Teacher, build_zoo, ensure_generic
from ray_jobs.job import start_ray
from tina.config import ClassifierConfig, RecipeConfig
from tina.jobconfig import ClusterConfig, JobConfig, TaskConfig
from tina.run import Run
from tina.storage import Place
from tina.zoo import build_rows

MODELS, STEPS, ROUNDS = 120, 300, 5
SMALL, LARGE = 24, 240
RAYS_NICENESS = 15  # of its workers, by default


def prepare(storage: Path, name: str, *, models: int, workers: int, steps: int = STEPS) -> Run:
    """A run in a folder of its own, with the one generic model."""
    recipe = RecipeConfig(steps=steps, batch_size=64, lr=5e-3)
    run = Run(
        JobConfig(
            name=name,
            storage=str(storage),
            tasks=TaskConfig(min_classes=2, max_classes=6, train=models - 4, val=4, held_out=4),
            classifier=ClassifierConfig(family="cnn5k", generic=recipe, finetune=recipe),
            cluster=ClusterConfig(zoo_workers=workers, zoo_block=4),
        )
    )
    generic = storage / "generic.safetensors"
    if generic.exists():
        run.folder.mkdir()
        shutil.copy(generic, run.generic_file)
    else:
        ensure_generic(run)
        shutil.copy(run.generic_file, generic)
    return run


def by_ray(run: Run) -> float:
    """Models per second of the zoo build."""
    built = build_zoo(run, "zoo")
    return built.models / built.seconds


def bare(run: Run) -> float:
    """Models per second of as many processes that know nothing of each other."""
    workers = run.config.cluster.zoo_workers
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(share, run.config, run.base, i) for i in range(workers)]
        begins, ends = zip(*(done.result() for done in shares), strict=True)
    return MODELS / (max(ends) - min(begins))


def share(config: JobConfig, base: Place, index: int) -> tuple[float, float]:
    """Fine-tune every n-th p-model; when the first step began and the last ended."""
    os.nice(RAYS_NICENESS)
    teacher = Teacher(config, base, "zoo", [], "cpu")
    teacher.load()
    tasks = teacher.run.zoo_tasks("zoo")[index :: config.cluster.zoo_workers]
    begin = time.time()
    for task in tasks:
        build_rows([task], **teacher.tools)
    return begin, time.time()


def main() -> None:
    """Measure and append."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    before = load()
    start_ray()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        by_ray(prepare(storage, "warm-up", models=8, workers=2))
        builds: list[tuple[Callable[[Run], float], int]] = [
            (how, workers) for how in (by_ray, bare) for workers in (1, 2)
        ]
        for turn in range(ROUNDS):
            for how, workers in builds[:: 1 if turn % 2 == 0 else -1]:
                name = f"{how.__name__}-{workers}"
                run = prepare(storage, f"{name}-{turn}", models=MODELS, workers=workers)
                rates.setdefault(name, []).append(how(run))
        # fewer steps: memory is the question here
        peaks = {}
        for models in (SMALL, LARGE):
            run = prepare(storage, f"of-{models}", models=models, workers=1, steps=60)
            peaks[models] = max(build_zoo(run, "zoo").peaks.values())

    def over(many: str, few: str) -> list[float]:
        return [round(a / b, 2) for a, b in zip(rates[many], rates[few], strict=True)]

    ratios = over("by_ray-2", "by_ray-1")
    figures = {
        "models": MODELS,
        "steps": STEPS,
        "models_per_s": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "two_over_one": round(median(ratios), 2),
        "two_over_one_by_round": ratios,
        "two_over_one_bare": round(median(over("bare-2", "bare-1")), 2),
        "ray_over_bare": {n: round(median(over(f"by_ray-{n}", f"bare-{n}")), 2) for n in (1, 2)},
        "peak_mib_of_a_worker": {n: round(peak / 2**20) for n, peak in peaks.items()},
    }
    append("zoo_scaling", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
