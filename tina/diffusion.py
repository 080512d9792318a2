"""Noise schedule and samplers over weight tokens. A schedule is data, a sampler a list of `Step`s.

Axes: B batch, L tokens, P values per token, K classes, E embedding width.

Forward process (Ho et al. 2020, eq. 4): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Losses and
samplers see a prediction of x_0, whatever the network predicts (`as_x0`): at any t it decodes to a
classifier.

Why not diffusers' schedulers, which tests/test_diffusion.py holds these to: their import costs as
much processor time as torch's and Ray's together, in every worker and replica, and their DDIM
misses x_0 where the number of steps does not divide T (docs/log.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tina.config import DiffusionConfig
from tina.errors import ConfigError

Denoise = Callable[..., Tensor]
"""`denoise(x (B, L, P), t (B,), cond (B, K, E), mask (B, K), drop=None) -> x0 (B, L, P)`."""


@lru_cache
def _levels(config: DiffusionConfig) -> np.ndarray:
    """abar_t, (T,) float64: the product of 1 - beta up to t."""
    n = config.timesteps
    if config.schedule == "none":
        return np.zeros(n)
    if config.schedule == "linear":
        # ends given for T = 1000, scaled so that abar_T is nearly the same at any large T
        betas = np.linspace(*config.beta_range, n) * 1000 / n
    else:  # Nichol & Dhariwal 2021, eq. 17
        curve = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return np.cumprod(1 - betas)


@lru_cache
def signal_level(config: DiffusionConfig) -> Tensor:
    """abar_t, (T,) float32, falling from about 1 to about 0. Not to be written into."""
    return torch.from_numpy(_levels(config)).float()


@dataclass(frozen=True, kw_only=True)
class Step:
    """x <- keep x + move x0 + back x0_before + noise z, with z a fresh unit normal draw.

    Args:
        t: Timestep of x.
    """

    t: int
    keep: float
    move: float
    back: float = 0.0
    noise: float = 0.0


@lru_cache
def plan(config: DiffusionConfig, steps: int) -> tuple[Step, ...]:
    """The steps from x_T to x_0, at timesteps evenly spaced down from T - 1 ("trailing").

    - ddim: Song et al. 2021, eq. 12 at sigma = 0; the first order of DPM-Solver++.
    - dpm++: its second-order multistep form, Lu et al. 2022, algorithm 2; first order at both ends.
    - ddpm: Ho et al. 2020, eq. 7, from t to the next of the timesteps.
    """
    most = config.timesteps
    times = np.rint(most - np.arange(steps) * (most / steps)).astype(int) - 1
    now = _levels(config)[times]
    after = np.append(now[1:], 1.0)  # abar of where a step leads: to x_0 in the end
    rows = []
    for i, (t, a, b) in enumerate(zip(times.tolist(), now.tolist(), after.tolist(), strict=True)):
        if i == steps - 1:
            rows.append(Step(t=t, keep=0.0, move=1.0))
        elif config.sampler == "ddpm":
            alpha = a / b
            rows.append(
                Step(
                    t=t,
                    keep=math.sqrt(alpha) * (1 - b) / (1 - a),
                    move=math.sqrt(b) * (1 - alpha) / (1 - a),
                    noise=math.sqrt((1 - b) / (1 - a) * (1 - alpha)),
                )
            )
        else:
            keep = math.sqrt((1 - b) / (1 - a))
            move = math.sqrt(b) - keep * math.sqrt(a)
            back = 0.0
            if config.sampler == "dpm++" and i:
                # 1 / (2 r), r the last step's length over this one's, in log-SNR
                last = _half_log_snr(a) - _half_log_snr(float(now[i - 1]))
                back = -move * (_half_log_snr(b) - _half_log_snr(a)) / last / 2
            rows.append(Step(t=t, keep=keep, move=move - back, back=back))
    return tuple(rows)


def _half_log_snr(abar: float) -> float:
    """lambda of Lu et al. 2022."""
    return 0.5 * math.log(abar / (1 - abar))


def as_x0(network: Denoise, config: DiffusionConfig) -> Denoise:
    """The denoiser that a network stands for: its output at (x_t, t) turned into x_0.

    With v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, section 4),
    x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v. A zero output then says x_0 = sqrt(abar_t) x_t, the
    posterior mean of unit normal tokens: the untrained generator makes residuals of pure noise, not
    classifier selection. No preconditioning mends that: for zero to mean x_0 = 0 the network would
    have to add x_t's share back itself, and what is left is x_0 prediction, scaled.
    """
    if config.prediction == "x0":
        return network

    def denoise(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        abar = signal_level(config).to(x.device)[t].view(-1, 1, 1)
        return abar.sqrt() * x - (1 - abar).sqrt() * network(x, t, *rest)

    return denoise


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t from x_0 (B, L, P), eps (B, L, P) and abar_t (B,): Ho et al. 2020, eq. 4."""
    abar = abar.view(-1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def noise_scale(config: DiffusionConfig) -> float:
    """Standard deviation of eps: a regressor sees zeros in the place of noise."""
    return 0.0 if config.schedule == "none" else 1.0


def draws_of(seed: int, stream: str = "") -> torch.Generator:
    """The generator of a seed in 0..2^63 - 1, and of a stream beside that of the initial noise.

    torch's takes the low 32 bits alone, so that a larger seed, or another stream, is hashed.
    """
    if stream or seed >= 2**32:
        content = seed.to_bytes(8, "little") + stream.encode()
        seed = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")
    return torch.Generator().manual_seed(seed)


def initial_noise(seeds: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """Noise (B, L, P) with one generator per sample, so that a seed means the same in any batch."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        torch.randn(shape, generator=draws_of(seed), out=row)
    return noise


def guided(denoise: Denoise, guidance: Sequence[float]) -> Denoise:
    """Classifier-free guidance on x0 (Ho & Salimans 2022, eq. 6), in one pass of a larger batch.

    Args:
        guidance: One per sample. Those of 1 are in the pass once, the others twice; where all are
            1 the result is `denoise` itself.
    """
    led = [i for i, scale in enumerate(guidance) if scale != 1]
    if not led:
        return denoise

    def both(x: Tensor, t: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        rows = torch.tensor([*range(len(x)), *led], device=x.device)
        drop = torch.arange(len(rows), device=x.device) >= len(x)
        found = denoise(x[rows], t[rows], cond[rows], mask[rows], drop)
        x0, unconditional = found[: len(x)], found[len(x) :]
        scale = x0.new_tensor([guidance[i] for i in led]).view(-1, 1, 1)
        x0[led] = unconditional + scale * (x0[led] - unconditional)
        return x0

    return both


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Samples on their way from x_T to x_0, each at its own step of its own plan.

    Args:
        x: x_t, (B, L, P); the last K tokens are the classes'.
        before: The last prediction of x_0, (B, L, P).
        cond: (B, K, ...), what the denoiser takes: embeddings, or what they bring to every step.
        mask: bool (B, K), false for padding, which comes last.
        ahead: Per sample the steps that are left.
        guidance: One per sample.
        draws: Per sample what its ancestral noise is drawn from.
    """

    x: Tensor
    before: Tensor
    cond: Tensor
    mask: Tensor
    ahead: tuple[tuple[Step, ...], ...]
    guidance: tuple[float, ...]
    draws: tuple[torch.Generator, ...]

    def take(self, rows: Sequence[int]) -> Walk:
        """Some of the samples, in this order, padded to the most classes among them."""
        index = torch.tensor(rows, device=self.x.device)
        mask = self.mask[index]
        return Walk(
            x=self.x[index],
            before=self.before[index],
            cond=self.cond[index],
            mask=mask,
            ahead=tuple(self.ahead[i] for i in rows),
            guidance=tuple(self.guidance[i] for i in rows),
            draws=tuple(self.draws[i] for i in rows),
        ).padded(int(mask.sum(1).max()))

    def padded(self, classes: int) -> Walk:
        """The same samples with K classes: padding is added or, where there is more, cut off."""
        more = classes - self.mask.shape[1]
        if not more:
            return self
        return replace(
            self,
            x=F.pad(self.x, (0, 0, 0, more)),
            before=F.pad(self.before, (0, 0, 0, more)),
            cond=F.pad(self.cond, (0, 0, 0, more)),
            mask=F.pad(self.mask, (0, more)),
        )


def join(walks: Sequence[Walk]) -> Walk:
    """The samples of all, in their order; how far each has come does not matter."""
    most = max(walk.mask.shape[1] for walk in walks)
    walks = [walk.padded(most) for walk in walks]
    return Walk(
        x=torch.cat([walk.x for walk in walks]),
        before=torch.cat([walk.before for walk in walks]),
        cond=torch.cat([walk.cond for walk in walks]),
        mask=torch.cat([walk.mask for walk in walks]),
        ahead=tuple(ahead for walk in walks for ahead in walk.ahead),
        guidance=tuple(scale for walk in walks for scale in walk.guidance),
        draws=tuple(draw for walk in walks for draw in walk.draws),
    )


def begin(
    config: DiffusionConfig,
    *,
    noise: Tensor,
    cond: Tensor,
    mask: Tensor,
    steps: int,
    guidance: float = 1.0,
    seeds: Sequence[int],
) -> Walk:
    """Samples before their first step.

    Args:
        noise: x_T, (B, L, P).
        cond: (B, K, ...), as the denoiser takes it.
        mask: bool (B, K).
        steps: Denoising steps, between 1 and T.
        guidance: 1 is the conditional model.
        seeds: One per sample; the ancestral sampler draws its noise from them.

    Raises:
        ConfigError: `steps` out of range, or no integer.
    """
    if not hasattr(steps, "__index__"):
        raise ConfigError(f"sampling steps must be an integer, got {steps!r}")
    if not 1 <= steps <= config.timesteps:
        raise ConfigError(f"sampling steps must lie in 1..{config.timesteps}, got {steps}")
    return Walk(
        x=noise,
        before=noise,
        cond=cond,
        mask=mask,
        ahead=(plan(config, steps),) * len(noise),
        guidance=(guidance,) * len(noise),
        draws=tuple(draws_of(seed, "ancestral") for seed in seeds),
    )


@torch.no_grad()
def advance(denoise: Denoise, walk: Walk) -> Walk:
    """Every sample one step further, in one pass of the denoiser; none may be at its end."""
    x, steps = walk.x, [ahead[0] for ahead in walk.ahead]
    t = torch.tensor([step.t for step in steps], device=x.device)
    x0 = guided(denoise, walk.guidance)(x, t, walk.cond, walk.mask)
    weights = [(step.keep, step.move, step.back, step.noise) for step in steps]
    keep, move, back, noise = x.new_tensor(weights).T[..., None, None]  # (B, 1, 1) each
    x = keep * x + move * x0 + back * walk.before
    if any(step.noise for step in steps):
        x = x + noise * _fresh(walk).to(x)
    return replace(walk, x=x, before=x0, ahead=tuple(ahead[1:] for ahead in walk.ahead))


def _fresh(walk: Walk) -> Tensor:
    """Unit normal draws (B, L, P) for the samples whose next step adds noise.

    Padding gets none: a draw's values depend on how many are drawn, so that a sample's own would
    otherwise depend on its neighbours' classes.
    """
    z = torch.zeros(walk.x.shape)
    absent = (~walk.mask).sum(1).tolist()
    for row, ahead, draw, less in zip(z, walk.ahead, walk.draws, absent, strict=True):
        if ahead[0].noise:
            own = row[: len(row) - less]
            torch.randn(own.shape, generator=draw, out=own)
    return z


def sample(denoise: Denoise, walk: Walk) -> Tensor:
    """x_0 (B, L, P) of samples that have equally many steps to go."""
    while walk.ahead[0]:
        walk = advance(denoise, walk)
    return walk.x
