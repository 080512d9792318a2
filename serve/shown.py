"""Rows of numbers in a recipe: embeddings of pictures, and what examples add to a head.

Pictures themselves are not kept: any replica makes the model again without them.

Axes: K classes, R values of a head row.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tina.model import GeneratedModel
from tina.pipeline import TinaPipeline


def pack_rows(rows: Tensor) -> str:
    """base64 of float32 (K, ...)."""
    return base64.b64encode(rows.numpy().tobytes()).decode()


def unpack_rows(packed: str, count: int) -> Tensor:
    """Inverse of `pack_rows`, for so many rows."""
    values = np.frombuffer(base64.b64decode(packed), np.float32)
    return torch.from_numpy(values.copy()).view(count, -1)


def shift_by(
    pipe: TinaPipeline, model: GeneratedModel, embedding: Tensor, examples: Sequence[Tensor]
) -> str:
    """What examples, small pictures (N, C, H, W) of each class, add to a model's head rows."""
    layout = model.family.layout(len(model.class_names))
    after = pipe.learn_from(model, embedding, examples)
    return pack_rows(layout.split(after.theta)[1] - layout.split(model.theta)[1])


def shifted(model: GeneratedModel, shift: str) -> GeneratedModel:
    """A model with that added to its head rows."""
    layout = model.family.layout(len(model.class_names))
    body, rows = layout.split(model.theta)
    return replace(model, theta=layout.join(body, rows + unpack_rows(shift, len(rows))))
