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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tina.config import DiffusionConfig
from tina.errors import ConfigError

Denoise = Callable[..., Tensor]
"""`denoise(x (B, L, P), t (B,), cond (B, K, E), mask (B, K), drop=None) -> x0 (B, L, P)`."""


@lru_cache
def _levels(config: DiffusionConfig) -> np.ndarray:
    """abar_t, (T,) float64: the product of 1 - beta up to t."""
    n = config.timesteps
    if config.schedule == "linear":
        # ends given for T = 1000, scaled so that abar_T is the same at any T
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
    times = np.rint(np.arange(config.timesteps, 0, -config.timesteps / steps)).astype(int) - 1
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


def initial_noise(seeds: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """Noise (B, L, P) with one generator per sample, so that a seed means the same in any batch."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), out=row)
    return noise


def guided(denoise: Denoise, guidance: float) -> Denoise:
    """Classifier-free guidance on x0 (Ho & Salimans 2022, eq. 6), in one pass of twice the batch.

    A guidance of 1 is `denoise` itself.
    """
    if guidance == 1:
        return denoise

    def both(x: Tensor, t: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        drop = torch.arange(2 * len(x), device=x.device) >= len(x)
        two = denoise(x.repeat(2, 1, 1), t.repeat(2), cond.repeat(2, 1, 1), mask.repeat(2, 1), drop)
        conditional, unconditional = two.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return both


@torch.no_grad()
def sample(
    denoise: Denoise,
    config: DiffusionConfig,
    *,
    noise: Tensor,
    cond: Tensor,
    mask: Tensor,
    steps: int,
    guidance: float = 1.0,
    seeds: Sequence[int] = (),
) -> Tensor:
    """Denoise (B, L, P) noise to x_0 in a number of steps.

    Args:
        denoise: The contract of `Denoise`.
        noise: x_T, (B, L, P).
        cond: (B, K, E).
        mask: bool (B, K).
        steps: Denoising steps, between 1 and T.
        guidance: 1 is the conditional model.
        seeds: One per sample; the ancestral sampler draws its noise from them.

    Raises:
        ConfigError: `steps` out of range.
    """
    if not 1 <= steps <= config.timesteps:
        raise ConfigError(f"sampling steps must lie in 1..{config.timesteps}, got {steps}")
    if config.sampler == "ddpm" and len(seeds) != len(noise):
        raise ConfigError(f"the ddpm sampler needs a seed per sample, got {len(seeds)}")
    draws = []
    if config.sampler == "ddpm":
        # another stream than the initial noise's, yet a function of the seed alone
        draws = [torch.Generator().manual_seed(seed ^ 0x5EED) for seed in seeds]
    predict = guided(denoise, guidance)
    x = before = noise
    for step in plan(config, steps):
        x0 = predict(x, torch.full((len(x),), step.t, device=x.device), cond, mask)
        x = step.keep * x + step.move * x0
        if step.back:
            x = x + step.back * before
        if step.noise:
            z = [torch.randn(x.shape[1:], generator=draw) for draw in draws]
            x = x + step.noise * torch.stack(z).to(x)
        before = x0
    return x
