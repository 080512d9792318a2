"""How long does a training step of a p-model take: fp32 or bf16, loop or stacked?

    python -m benchmarks.classifier_step     # appends a row to results/classifier_step.jsonl

Every variant trains the same models on the same random images in one run, in turns; the medians of
the turns stand beside each other as ratios.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from benchmarks.record import append, as_command, load
from tina.config import RecipeConfig
from tina.families import build_family
from tina.finetune import Lesson, finetune, initial_theta
from tina.inputs import InputStore
from tina.views import Views

MODELS, CLASSES, STEPS, TURNS = 4, 10, 20, 5


def main() -> None:
    """Measure and append."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    before = load()
    torch.set_num_threads(1)
    family = build_family("cnn5k", channels=3, image_size=32)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2000, 3, 32, 32), dtype=torch.uint8, generator=draw)
    store = InputStore(family, Views(images=images))
    labels = torch.arange(2000) % CLASSES
    lessons = [
        Lesson(class_ids=tuple(range(CLASSES)), index=torch.arange(2000), labels=labels, seed=i)
        for i in range(MODELS)
    ]
    thetas = [initial_theta(family, CLASSES, seed=i) for i in range(MODELS)]
    times: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for precision in ("fp32", "bf16"):
            for stacked in (False, True):
                recipe = RecipeConfig(steps=STEPS, batch_size=64, lr=1e-3, precision=precision)
                begin = time.perf_counter()
                finetune(family, thetas, lessons, store, recipe, stacked=stacked)
                spent = (time.perf_counter() - begin) / STEPS / MODELS
                times.setdefault(f"{precision} {'stacked' if stacked else 'loop'}", []).append(
                    spent
                )
    plain = median(times["fp32 loop"])
    figures = {
        "ms_per_model_step": {name: round(1000 * median(t), 2) for name, t in times.items()},
        "speed_up": {name: round(plain / median(t), 2) for name, t in times.items()},
    }
    append("classifier_step", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
