"""The denoiser: a diffusion transformer over weight tokens, conditioned on class embeddings.

Axes: B batch, S body tokens, K classes (padded to the batch's most), L = S + K weight tokens,
P values per token, R values of a head row, D model width, E embedding width.

Sequence: S body tokens, K row tokens, K condition tokens. Row token k and condition token k both
carry class k's embedding; nothing else tells rows apart, so permuting the classes permutes the rows
of the result exactly. The timestep enters by adaptive layer norm (Peebles & Xie 2023, 3.2).
The output layers start at zero: the untrained denoiser predicts x0 = 0, which is classifier
selection. The blocks' gates start open, unlike adaLN-Zero's: closed ones would keep the classes
from the body tokens for the first hundreds of steps (docs/log.md).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tina.config import DenoiserConfig

QUIET = 0.1
"""Initial scale of the noisy tokens' projections beside the positions' and conditions' unit scale:
at high noise x_t says nothing, and would drown what does."""


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids (B, width) of integer or real timesteps (B,), as in Vaswani et al. 2017."""
    half = width // 2
    rate = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = t.float().unsqueeze(1) * rate
    return torch.cat([angle.cos(), angle.sin()], 1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the timestep."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():  # shift, scale, gate: the gates start open
            self.modulation.bias.copy_(torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(width))

    def forward(self, x: Tensor, modulation: Tensor, attend: Tensor) -> Tensor:
        """x (B, T, D), what `modulation` says of the timestep (B, 6D), attend bool (B, 1, 1, T)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, -1)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)  # (B, T, D)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)  # (B, heads, T, D / heads)
        x = torch.addcmul(x, gate1, self.proj(h.transpose(1, 2).flatten(2)))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.mlp(h))


class Denoiser(nn.Module):
    """`denoise(x, t, cond, mask) -> x0`, the one contract of samplers and losses.

    Args:
        body_tokens: S.
        token_width: P.
        row_width: R, at most P.
        embedding_width: E.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        *,
        body_tokens: int,
        token_width: int,
        row_width: int,
        embedding_width: int,
    ) -> None:
        super().__init__()
        d = config.width
        self.body_tokens, self.row_width = body_tokens, row_width
        self.checkpointing = False  # recompute the blocks' activations in the backward pass
        # each body token has a projection of its own in and out: position s always means the same
        # weights; rows share one, as any class may stand at any row
        self.body_in = nn.Parameter(
            torch.randn(body_tokens, token_width, d) * QUIET / token_width**0.5
        )
        self.body_out = nn.Parameter(torch.zeros(body_tokens, d, token_width))
        self.position = nn.Parameter(torch.randn(body_tokens, d))
        self.row_in = nn.Linear(row_width, d)
        self.row_out = nn.Linear(d, row_width)
        self.row_cond = nn.Linear(embedding_width, d)
        self.set_cond = nn.Linear(embedding_width, d)
        self.token_cond = nn.Linear(embedding_width, d)
        self.null_cond = nn.Parameter(torch.randn(embedding_width) / embedding_width**0.5)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.modulation = nn.Linear(d, 2 * d)
        with torch.no_grad():
            self.row_in.weight.mul_(QUIET)
        for layer in (self.row_out, self.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor, mask: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Predict x0.

        Args:
            x: (B, S + K, P), noisy tokens.
            t: (B,), timesteps.
            cond: (B, K, E), one embedding per class.
            mask: bool (B, K), false for padding.
            drop: bool (B,), samples whose condition is replaced by the learnt null condition.

        Returns:
            (B, S + K, P); rows of padding and columns beyond R are zero.
        """
        return self.predict(x, self.modulate(t), self.prepare(cond, mask, drop), mask)

    def prepare(self, cond: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """All that the conditions (B, K, E) bring to any step, whatever x and t: (B, K, 3D).

        Per class what its row token gets and its condition token, then what every token gets.
        """
        if drop is not None:
            cond = torch.where(drop[:, None, None], self.null_cond.to(cond), cond)
        # the classes as a set, at unit scale: attention alone starts as a mean over all tokens, in
        # which they are a few hundredths of what the output layers read
        count = mask.sum(1, keepdim=True).clamp_min(1)
        of_set = self.set_cond((cond * mask.unsqueeze(-1)).sum(1) / count.sqrt()).unsqueeze(1)
        own = [self.row_cond(cond), self.token_cond(cond)]
        return torch.cat([*own, of_set.expand_as(own[0])], -1)

    def modulate(self, t: Tensor) -> Tensor:
        """All that timesteps (B,) bring, whatever x and the conditions: (B, (6 depth + 2) D)."""
        embedding = timestep_embedding(t, self.position.shape[1]).to(self.position)
        c = F.silu(self.time(embedding))
        layers = [*(cast(Block, block).modulation for block in self.blocks), self.modulation]
        return torch.cat([layer(c) for layer in layers], -1)

    def predict(self, x: Tensor, modulation: Tensor, prepared: Tensor, mask: Tensor) -> Tensor:
        """Predict x0 as `forward` does, from what `modulate` and `prepare` return."""
        s, k = self.body_tokens, mask.shape[1]
        of_row, of_token, of_set = prepared.chunk(3, -1)
        *modulations, last = modulation.split(6 * self.position.shape[1], -1)
        body = torch.einsum("bsp,spd->bsd", x[:, :s], self.body_in) + self.position + of_set[:, :1]
        rows = self.row_in(x[:, s:, : self.row_width]) + of_row + of_set
        h = torch.cat([body, rows, of_token], 1)  # (B, S + 2K, D)
        attend = torch.cat([mask.new_ones(len(x), s), mask, mask], 1)[:, None, None]
        for block, values in zip(self.blocks, modulations, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                # reentrant: the other kind cannot recompute under ZeRO stage 3
                h = checkpoint(block, h, values, attend, use_reentrant=True)
            else:
                h = block(h, values, attend)
        shift, scale = last.unsqueeze(1).chunk(2, -1)
        h = torch.addcmul(shift, self.norm(h[:, : s + k]), 1 + scale)
        body = torch.einsum("bsd,sdp->bsp", h[:, :s], self.body_out)
        rows = self.row_out(h[:, s:]) * mask.unsqueeze(-1)
        return torch.cat([body, F.pad(rows, (0, x.shape[-1] - self.row_width))], 1)
