"""Curvature of the loss around classifier selection, in Kronecker factors: what a codec is made of.

Axes: N samples, K classes, O outputs and I inputs of a layer's weights (a convolution's tensor as
(C_out, C_in k k)), n_body parameters before the head, R values of a head row.

What a change of theta does to a small classifier's answers differs by orders of magnitude between
directions; a generator that learns at one rate in all of them is held back by the steepest. The
Fisher information tells them apart. Of each layer its Kronecker factors are kept, the gradients'
second moments over outputs and over inputs (Gupta et al. 2018, algorithm 1), and the Fisher
information itself on the diagonal of their eigenbasis (George et al. 2018, eq. 11).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from tina.datasets import Dataset
from tina.families import Family
from tina.finetune import Lesson
from tina.generic import GenericModel
from tina.inputs import InputStore
from tina.layout import ParamLayout, ParamSlot
from tina.tasks import ClassIds

IMAGES = 64
"""Images that each task's gradients are taken of."""


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Fisher information of a classifier's layers, in nats per squared unit.

    Args:
        left: Per tensor of the body an orthogonal matrix (O, O), its columns the directions.
        right: Per tensor of the body, (I, I).
        body: (n_body,), along the directions `left^T G right` of each tensor, one after another.
        row_right: (R, R), the same for a head row.
        row: (R,), the mean over a task's rows.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    body: Tensor
    row_right: Tensor
    row: Tensor


def matrix(values: Tensor, slot: ParamSlot) -> Tensor:
    """A tensor's values (..., n_body) out of a body as the matrices (..., O, I) of its layer."""
    part = values[..., slot.offset : slot.offset + slot.numel]
    return part.unflatten(-1, (slot.shape[0], -1))


def measure_curvature(
    family: Family,
    generic: GenericModel,
    dataset: Dataset,
    store: InputStore,
    tasks: Sequence[ClassIds],
    *,
    seed: int,
) -> Curvature:
    """Curvature at classifier selection, the mean over tasks, on `fit` images.

    Args:
        tasks: Sets of seen classes.
        seed: Draws the images, and the labels that the classifier gives them.
    """
    layout = family.layout(2)
    sides = [(slot.shape[0], slot.numel // slot.shape[0]) for slot in layout.body]
    outer = [torch.zeros(o, o).double() for o, _ in sides]
    inner = [torch.zeros(i, i).double() for _, i in sides]
    of_rows = torch.zeros(layout.row_size, layout.row_size).double()

    def gradients() -> Iterator[tuple[Tensor, Tensor]]:
        return _gradients(family, generic, dataset, store, tasks, seed)

    for body, rows in gradients():
        for i, slot in enumerate(layout.body):
            g = matrix(body, slot)
            outer[i] += torch.einsum("noi,npi->op", g, g)
            inner[i] += torch.einsum("noi,noj->ij", g, g)
        of_rows += torch.einsum("nkr,nkq->rq", rows, rows) / rows.shape[1]
    left, right = [_directions(m) for m in outer], [_directions(m) for m in inner]
    row_right = _directions(of_rows)

    # gradients are computed twice rather than kept: those of a larger classifier are gigabytes
    along_body = torch.zeros(layout.body_size).double()
    along_row, samples = torch.zeros(layout.row_size).double(), 0
    for body, rows in gradients():
        turned = rotate(layout, body.float(), left, right)
        along_body += turned.square().sum(0)
        along_row += (rows.float() @ row_right).square().mean(1).sum(0)
        samples += len(rows)
    return Curvature(
        left=tuple(left),
        right=tuple(right),
        body=(along_body / samples).float(),
        row_right=row_right,
        row=(along_row / samples).float(),
    )


def rotate(
    layout: ParamLayout, body: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]
) -> Tensor:
    """Bodies (B, n_body) along the directions: left^T W right of each tensor W.

    With the transposed matrices it is its own inverse.
    """
    parts = [
        (a.T @ matrix(body, slot) @ b).flatten(1)
        for slot, a, b in zip(layout.body, left, right, strict=True)
    ]
    return torch.cat(parts, 1) if parts else body


def _directions(moment: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, the largest eigenvalue's first.

    Laid out as a file holds them: some processors round a product by its factors' strides, and a
    codec that was read is to compute as the one that was written.
    """
    return torch.linalg.eigh(moment).eigenvectors.flip(1).float().contiguous()


def _gradients(
    family: Family,
    generic: GenericModel,
    dataset: Dataset,
    store: InputStore,
    tasks: Sequence[ClassIds],
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per task the gradients of its images: body (N, n_body) and rows (N, K, R), float64.

    Labels are drawn from the classifier's own answer: with the true ones the second moment would
    be the empirical Fisher information, which is none (Kunstner et al. 2019).
    """
    draw = torch.Generator().manual_seed(seed)

    def logits(body: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
        theta = family.layout(len(rows)).join(body, rows)
        return family.logits(theta, inputs, num_classes=len(rows))

    def loss(body: Tensor, rows: Tensor, inputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits(body, rows, inputs[None]), label[None])

    for class_ids in tasks:
        index = Lesson.of(dataset, class_ids, seed=seed).index
        inputs = store[index[torch.randint(len(index), (IMAGES,), generator=draw)]]
        own = (generic.body, generic.select(class_ids))
        with torch.no_grad():
            answers = logits(*own, inputs).softmax(1)
        labels = torch.multinomial(answers, 1, generator=draw)[:, 0]
        of_body, of_rows = vmap(grad(loss, (0, 1)), (None, None, 0, 0))(*own, inputs, labels)
        yield of_body.double(), of_rows.double()
