"""How do time and memory grow with the zoo, the generator, the classifier and the classes?

    python -m benchmarks.growth     # appends a row to results/growth.jsonl

Each point is a process of its own on one thread: seconds are a median, memory is its peak beyond
that of a process which only imports the same. An exponent is the slope of a straight line through
the logarithms, which a cost that is there at any size makes less than the growth. So what is said
of larger values comes from a constant and a power law, fitted together, and is marked as such.

zoo         seconds to turn Z p-models of CNN-5K into tokens, and what they take
generator   seconds of a training step (64 samples) by the denoiser's parameters
classifier  seconds of a fine-tuning step (64 images) by a family's parameters at ten classes
classes     seconds of a denoising step by the classes of one prompt
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.generation import timed
from benchmarks.record import append, as_command, load
from benchmarks.training import (
    CLASSES,
    EMBEDDING,
    SIZES,
    TOKENS,
    VALUES,
    draw_inputs,
    new_denoiser,
    take_step,
)
from benchmarks.zoo_building import ways
from ray_jobs.process import settle_in
from tina import TinaPipeline
from tina.batches import encode_zoo
from tina.engine import LocalEngine
from tina.jobconfig import TrainConfig
from tina.zoo import Zoo

PACKAGED = "tina-cifar100-cnn5k"
FAMILIES = {"cnn5k": 5_370, "cnn15k": 14_586, "cnn33k": 33_338, "cnn70k": 70_202}
POINTS: Mapping[str, tuple[Any, ...]] = {
    "zoo": (100, 300, 1_000, 3_000),
    "generator": tuple(SIZES),
    "classifier": tuple(FAMILIES),
    "classes": (5, 10, 20, 50, 100),
}
FURTHER = {"zoo": 10_000, "generator": 640e6, "classifier": 1e6, "classes": 1_000}


def encode(count: int) -> tuple[float, float]:
    """Seconds to encode so many p-models."""
    generator = TinaPipeline.from_pretrained(PACKAGED).generator
    layout, draw = generator.codec.layout, np.random.default_rng(0)
    trained = torch.nonzero(generator.vocabulary.trained).flatten().numpy()
    zoo = Zoo(
        task_ids=tuple(map(str, range(count))),
        class_ids=tuple(tuple(draw.permutation(trained)[:CLASSES].tolist()) for _ in range(count)),
        splits=("train",) * count,
        theta=torch.from_numpy(draw.standard_normal((count, layout.size), dtype=np.float32)),
        accuracy=torch.zeros(count),
        steps=torch.zeros(count),
    )
    return count, median(timed(lambda: encode_zoo(generator, zoo)) for _ in range(3))


def train_generator(size: str) -> tuple[float, float]:
    """Seconds of a training step in fp32."""
    engine, inputs = LocalEngine(new_denoiser(size), TrainConfig()), draw_inputs(64)
    take_step(engine, inputs)
    parameters = sum(p.numel() for p in engine.module.parameters())
    return parameters, median(timed(lambda: take_step(engine, inputs)) for _ in range(3))


def train_classifier(family: str) -> tuple[float, float]:
    """Seconds of a fine-tuning step in fp32."""
    way = ways(family, images=640, models=1, device="cpu")["loop fp32"]
    way(5)
    return FAMILIES[family], median(timed(lambda: way(20)) / 20 for _ in range(5))


def denoise(classes: int) -> tuple[float, float]:
    """Seconds of one denoising step for one prompt."""
    denoiser = new_denoiser("14M").eval()
    x, cond = torch.randn(1, TOKENS + classes, VALUES), torch.randn(1, classes, EMBEDDING)
    mask, t = torch.ones(1, classes, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        denoiser(x, t, cond, mask)
        return classes, median(timed(lambda: denoiser(x, t, cond, mask)) for _ in range(15))


MEASURES: Mapping[str, Callable[[Any], tuple[float, float]]] = {
    "zoo": encode,
    "generator": train_generator,
    "classifier": train_classifier,
    "classes": denoise,
}


def apart(curve: str, place: int) -> dict[str, float]:
    """One point, or with place -1 an idle process, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--point", curve, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def point(curve: str, place: int) -> dict[str, float]:
    """Size, seconds and peak memory of a point in this process."""
    settle_in(threads=1)
    size, seconds = MEASURES[curve](POINTS[curve][place]) if place >= 0 else (0, 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"size": size, "seconds": seconds, "peak_mib": peak}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fit(sizes: list[float], values: list[float]) -> tuple[float, float, float]:
    """a, b and c of the a + b * size^c, a not below 0, with the least relative errors."""
    x, y = np.array(sizes) / sizes[-1], np.array(values)
    found = []
    for c in np.arange(0, 3, 0.01):
        constant, power = 1 / y, x**c / y  # a times the one and b times the other: near 1
        a, b = np.linalg.lstsq(np.stack([constant, power], 1), np.ones(len(y)))[0]
        if a < 0:
            a, b = 0.0, power.sum() / (power @ power)
        error = ((a * constant + b * power - 1) ** 2).sum()
        found.append((float(error), float(a), float(b / sizes[-1] ** c), float(c)))
    return min(found)[1:]


def grown(points: list[dict[str, float]], idle: float, further: float) -> dict[str, Any]:
    """A curve, its exponents, and what is fitted to it, prolonged."""
    sizes, seconds = [p["size"] for p in points], [p["seconds"] for p in points]
    memory = [max(1.0, p["peak_mib"] - idle) for p in points]
    curves = {"seconds": seconds, "mib": memory}
    fits = {name: fit(sizes, values) for name, values in curves.items()}
    ahead = {name: a + b * further**c for name, (a, b, c) in fits.items()}
    return {
        "sizes": sizes,
        "seconds": [float(f"{t:.3g}") for t in seconds],
        "mib": [round(m) for m in memory],
        "exponents": {name: round(exponent(sizes, v), 2) for name, v in curves.items()},
        "fitted": {
            name: {"constant": float(f"{a:.3g}"), "exponent": round(c, 2)}
            for name, (a, _, c) in fits.items()
        },
        "extrapolated": {
            "size": further,
            "seconds": float(f"{ahead['seconds']:.3g}"),
            "mib": round(ahead["mib"]),
        },
    }


def main() -> None:
    """Measure and append; as a child, measure one point and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--point", nargs=2, metavar=("CURVE", "PLACE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(args.point[0], int(args.point[1]))))
        return
    before = load()
    idle = apart("zoo", -1)["peak_mib"]
    figures = {
        curve: grown([apart(curve, i) for i in range(len(sizes))], idle, FURTHER[curve])
        for curve, sizes in POINTS.items()
    }
    append("growth", {"idle_mib": round(idle), **figures}, load_before=before)


if __name__ == "__main__":
    as_command(main)
