"""theta <-> tokens: what the diffusion transformer denoises.

Axes: B batch, L tokens = S body tokens + K row tokens, P values per token, K classes,
n_body parameters before the head, R values of a head row.

What is coded is the *residual* on what the task would inherit from the generic model: a token
sequence of zeros decodes to classifier selection exactly. Each layer's residual is turned into the
eigenbasis of its curvature (`tina.curvature`) and divided by one scale per direction, so that a
step of the same length changes a classifier's answers about as much in any direction that counts.
A layer's values, steepest direction first, are cut into chunks of at most `chunk` that never cross
a layer; each head row (weights and bias) is one token, so that row k meets class k's condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tina.curvature import Curvature, rotate
from tina.errors import ConfigError
from tina.layout import ParamLayout

DAMPING = 0.2
"""A token's unit is DAMPING / sqrt(Fisher + DAMPING^2): where it is steep, what changes the loss by
DAMPING^2 / 2 nats, and where it is flat, a change of one, about the size of a weight."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Exact, linear map between residuals and tokens.

    Args:
        layout: Layout of the family at any number of classes; only body and row size are used.
        chunk: Most values in a token of the body.
        left: Per tensor of the body (O, I) an orthogonal matrix (O, O).
        right: Per tensor of the body, (I, I).
        body_scale: (n_body,), positive: the unit along each direction, tensor by tensor.
        row_right: Orthogonal (R, R), the same for a head row.
        row_scale: (R,), positive.
    """

    layout: ParamLayout
    chunk: int
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    body_scale: Tensor
    row_right: Tensor
    row_scale: Tensor

    def __post_init__(self) -> None:
        found = self.tensors()
        for name, shape in codec_shapes(self.layout).items():
            if found[name].shape != shape:
                raise ConfigError(
                    f"the codec's {name} has shape {tuple(found[name].shape)}, "
                    f"the classifier needs {shape}"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps of it, by name; `of` is the inverse."""
        return {
            "body_scale": self.body_scale,
            "row_scale": self.row_scale,
            "row_right": self.row_right,
            **{f"left.{i}": value for i, value in enumerate(self.left)},
            **{f"right.{i}": value for i, value in enumerate(self.right)},
        }

    @classmethod
    def of(cls, layout: ParamLayout, *, chunk: int, tensors: Mapping[str, Tensor]) -> Codec:
        """The codec with the tensors that `codec_shapes` names.

        Raises:
            ConfigError: One has another shape.
        """
        places = range(len(layout.body))
        return cls(
            layout=layout,
            chunk=chunk,
            left=tuple(tensors[f"left.{i}"] for i in places),
            right=tuple(tensors[f"right.{i}"] for i in places),
            body_scale=tensors["body_scale"],
            row_right=tensors["row_right"],
            row_scale=tensors["row_scale"],
        )

    @cached_property
    def body_index(self) -> Tensor:
        """int64 (S, P): along which of the body's directions each value lies, -1 for padding."""
        pieces = []
        for slot in self.layout.body:
            unit = self.body_scale[slot.offset : slot.offset + slot.numel]
            place = slot.offset + unit.argsort(stable=True)
            pieces += list(place.split(self.chunk))
        index = torch.full((len(pieces), self.width), -1)
        for row, piece in zip(index, pieces, strict=True):
            row[: len(piece)] = piece
        return index

    @cached_property
    def _places(self) -> Tensor:
        """int64 (n_body,): where in the body tokens' values, one after another, each lies."""
        index = self.body_index.flatten()
        filled = torch.nonzero(index >= 0).flatten()
        return filled[index[filled].argsort()]

    @cached_property
    def width(self) -> int:
        """P, values per token."""
        body = max((min(self.chunk, slot.numel) for slot in self.layout.body), default=0)
        return max(body, self.layout.row_size)

    @property
    def body_tokens(self) -> int:
        """S, tokens of the body."""
        return len(self.body_index)

    def valid(self, class_mask: Tensor) -> Tensor:
        """bool (B, L, P): the values that carry something, for a mask of classes (B, K)."""
        body = (self.body_index >= 0).to(class_mask.device).expand(len(class_mask), -1, -1)
        row = torch.arange(self.width, device=class_mask.device) < self.layout.row_size
        return torch.cat([body, class_mask.unsqueeze(-1) & row], 1)

    def encode(self, body: Tensor, rows: Tensor) -> Tensor:
        """Tokens (B, S + K, P) of residuals body (B, n_body) and rows (B, K, R)."""
        left, right = self._turned(body, back=False)
        body = rotate(self.layout, body, left, right) / self.body_scale.to(body)
        # one zero behind the body is what the index -1 reads
        body = torch.cat([body, body.new_zeros(len(body), 1)], 1)
        pad = self.width - self.layout.row_size
        rows = rows @ self.row_right.to(rows) / self.row_scale.to(rows)
        rows = torch.nn.functional.pad(rows, (0, pad))
        return torch.cat([body[:, self.body_index.to(body.device)], rows], 1)

    def decode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Exact inverse of `encode`; differentiable. Values of padding are ignored."""
        # an autocast would round the directions, and with them what is turned
        with torch.autocast(tokens.device.type, enabled=False):
            body = tokens[:, : self.body_tokens].flatten(1)[:, self._places.to(tokens.device)]
            body = body * self.body_scale.to(body)
            left, right = self._turned(body, back=True)
            rows = tokens[:, self.body_tokens :, : self.layout.row_size]
            rows = (rows * self.row_scale.to(rows)) @ self.row_right.T.to(rows)
            return rotate(self.layout, body, left, right), rows

    def _turned(self, like: Tensor, *, back: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The matrices of the body, on a tensor's device; their transposes turn it back."""
        left, right = ([m.to(like) for m in side] for side in (self.left, self.right))
        return ([m.T for m in left], [m.T for m in right]) if back else (left, right)


def codec_shapes(layout: ParamLayout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layout's codec."""
    sides = [(slot.shape[0], slot.numel // slot.shape[0]) for slot in layout.body]
    return {
        "body_scale": (layout.body_size,),
        "row_scale": (layout.row_size,),
        "row_right": (layout.row_size, layout.row_size),
        **{f"left.{i}": (o, o) for i, (o, _) in enumerate(sides)},
        **{f"right.{i}": (n, n) for i, (_, n) in enumerate(sides)},
    }


def fit_codec(layout: ParamLayout, curvature: Curvature, *, chunk: int) -> Codec:
    """The codec whose unit is `DAMPING` / sqrt(Fisher + `DAMPING`^2) along each direction."""
    body_scale, row_scale = (
        DAMPING / (fisher + DAMPING**2).sqrt() for fisher in (curvature.body, curvature.row)
    )
    return Codec(
        layout=layout,
        chunk=chunk,
        left=curvature.left,
        right=curvature.right,
        body_scale=body_scale,
        row_right=curvature.row_right,
        row_scale=row_scale,
    )
