"""Classifiers of given weights: one as a module, the logits of many, and their class counts.

Axes: M models, N images, C channels, H W sides in pixels, K classes, F features before the head,
n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from tina.errors import NonFiniteError
from tina.families import Family
from tina.images import checked
from tina.inputs import InputStore


class Classifier(nn.Module):
    """A classifier that takes photographs: uint8, or float in [0, 1], (N, C, H, W) of any size.

    Args:
        theta: (n,), laid out as `family.layout(len(class_names))`.

    Raises:
        NonFiniteError: Theta holds NaN or infinity.
    """

    def __init__(self, family: Family, theta: Tensor, class_names: tuple[str, ...]) -> None:
        super().__init__()
        if not bool(torch.isfinite(theta).all()):
            raise NonFiniteError("theta holds NaN or infinity; no classifier is made of it")
        self.family, self.class_names = family, class_names
        self.network = family.module(len(class_names)).requires_grad_(False)
        self.network.load_state_dict(family.layout(len(class_names)).unflatten(theta.clone()))
        # its own: what is done to one classifier must not reach the others
        self.trunk = deepcopy(family.trunk) if family.has_trunk else nn.Identity()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K); cuts the centre square, resizes (`Family.look_at`), normalises."""
        images = checked(images, channels=self.family.channels)
        x = self.family.scale(self.family.look_at(images))
        kind = next(self.network.parameters()).dtype  # it may have been made another, as by half()
        return cast(Tensor, self.network(self.trunk(x.to(kind))))

    def train(self, mode: bool = True) -> Classifier:
        """As torch has it; but a trunk is not trained, and its statistics stay what they were."""
        super().train(mode)
        self.trunk.eval()
        return self


@torch.no_grad()
def predict(
    family: Family, theta: Tensor, store: InputStore, index: Tensor, *, num_classes: int
) -> Tensor:
    """Logits (N, K) on the images at index (N,), in batches whose activations stay in cache."""
    pieces = index.split(256)
    return torch.cat([family.logits(theta, store[x], num_classes=num_classes) for x in pieces])


@torch.no_grad()
def widen(family: Family, theta: Tensor, num_classes: int, most: int) -> Tensor:
    """Theta of K classes laid out for more; rows of absent classes are zero."""
    body, rows = family.layout(num_classes).split(theta)
    return family.layout(most).join(body, F.pad(rows, (0, 0, 0, most - num_classes)))


@torch.no_grad()
def narrow(family: Family, theta: Tensor, num_classes: int, most: int) -> Tensor:
    """Theta of the first K classes, from one that is laid out for more: undoes `widen`."""
    body, rows = family.layout(most).split(theta)
    return family.layout(num_classes).join(body, rows[:num_classes])


def predict_many(
    family: Family, thetas: Sequence[Tensor], counts: Sequence[int], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Logits (N_i, K_i) of M classifiers, each on inputs of its own, in one stacked pass.

    Args:
        thetas: M vectors, the i-th laid out for K_i classes.
        counts: K_i.
        inputs: M tensors (N_i, ...), as `Family.embed` returned them.
    """
    most, longest = max(counts), max(len(x) for x in inputs)
    stacked = torch.zeros(len(thetas), family.layout(most).size)
    padded = inputs[0].new_zeros(len(inputs), longest, *inputs[0].shape[1:])
    for i, (theta, count, x) in enumerate(zip(thetas, counts, inputs, strict=True)):
        stacked[i] = widen(family, theta, count, most)
        padded[i, : len(x)] = x
    logits = vmap(partial(family.logits, num_classes=most))(stacked, padded)
    return [logits[i, : len(x), :k] for i, (x, k) in enumerate(zip(inputs, counts, strict=True))]
