"""MiniLM's network, a small BERT, as a function of its weights.

Axes: T word pieces of one text, D model width, A attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


def minilm(pieces: Tensor, *, weights: Mapping[str, Tensor]) -> Tensor:
    """BERT with 6 layers of 12 heads: word pieces (..., T) -> features (..., T, D)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    kinds = ("word", "position", "token_type")
    words, positions, types = (weights[f"embeddings.{k}_embeddings.weight"] for k in kinds)
    x = words[pieces] + positions[: pieces.shape[-1]] + types[0]  # (..., T, D)
    x = norm(x, "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{index}" for index in range(6)):
        qkv = (linear(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        heads = (part.unflatten(-1, (12, -1)).transpose(-3, -2) for part in qkv)  # (..., A, T, D/A)
        mixed = F.scaled_dot_product_attention(*heads).transpose(-3, -2).flatten(-2)  # (..., T, D)
        x = x + linear(mixed, f"{layer}.attention.output.dense")
        x = norm(x, f"{layer}.attention.output.LayerNorm")
        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))  # (..., T, 4 D)
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x
