"""How does accuracy grow with the zoo and with the generator?

    python -m benchmarks.sizes runs/cifar100_cnn5k --steps 600

zoo        the run's generator trained anew on its first Z p-models, by the weight-space loss alone,
           whose only teacher the zoo is, and by both losses
generator  both losses, whole zoo, a denoiser of another width

Every point has equally many steps on one thread and a process of its own, whose peak memory it
tells. It is measured on `select` images of class sets that are no task of the run, paired by set
with classifier selection; nothing here reads `report` images. A row per point is appended to
results/sizes.jsonl, and the run's folder gets plots/sizes.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.objectives import (
    BOTH,
    SETS,
    WEIGHT,
    against,
    by_set,
    generated,
    learn,
    measure,
    select_lessons,
    selected,
)
from benchmarks.record import append, as_command, load
from tina.checkpoint import load_generator
from tina.generator import new_denoiser
from tina.run import Run

ZOO, GENERATOR = "zoo", "generator"
ZOO_PARTS = (30, 10, 3, 1)  # of the whole zoo
WIDTHS = (48, 96, 192, 384)
LINES = (
    (WEIGHT, "weight-space loss alone", "tab:blue"),
    (BOTH, "both losses", "tab:orange"),
)

Point = tuple[str, str, int]
"""A curve, the objective it is trained by, and the size."""


def points(run: Run) -> list[Point]:
    """What can be measured of a run."""
    sizes = [max(1, run.config.tasks.train // part) for part in ZOO_PARTS]
    zoos = [(ZOO, objective, size) for objective in (WEIGHT, BOTH) for size in sizes]
    return zoos + [(GENERATOR, BOTH, width) for width in WIDTHS]


def measure_point(folder: Path, point: Point, steps: int) -> dict[str, Any]:
    """Train and measure one point in this process."""
    torch.set_num_threads(1)
    run, (curve, objective, size) = Run.open(folder), point
    generator, zoo = load_generator(run.start), run.read_zoo("zoo").only("train")
    if curve == ZOO:
        zoo = zoo.of(zoo.task_ids[:size])
    else:
        config = replace(generator.config, denoiser=replace(generator.config.denoiser, width=size))
        dim, seed = generator.vocabulary.space.dim, run.config.train.seed
        denoiser = new_denoiser(config, generator.codec, dim=dim, seed=seed)
        generator = replace(generator, config=config, denoiser=denoiser)
    begin = time.perf_counter()
    learn(run, generator, objective, steps=steps, zoo=zoo)
    seconds = time.perf_counter() - begin
    sets, lessons = select_lessons(run, SETS)
    base = measure(generator, run.store, lessons, selected(generator, sets))
    (thetas,) = generated(generator, sets, seeds=1)
    return {
        "curve": curve,
        "objective": objective,
        "size": size,
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()),
        "seconds": round(seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "selection": [round(float(v), 4) for v in by_set(base).mean(0)],
        "over_selection": against(measure(generator, run.store, lessons, thetas), base, lessons),
    }


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Points above selection, with two standard errors, by size of zoo and generator."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, curve, key in zip(axes, (ZOO, GENERATOR), ("size", "parameters"), strict=True):
        for objective, label, color in LINES:
            chosen = [r for r in rows if (r["curve"], r["objective"]) == (curve, objective)]
            gains = [r["over_selection"]["accuracy_points"] for r in chosen]
            errors = [2 * r["over_selection"]["accuracy_points_se"] for r in chosen]
            if chosen:
                where = [r[key] for r in chosen]
                axis.errorbar(where, gains, errors, marker="o", capsize=3, color=color, label=label)
        axis.set_xscale("log")
        axis.axhline(0, color="gray", linewidth=0.8)
    axes[0].set(xlabel="p-models in the zoo", ylabel="points above selection")
    axes[1].set(xlabel="parameters of the generator")
    axes[0].legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, append, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with its zoo and start/")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each point")
    args = parser.parse_args(argv)
    before, run = load(), Run.open(args.run)
    rows = []
    for point in points(run):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure_point, args.run, point, args.steps).result()
        rows.append(found)
        facts = {"dataset": run.dataset.name, "family": run.family.name, "steps": args.steps}
        append("sizes", {**facts, **found}, load_before=before)
    plot(rows, run.folder / "plots" / "sizes.png")


if __name__ == "__main__":
    as_command(main)
