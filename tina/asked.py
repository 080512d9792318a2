"""What classes were asked for by, as a generator takes it.

Axes: B batch, K classes, V trained classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


def pad(parts: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack B tensors (K_i, ...) to (B, K, ...) with zeros, and the mask bool (B, K)."""
    most = length or max(len(part) for part in parts)
    stacked = parts[0].new_zeros(len(parts), most, *parts[0].shape[1:])
    mask = torch.zeros(len(parts), most, dtype=torch.bool)
    for i, part in enumerate(parts):
        stacked[i, : len(part)] = part
        mask[i, : len(part)] = True
    return stacked, mask


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What K classes were asked for by, as a generator takes it; of one task or of B.

    Args:
        embeddings: (..., K, E), unit norm: what the denoiser is conditioned on.
        attention: (..., K, V): what rows inherit of, see `Vocabulary.attention`.
        familiarity: (..., K), 0..1; of several words their mean.
        weakest: (..., K), the familiarity of the strangest of them.
        breadth: (..., K), the Jensen-Shannon divergence of what they inherit of: log M for M words
            of different names, 0 for one word, or for several that mean the same.
    """

    embeddings: Tensor
    attention: Tensor
    familiarity: Tensor
    weakest: Tensor
    breadth: Tensor


def together(tasks: Sequence[Asked]) -> tuple[Asked, Tensor]:
    """B tasks as one, padded to the most classes, and the mask bool (B, K)."""
    names = [field.name for field in fields(Asked)]
    padded = {name: pad([getattr(task, name) for task in tasks]) for name in names}
    return Asked(**{name: values for name, (values, _) in padded.items()}), padded["breadth"][1]
