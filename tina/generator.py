"""The generator: denoiser, codec, vocabulary and what tasks inherit, in one object.

Axes: B batch, K classes (padded), E embedding width, n_body parameters before the head, R values of
a head row, F features before the head, V trained classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tina.classifiers import Family
from tina.codec import Codec
from tina.config import GeneratorConfig
from tina.diffusion import Denoise, Walk, as_x0, begin, initial_noise, noise_scale, sample
from tina.errors import NonFiniteError
from tina.generic import GenericModel
from tina.prompts import Vocabulary
from tina.transformer import Denoiser


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Everything between a prompt's embeddings and theta.

    Args:
        dataset: Name of the data set it was trained on.
        max_classes: Most classes of a task.
        shot_projection: (F + 1, E): mean pooled features of the generic body over a class's
            pictures, and a one, to the prompt space; the stand-in for an image tower.
    """

    config: GeneratorConfig
    dataset: str
    family: Family
    codec: Codec
    vocabulary: Vocabulary
    generic: GenericModel
    denoiser: Denoiser
    max_classes: int
    shot_projection: Tensor

    def inherit(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """What a task starts from: generic body (B, n_body), rows (B, K, R) by the prompt alone."""
        return self.generic.inherit(self.vocabulary.attention(embeddings))

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
        """
        diffusion = self.config.diffusion
        device = self.denoiser.position.device
        length = self.codec.body_tokens + embeddings.shape[1]
        cond, mask = self.vocabulary.condition(embeddings).to(device), mask.to(device)
        return begin(
            diffusion,
            noise=self.noise(seeds)[:, :length].to(device),
            cond=self.denoiser.prepare(cond, mask),
            mask=mask,
            steps=diffusion.sampling_steps if steps is None else steps,
            guidance=diffusion.guidance if guidance is None else guidance,
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

    def finish(self, tokens: Tensor, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Body (B, n_body) and head rows (B, K, R) of denoised tokens (B, S + K, P).

        Args:
            embeddings: (B, K, E), unit norm: what the task inherits by.
            mask: bool (B, K), false for padding.

        Raises:
            NonFiniteError: A generated value is NaN or infinite.
        """
        body, rows = self.codec.decode(tokens.cpu())
        inherited_body, inherited_rows = self.inherit(embeddings)
        body, rows = inherited_body + body, (inherited_rows + rows) * mask.unsqueeze(-1)
        if not bool(torch.isfinite(body).all() and torch.isfinite(rows).all()):
            raise NonFiniteError("the generator made NaN or infinite weights; nothing is returned")
        return body, rows

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
        """Body (B, n_body) and head rows (B, K, R) for prompts.

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
        walk = self.begin(seen, mask, seeds=seeds, steps=steps, guidance=guidance)
        denoise = denoise or self.denoise_at([step.t for step in walk.ahead[0]])
        return self.finish(sample(denoise, walk), embeddings, mask)

    def logits(self, body: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
        """Logits (N, K) of one classifier, from its body (n_body,) and rows (K, R)."""
        return self.family.logits(self.theta(body, rows), inputs, num_classes=len(rows))

    def theta(self, body: Tensor, rows: Tensor) -> Tensor:
        """Flat theta (n,) of one classifier from its body (n_body,) and its K rows (K, R)."""
        return self.family.layout(len(rows)).join(body, rows)

    def embed_shots(self, inputs: Tensor) -> Tensor:
        """Prompt embedding (E,) of a class from its pictures, as `Family.embed` returned them."""
        features = self.family.features(self.generic.body, inputs).mean(0)
        embedding = torch.cat([features, features.new_ones(1)]) @ self.shot_projection
        return torch.nn.functional.normalize(embedding, dim=0)


def new_denoiser(config: GeneratorConfig, codec: Codec, *, dim: int, seed: int) -> Denoiser:
    """An untrained denoiser: its classifiers are classifier selection's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(
            config.denoiser,
            body_tokens=codec.body_tokens,
            token_width=codec.width,
            row_width=codec.layout.row_size,
            embedding_width=dim,
        )


def fit_shot_projection(
    family: Family,
    generic: GenericModel,
    vocabulary: Vocabulary,
    shots: Sequence[Tensor],
    *,
    seed: int,
) -> Tensor:
    """Least squares (F + 1, E) from mean features of a few pictures to their class's embedding.

    Args:
        shots: Per seen class, inputs of its `fit` images (N, ...) as `Family.embed` returns them.
    """
    draw = torch.Generator().manual_seed(seed)
    features, targets = [], []
    for class_id, inputs in zip(generic.class_ids, shots, strict=True):
        values = family.features(generic.body, inputs)
        for _ in range(32):
            count = int(torch.randint(1, 17, (), generator=draw))
            few = torch.randint(len(values), (count,), generator=draw)
            features.append(values[few].mean(0))
            targets.append(vocabulary.embeddings[class_id])
    x = torch.stack(features)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = x.T @ x
    # a little ridge: dead ReLU features would leave the system singular
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, x.T @ torch.stack(targets))
