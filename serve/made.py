"""What travels from a replica to the ingress, which must not import torch to read it."""

from __future__ import annotations

from dataclasses import dataclass

from serve.ids import Recipe


@dataclass(frozen=True, kw_only=True)
class Made:
    """A generated model as it leaves a replica.

    Args:
        content: The weights in the format that was asked for; empty for JSON.
        anew: Whether it was generated for this request, and not at hand.
    """

    recipe: Recipe
    familiarity: tuple[float, ...]
    nearest: tuple[str, ...]
    warnings: tuple[str, ...]
    family: str
    parameters: int
    input_shape: tuple[int, int, int]
    content: bytes
    anew: bool
