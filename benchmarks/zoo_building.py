"""How many p-models a second: Tina's loop beside the one that anyone would write.

    python -m benchmarks.zoo_building     # appends a row to results/zoo_building.jsonl

Every way trains the same models on the same random pictures, turn by turn on one thread (or the
GPU); the medians of the turns stand beside each other as ratios.

    plain      pictures through a DataLoader, ToTensor and Normalize; an nn.Module;
               torch.optim.AdamW; fp32. For a head, the frozen trunk runs on every batch.
    resident   the same with all inputs in one tensor, scaled beforehand
    loop       `tina.finetune`, one model after the other: what `build_zoo` does on CPU
    stacked    all models in one step: what it does on a GPU
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from benchmarks.record import append, as_command, load
from ray_jobs.process import settle_in
from tina.config import Precision, RecipeConfig
from tina.families import Family, build_family
from tina.finetune import Lesson, annealed, batch_order, finetune, initial_theta
from tina.inputs import InputStore
from tina.precision import has_bf16
from tina.views import Views

CLASSES, IMAGES, TURNS = 10, 4500, 7
CNN, HEAD = "cnn5k", "resnet20_head"


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded pictures and their labels, as data sets of torchvision give them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.labels = labels.tolist()
        self.transform = Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def train_plainly(
    network: nn.Module,
    trunk: nn.Module | None,
    inputs: Pictures | tuple[Tensor, Tensor],
    recipe: RecipeConfig,
    *,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    """Train a classifier as a tutorial would, on the same batches as `tina.finetune`.

    Args:
        inputs: Pictures for a DataLoader; or scaled images (N, C, H, W) and labels (N,).
    """
    count = len(inputs[1]) if isinstance(inputs, tuple) else len(inputs)
    order = batch_order(count, recipe.batch_size, recipe.steps, seed=seed)
    batches: Iterable[Any] = (
        ((inputs[0][index], inputs[1][index]) for index in order)
        if isinstance(inputs, tuple)
        else DataLoader(inputs, batch_sampler=order.tolist())
    )
    network.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=0.0)
    warmup = int(recipe.warmup * recipe.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: annealed(step, recipe.steps, warmup=warmup)
    )
    for x, labels in batches:
        x, labels = x.to(device), labels.to(device)
        if trunk is not None:
            with torch.no_grad():
                x = trunk(x)
        optimiser.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimiser.step()
        schedule.step()
    return network


def module_of(family: Family, theta: Tensor) -> nn.Module:
    """The family's network with given weights, to be trained."""
    network = family.module(CLASSES)
    network.load_state_dict(family.layout(CLASSES).unflatten(theta.clone()))
    return network


def ways(name: str, *, images: int, models: int, device: str) -> dict[str, Callable[[int], object]]:
    """Every way to train the models for a number of steps."""
    family = build_family(name, channels=3, image_size=32)
    trunk = None
    if family.trains_trunk:
        trunk = family.new_trunk().to(device)
        family.attach_trunk(trunk)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.arange(images) % CLASSES
    store = InputStore(family, Views(images=pixels), device=device)
    pictures = Pictures(pixels, labels)
    scaled = Family.scale(pixels).to(device), labels.to(device)
    lessons = [
        Lesson(class_ids=tuple(range(CLASSES)), index=torch.arange(images), labels=labels, seed=i)
        for i in range(models)
    ]
    thetas = [initial_theta(family, CLASSES, seed=i).to(device) for i in range(models)]

    def plainly(inputs: Pictures | tuple[Tensor, Tensor]) -> Callable[[int], object]:
        return lambda steps: [
            train_plainly(
                module_of(family, theta),
                trunk,
                inputs,
                RecipeConfig(steps=steps),
                seed=i,
                device=device,
            )
            for i, theta in enumerate(thetas)
        ]

    def ours(precision: Precision, *, stacked: bool) -> Callable[[int], object]:
        return lambda steps: finetune(
            family,
            thetas,
            lessons,
            store,
            RecipeConfig(steps=steps, precision=precision),
            stacked=stacked,
        )

    found = {"plain": plainly(pictures), "resident": plainly(scaled)}
    with_bf16 = has_bf16() and not family.has_trunk
    precisions: list[Precision] = ["fp32", "bf16"] if with_bf16 else ["fp32"]
    for precision in precisions:
        found[f"loop {precision}"] = ours(precision, stacked=False)
        found[f"stacked {precision}"] = ours(precision, stacked=True)
    return found


def measure(
    found: dict[str, Callable[[int], object]], *, models: int, steps: int
) -> dict[str, object]:
    """Milliseconds per model and step of each way, and how much faster it is than the plain one."""
    times: dict[str, list[float]] = {}
    for turn in range(TURNS + 1):
        for name, way in found.items():
            begin = time.perf_counter()
            way(steps)
            if turn:  # the first warms up
                times.setdefault(name, []).append((time.perf_counter() - begin) / steps / models)
    medians: dict[str, float] = {name: median(t) for name, t in times.items()}
    return {
        "ms_per_model_step": {name: round(1000 * t, 3) for name, t in medians.items()},
        "times_plain": {name: round(medians["plain"] / t, 2) for name, t in medians.items()},
        "times_resident": {name: round(medians["resident"] / t, 2) for name, t in medians.items()},
    }


def main() -> None:
    """Measure and append."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    before = load()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settle_in(threads=1)
    models, steps = (256, 20) if device == "cuda" else (2, 20)
    figures = {
        name: measure(
            ways(name, images=IMAGES, models=models, device=device), models=models, steps=steps
        )
        for name in (CNN, HEAD)
    }
    append("zoo_building", {"device": device, "batch_size": 64, **figures}, load_before=before)


if __name__ == "__main__":
    as_command(main)
