"""How does a zoo build scale with its workers, and does a worker's memory grow with the zoo?

    python -m benchmarks.zoo_scaling     # appends a row to results/zoo_scaling.jsonl

One Ray cluster on this machine, digits, cnn5k. After a warm-up the same zoo is built by one worker
and by two, in pairs whose order alternates; models per second count from the first worker's first
step. The figure is the median of the pairs' ratios: a shared machine changes its speed within
minutes. Then one worker builds a small and a large zoo.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.record import append, load
from ray_jobs.build_zoo import Build, build_zoo, ensure_generic
from ray_jobs.job import start_ray
from tina.config import ClassifierConfig, ClusterConfig, JobConfig, RecipeConfig, TaskConfig
from tina.run import Run

MODELS, STEPS, PAIRS = 120, 300, 5
SMALL, LARGE = 24, 240


def build(storage: Path, name: str, *, models: int, workers: int, steps: int = STEPS) -> Build:
    """A zoo in a folder of its own, from the one generic model."""
    recipe = RecipeConfig(steps=steps, batch_size=64, lr=5e-3)
    run = Run(
        JobConfig(
            name=name,
            storage=str(storage),
            tasks=TaskConfig(min_classes=2, max_classes=6, train=models - 4, val=4, held_out=4),
            classifier=ClassifierConfig(family="cnn5k", generic=recipe, finetune=recipe),
            cluster=ClusterConfig(zoo_workers=workers, zoo_block=1),
        )
    )
    generic = storage / "generic.safetensors"
    if generic.exists():
        run.folder.mkdir()
        shutil.copy(generic, run.generic_file)
    else:
        ensure_generic(run)
        shutil.copy(run.generic_file, generic)
    return build_zoo(run, "zoo")


def main() -> None:
    """Measure and append."""
    before = load()
    start_ray()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        build(storage, "warm-up", models=8, workers=2)
        for pair in range(PAIRS):
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                built = build(storage, f"{pair}-{workers}", models=MODELS, workers=workers)
                rates[workers].append(built.models / built.seconds)
        # fewer steps: memory is the question here
        peaks = {
            models: max(
                build(storage, f"of-{models}", models=models, workers=1, steps=60).peaks.values()
            )
            for models in (SMALL, LARGE)
        }
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    figures = {
        "models": MODELS,
        "steps": STEPS,
        "models_per_s": {n: [round(rate, 2) for rate in found] for n, found in rates.items()},
        "two_over_one": round(median(ratios), 2),
        "two_over_one_by_pair": [round(ratio, 2) for ratio in ratios],
        "peak_mib_of_a_worker": {n: round(peak / 2**20) for n, peak in peaks.items()},
    }
    append("zoo_scaling", figures, load_before=before)


if __name__ == "__main__":
    main()
