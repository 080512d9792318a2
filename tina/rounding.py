"""Tensors rounded for a small checkpoint, and back.

Half precision, or, of matrices, eight bits: integers from -127 to 127 and a scale for each row, as
weights are quantized per channel (Krishnamoorthi 2018, 1806.08342, sections 2.2 and 2.4). Reading
either gives full precision again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"
"""Ends the name of the scales of an eight-bit matrix."""
MOST = 127


def in_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that is floating in half precision."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def in_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (..., m) as int8 beside bfloat16 scales (...) of their rows, all else in half.

    No value moves by more than half its row's scale, which is the row's largest magnitude / 127.
    So short a scale makes products with it exact: rounded again, a matrix is the same.
    """
    found = in_half(tensors)
    for name, value in tensors.items():
        if value.ndim > 1 and value.is_floating_point():
            scale = (value.float().abs().amax(-1) / MOST).bfloat16()
            steps = value / scale.float().where(scale > 0, 1).unsqueeze(-1)
            found |= {name: steps.round().to(torch.int8), name + SCALE: scale}
    return found


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors from either; what was saved in full stays as it is.

    Raises:
        KeyError: An eight-bit matrix has no scales.
        RuntimeError: They are not one for each row.
    """
    found = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    for name, value in tensors.items():
        if value.dtype == torch.int8:
            scale = tensors[name + SCALE].float().reshape(*value.shape[:-1], 1)
            found[name] = value.float() * scale
            del found[name + SCALE]
    return found
