"""Noise schedule and samplers over weight tokens; the schedules and solvers are diffusers'.

Axes: B batch, L tokens, P values per token, K classes, E embedding width.

Forward process (Ho et al. 2020, eq. 4): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Losses and
samplers see a prediction of x_0, whatever the network predicts (`as_x0`): at any t it decodes to a
classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tina.config import DiffusionConfig
from tina.errors import ConfigError

Denoise = Callable[..., Tensor]
"""`denoise(x (B, L, P), t (B,), cond (B, K, E), mask (B, K), drop=None) -> x0 (B, L, P)`."""


@lru_cache
def build_scheduler(config: DiffusionConfig) -> Any:
    """The diffusers scheduler of a config; it predicts samples and never clips. To be copied.

    DDIM is the first-order DPM-Solver++ (Lu et al. 2022, section 4): diffusers' own DDIM class
    misses x0 where the number of steps does not divide T.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    low, high = config.beta_range
    common = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[config.schedule],
        # given for T = 1000, scaled so that abar_T is the same at any T
        "beta_start": low * 1000 / config.timesteps,
        "beta_end": high * 1000 / config.timesteps,
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    if config.sampler == "ddpm":
        return DDPMScheduler(**common, clip_sample=False)
    return DPMSolverMultistepScheduler(
        **common,
        algorithm_type="dpmsolver++",
        solver_order={"ddim": 1, "dpm++": 2}[config.sampler],
        final_sigmas_type="zero",
    )


@lru_cache
def signal_level(config: DiffusionConfig) -> Tensor:
    """abar_t, (T,) float32, falling from about 1 to about 0. Not to be written into."""
    levels: Tensor = build_scheduler(config).alphas_cumprod
    return levels.float()


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
    scheduler = copy(build_scheduler(config))  # what a run changes, set_timesteps binds anew
    scheduler.set_timesteps(steps)
    extra = {}
    if config.sampler == "ddpm":
        # another stream than the initial noise's, yet a function of the seed alone
        extra["generator"] = [torch.Generator().manual_seed(seed ^ 0x5EED) for seed in seeds]
    step = guided(denoise, guidance)
    x = noise
    for t in scheduler.timesteps:
        x0 = step(x, t.expand(len(x)).to(x.device), cond, mask)
        x = scheduler.step(x0, t, x, **extra).prev_sample
    return x
