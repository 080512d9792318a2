"""Softmax's sparse sibling.

Axes: V scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of scores (..., V) onto the simplex (Martins & Astudillo 2016, alg. 1).

    Sparse where softmax is only small: scores that lead by 1 or more get a weight of exactly one.
    """
    scores = scores - scores.amax(-1, keepdim=True)  # of large ones the 1 below would be lost
    ordered = scores.sort(-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    excess = ordered.cumsum(-1) - 1
    support = (rank * ordered > excess).sum(-1, keepdim=True)
    return (scores - excess.gather(-1, support - 1) / support).clamp_min(0)
