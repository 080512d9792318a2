"""theta <-> tokens: what the diffusion transformer denoises.

Axes: B batch, L tokens = S body tokens + K row tokens, P values per token, K classes,
n_body parameters before the head, R values of a head row.

The body's tensors are cut into chunks of at most `chunk` values that never cross a layer; each head
row (weights and bias) is one token, so that row k meets class k's condition. What is coded is the
*residual* on what the task would inherit from the generic model, divided by one scale per layer
(root mean square over the zoo): a token sequence of zeros decodes to classifier selection exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tina.errors import ConfigError
from tina.layout import ParamLayout


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Exact, linear map between residuals and tokens.

    Args:
        layout: Layout of the family at any number of classes; only body and row size are used.
        chunk: Most values in a token of the body.
        body_scale: (n_body,), positive, constant within a layer.
        row_scale: (R,), positive: one value for the weights, one for the bias.
    """

    layout: ParamLayout
    chunk: int
    body_scale: Tensor
    row_scale: Tensor

    def __post_init__(self) -> None:
        if self.row_scale.shape != (self.layout.row_size,):
            raise ConfigError(
                f"row_scale has {self.row_scale.numel()} values, a row has {self.layout.row_size}"
            )
        if self.body_scale.shape != (self.layout.body_size,):
            raise ConfigError(
                f"body_scale has {self.body_scale.numel()} values, "
                f"the body has {self.layout.body_size}"
            )

    @cached_property
    def body_index(self) -> Tensor:
        """int64 (S, P): the place in the body of each token's values, -1 for padding."""
        pieces = []
        for slot in self.layout.body:
            place = torch.arange(slot.offset, slot.offset + slot.numel)
            pieces += list(place.split(self.chunk))
        index = torch.full((len(pieces), self.width), -1)
        for row, piece in zip(index, pieces, strict=True):
            row[: len(piece)] = piece
        return index

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
        body = body / self.body_scale.to(body)
        # one zero behind the body is what the index -1 reads
        body = torch.cat([body, body.new_zeros(len(body), 1)], 1)
        pad = self.width - self.layout.row_size
        rows = torch.nn.functional.pad(rows / self.row_scale.to(rows), (0, pad))
        return torch.cat([body[:, self.body_index.to(body.device)], rows], 1)

    def decode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Exact inverse of `encode`; differentiable. Values of padding are ignored."""
        index = self.body_index.to(tokens.device)
        body = tokens[:, : self.body_tokens][:, index >= 0]
        rows = tokens[:, self.body_tokens :, : self.layout.row_size]
        return body * self.body_scale.to(body), rows * self.row_scale.to(rows)


def fit_codec(
    layout: ParamLayout, *, chunk: int, body: Tensor, rows: Tensor, class_mask: Tensor
) -> Codec:
    """A codec whose scales are the residuals' root mean squares per layer.

    Args:
        body: Residuals (B, n_body) of the zoo's training p-models.
        rows: Residuals (B, K, R); rows of absent classes are ignored.
        class_mask: bool (B, K).

    Raises:
        ConfigError: A layer's residuals are all zero, so the p-models teach nothing there.
    """
    body_scale = torch.empty(layout.body_size)
    for slot in layout.body:
        part = slice(slot.offset, slot.offset + slot.numel)
        body_scale[part] = body[:, part].square().mean().sqrt()
    present = rows[class_mask]
    row_scale = torch.empty(layout.row_size)
    row_scale[:-1] = present[:, :-1].square().mean().sqrt()
    row_scale[-1] = present[:, -1].square().mean().sqrt()
    if not bool((torch.cat([body_scale, row_scale]) > 0).all()):
        raise ConfigError("the p-models do not differ from the generic model: train them longer")
    return Codec(layout=layout, chunk=chunk, body_scale=body_scale, row_scale=row_scale)
