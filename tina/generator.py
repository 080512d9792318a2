"""The generator: denoiser, codec, vocabulary and what tasks inherit, in one object.

Axes: B batch, K classes (padded), E embedding width, n_body parameters before the head, R values of
a head row, N images, V trained classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tina.asked import Asked
from tina.backbone import ImageNetTrunk
from tina.codec import Codec
from tina.config import GeneratorConfig
from tina.diffusion import Denoise, Walk, as_x0, begin, initial_noise, noise_scale, sample
from tina.errors import ConfigError, NonFiniteError
from tina.families import Family
from tina.generic import GenericModel
from tina.lent import lent_rows
from tina.prompts import Vocabulary
from tina.tower import Tower
from tina.transformer import Denoiser


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Everything between a prompt's embeddings and theta.

    Args:
        dataset: Name of the data set it was trained on.
        max_classes: Most classes of a task.
        tower: What names the pictures of a prompt; default: the generic model.
    """

    config: GeneratorConfig
    dataset: str
    family: Family
    codec: Codec
    vocabulary: Vocabulary
    generic: GenericModel
    denoiser: Denoiser
    max_classes: int
    tower: Tower | None = None

    @property
    def takes_guidance(self) -> bool:
        """Whether it was trained without condition too; else zeros stand in the place of one."""
        return bool(self.denoiser.null_cond.any())

    def with_prompt(self, **values: Any) -> Generator:
        """The same with other values in `config.prompt`."""
        prompt = replace(self.config.prompt, **values)
        return replace(self, config=replace(self.config, prompt=prompt))

    def condition(self, embeddings: Tensor) -> Tensor:
        """What the denoiser sees of embeddings (..., E); see `Vocabulary.condition`."""
        return self.vocabulary.condition(embeddings, shrinkage=self.config.prompt.shrinkage)

    @cached_property
    def rows(self) -> Tensor:
        """Head rows (V, R) that names inherit of: the trained classes', then what a trunk lends."""
        own, lent = self.generic.rows, self.vocabulary.lent
        if not lent:
            return own
        return torch.cat([own, lent_rows(cast(ImageNetTrunk, self.family.trunk), lent, own)])

    @cached_property
    def missing(self) -> Tensor:
        """Covariance (R, R) of what a row misses that is a mixture of the others, per newness."""
        vocabulary, rows = self.vocabulary, self.rows
        names, itself = vocabulary.embeddings[vocabulary.trained], torch.eye(len(rows)).bool()
        missed = rows - vocabulary.attention(names, itself) @ rows
        return missed.T @ missed / (1 - vocabulary.familiarity(names, itself)).sum()

    def inherit(self, embeddings: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a task starts from: generic body (B, n_body), rows (B, K, R) by the prompt alone.

        Args:
            hidden: bool (B, K, V), trained classes that a class cannot inherit of.
        """
        attention = self.vocabulary.attention(embeddings, hidden)
        return self.generic.body.expand(len(attention), -1), attention @ self.rows

    def inherit_classes(self, class_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same for K classes of the data set: body (n_body,), rows (K, R)."""
        body, rows = self.inherit(self.vocabulary.embeddings[list(class_ids)].unsqueeze(0))
        return body[0], rows[0]

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """x_T (B, S + max_classes, P): always of full length, so that K does not change a draw."""
        length = self.codec.body_tokens + self.max_classes
        noise = initial_noise(seeds, (length, self.codec.width))
        return noise * noise_scale(self.config.diffusion)

    def begin(
        self,
        embeddings: Tensor,
        mask: Tensor,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Walk:
        """Prompts before their first denoising step.

        Args:
            embeddings: (B, K, E), as the denoiser sees them.
            mask: bool (B, K), false for padding.
            seeds: One per prompt.
            steps: Denoising steps; default: the configuration's.
            guidance: Default: the configuration's.

        Raises:
            ConfigError: Steps out of range, or guidance of a generator that takes none.
        """
        diffusion = self.config.diffusion
        guidance = diffusion.guidance if guidance is None else guidance
        if guidance != 1 and not self.takes_guidance:
            raise ConfigError(
                "guidance must be 1: this generator was trained without train.condition_dropout"
            )
        device = self.denoiser.position.device
        length = self.codec.body_tokens + embeddings.shape[1]
        cond, mask = self.condition(embeddings).to(device), mask.to(device)
        return begin(
            diffusion,
            noise=self.noise(seeds)[:, :length].to(device),
            cond=self.denoiser.prepare(cond, mask),
            mask=mask,
            steps=diffusion.sampling_steps if steps is None else steps,
            guidance=guidance,
            seeds=seeds,
        )

    @torch.no_grad()
    def denoise_at(self, times: Sequence[int]) -> Denoise:
        """The denoiser's prediction of x0 at these timesteps, for walks that `begin` began.

        What follows from a timestep alone is computed here, once; what follows from a prompt alone
        is in the walk (`Denoiser.prepare`). The weights must not change while it is in use.
        """
        denoiser, device = self.denoiser, self.denoiser.position.device
        at = torch.tensor(times, device=device)
        table = denoiser.modulate(at)
        # a timestep that is not among them has no place in the table, and fails
        place = torch.full((self.config.diffusion.timesteps,), len(table), device=device)
        place[at] = torch.arange(len(table), device=device)

        def network(
            x: Tensor, t: Tensor, prepared: Tensor, mask: Tensor, drop: Tensor | None = None
        ) -> Tensor:
            if drop is not None:
                null = denoiser.prepare(denoiser.null_cond.expand(*mask.shape, -1), mask)
                prepared = torch.where(drop[:, None, None], null, prepared)
            return denoiser.predict(x, table[place[t]], prepared, mask)

        return as_x0(network, self.config.diffusion)

    @torch.no_grad()
    def denoised(
        self,
        embeddings: Tensor,
        mask: Tensor,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        denoise: Denoise | None = None,
    ) -> Tensor:
        """Tokens (B, S + K, P) of prompts after all steps; see `begin` and `generate`."""
        walk = self.begin(embeddings, mask, seeds=seeds, steps=steps, guidance=guidance)
        return sample(denoise or self.denoise_at([step.t for step in walk.ahead[0]]), walk)

    def finish(self, tokens: Tensor, asked: Asked, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Body (B, n_body) and head rows (B, K, R) of denoised tokens (B, S + K, P).

        A trunk knows the classes that it was trained on too well, so that known rows outbid new
        ones: these are favoured, which is calibrated stacking (Chao et al. 2016, eq. 5). A class
        that is any of several words is as probable as all of them together: for trained names v
        with logits l_v and weights a_v, log sum exp(l_v) is sum a_v l_v plus a's entropy at least
        (Jensen), and sum a_v l_v is what it inherits. Of that entropy counts what the words add.

        Args:
            mask: bool (B, K), false for padding.

        Raises:
            NonFiniteError: A generated value is NaN or infinite.
        """
        body, rows = self.codec.decode(tokens.cpu())
        body, rows = self.generic.body + body, asked.attention @ self.rows + rows
        newness = 1 - asked.familiarity
        favour = (self.config.prompt.favour or 0.0) * newness
        rows[..., -1] += favour + asked.breadth  # the bias
        scale = mask / self.temperature(newness, mask)[:, None]
        rows = rows * scale.unsqueeze(-1)
        if not bool(torch.isfinite(body).all() and torch.isfinite(rows).all()):
            raise NonFiniteError("the generator made NaN or infinite weights; nothing is returned")
        return body, rows

    def temperature(self, newness: Tensor, mask: Tensor) -> Tensor:
        """What the logits of B tasks are divided by (B,), 1 where no class is new (B, K).

        A network is as sure of what it guesses as of what it knows; see Guo et al. 2017, eq. 9.
        """
        doubt = self.config.prompt.doubt or 0.0
        return 1 + doubt * (newness * mask).sum(-1) / mask.sum(-1)

    @torch.no_grad()
    def generate(
        self,
        embeddings: Tensor,
        mask: Tensor,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        conditions: Tensor | None = None,
        denoise: Denoise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Body (B, n_body) and head rows (B, K, R) for prompts of one word for each class.

        Args:
            embeddings: (B, K, E), unit norm.
            mask: bool (B, K), false for padding.
            seeds: One per prompt.
            steps: Denoising steps; default: the configuration's.
            guidance: Default: the configuration's.
            conditions: Embeddings that the denoiser sees instead, for controls.
            denoise: A prediction of x0 instead of the denoiser's, for controls.

        Raises:
            NonFiniteError: A generated value is NaN or infinite.
        """
        seen = embeddings if conditions is None else conditions
        tokens = self.denoised(
            seen, mask, seeds=seeds, steps=steps, guidance=guidance, denoise=denoise
        )
        return self.finish(tokens, self.vocabulary.asked(embeddings), mask)

    def logits(self, body: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
        """Logits (N, K) of one classifier, from its body (n_body,) and rows (K, R)."""
        return self.family.logits(self.theta(body, rows), inputs, num_classes=len(rows))

    def theta(self, body: Tensor, rows: Tensor) -> Tensor:
        """Flat theta (n,) of one classifier from its body (n_body,) and its K rows (K, R)."""
        return self.family.layout(len(rows)).join(body, rows)

    @property
    def judge(self) -> Tower:
        """What says what a prompt's pictures show: the image tower, or else the generic model."""
        known, lent = replace(self.generic, rows=self.rows), len(self.vocabulary.lent)
        return self.tower or Tower(family=self.family, generic=known, lent=lent)

    def embed_shots(self, images: Tensor) -> Tensor:
        """Prompt embedding (E,) of a class from its pictures; the stand-in for CLIP's image tower.

        The trained names' embeddings, each weighted by how probable the pictures make it.

        Args:
            images: (N, C, H, W) of any size, uint8 or float in [0, 1].
        """
        return self.embed_seen(self.judge.see(images))

    def embed_seen(self, inputs: Tensor) -> Tensor:
        """The same of pictures (N, ...) as the judge sees them."""
        posterior = self.judge.posterior(inputs)
        # a tower's are the data set's alone, which are the first
        names = self.vocabulary.embeddings[self.vocabulary.trained][: len(posterior)]
        return torch.nn.functional.normalize(posterior @ names, dim=0)


def new_denoiser(config: GeneratorConfig, codec: Codec, *, dim: int, seed: int) -> Denoiser:
    """An untrained denoiser: its classifiers are classifier selection's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # CUDA's would stay reseeded
        return Denoiser(
            config.denoiser,
            body_tokens=codec.body_tokens,
            token_width=codec.width,
            row_width=codec.layout.row_size,
            embedding_width=dim,
        )
