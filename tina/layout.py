"""Where each tensor of a classifier lies in its flat vector theta.

Axes: n values of theta, n_body values before the head, K classes, F features before the head; a
head row has F + 1 values: the weights of `fc`, then the bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tina.errors import CheckpointError, ConfigError

HEAD = "fc"


@dataclass(frozen=True, kw_only=True)
class ParamSlot:
    """One tensor's name, shape and offset in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ParamLayout:
    """Where each tensor of a classifier lies in its flat vector theta: body first, head last."""

    slots: tuple[ParamSlot, ...]

    @classmethod
    def of(cls, module: nn.Module) -> ParamLayout:
        """Derive the layout from a module's named parameters, in their order.

        Raises:
            ConfigError: The module does not end in `fc.weight`, `fc.bias`.
        """
        slots, offset = [], 0
        for name, parameter in module.named_parameters():
            slots.append(ParamSlot(name=name, shape=tuple(parameter.shape), offset=offset))
            offset += parameter.numel()
        if [slot.name for slot in slots[-2:]] != [f"{HEAD}.weight", f"{HEAD}.bias"]:
            raise ConfigError(f"a classifier must end in a Linear named {HEAD} with a bias")
        return cls(slots=tuple(slots))

    @property
    def size(self) -> int:
        """Length of theta."""
        return self.slots[-1].offset + self.slots[-1].numel

    @property
    def body(self) -> tuple[ParamSlot, ...]:
        """The slots before the head."""
        return self.slots[:-2]

    @property
    def body_size(self) -> int:
        """Number of values before the head."""
        return self.slots[-2].offset

    @property
    def num_classes(self) -> int:
        """Rows of the head."""
        return self.slots[-1].numel

    @property
    def row_size(self) -> int:
        """Values of one head row: weights and bias."""
        return self.slots[-2].shape[1] + 1

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of theta (n,) under their parameter names."""
        if theta.shape != (self.size,):
            raise CheckpointError(f"theta must have shape ({self.size},), got {tuple(theta.shape)}")
        return {s.name: theta[s.offset : s.offset + s.numel].view(s.shape) for s in self.slots}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The flat vector (n,) of named tensors; strict in names and shapes.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        want = {s.name: s.shape for s in self.slots}
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if want != got:
            raise CheckpointError(f"weights have another layout: expected {want}, got {got}")
        return torch.cat([tensors[s.name].reshape(-1) for s in self.slots])

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Theta (..., n) as body (..., n_body) and head rows (..., K, F + 1)."""
        body = theta[..., : self.body_size]
        k, f = self.num_classes, self.row_size - 1
        weight = theta[..., self.body_size : self.body_size + k * f].unflatten(-1, (k, f))
        return body, torch.cat([weight, theta[..., self.body_size + k * f :].unsqueeze(-1)], -1)

    def join(self, body: Tensor, rows: Tensor) -> Tensor:
        """Exact inverse of `split`."""
        return torch.cat([body, rows[..., :-1].flatten(-2), rows[..., -1]], -1)

    def to_json(self) -> list[list[object]]:
        """Names and shapes, for the metadata of files."""
        return [[slot.name, list(slot.shape)] for slot in self.slots]
