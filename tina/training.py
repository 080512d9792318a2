"""The training loop: weight-space and function-space losses, EMA, exact resume.

Axes: B = Z + J samples of a step (Z p-models of the zoo, J fresh tasks), L tokens, P values per
token, K classes (padded), E embedding width, N images per fresh task.

Two losses, both on the denoiser's prediction of x0:
  weight space    mean square error to a p-model's tokens at a uniform noise level (PAPER: Tina)
  function space  cross-entropy of the classifier that x0 decodes to, on `fit` images of a fresh
                  task, backpropagated through theta. No p-model exists for such a task, so its x_t
                  is pure noise, or the denoiser's own prediction from pure noise, noised again to
                  a uniform level: what a sampler will show it.

The loop knows no Ray and no DeepSpeed: the engine, the report and the validation are arguments.
Every draw is a function of (seed, step, rank), so a resumed run repeats an undisturbed one exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tina.classifiers import InputStore
from tina.config import TrainConfig
from tina.datasets import Dataset
from tina.diffusion import add_noise, signal_level
from tina.errors import NonFiniteError
from tina.files import write_tensors
from tina.finetune import annealed
from tina.generator import Generator
from tina.generic import GenericModel
from tina.layout import ParamLayout
from tina.prompts import Vocabulary
from tina.tasks import TaskSpace
from tina.zoo import Zoo


class Engine(Protocol):
    """What the loop needs of an optimiser engine; DeepSpeed's has this shape."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoiser's forward pass."""

    def backward(self, loss: Tensor) -> Any:
        """Gradients of a loss, averaged over ranks."""

    def step(self) -> Any:
        """Clip, update, clear."""


class LocalEngine:
    """The plain engine of one process, for tests and for use without a cluster."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.clip = module, config.clip
        self.optimizer: torch.optim.Optimizer = build_optimiser(module, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward pass."""
        return cast(Tensor, self.module(*args, **kwargs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self) -> None:
        """Clip the gradient norm, update, clear.

        Raises:
            NonFiniteError: The gradient is NaN or infinite; nothing is updated.
        """
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient's norm is {norm.item()}; the step was not taken")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, file: Path) -> None:
        """Weights and optimiser state as safetensors."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"{i}.{key}": value for i, slot in state.items() for key, value in slot.items()}
        write_tensors(file, tensors)

    def load(self, file: Path) -> None:
        """Inverse of `save`."""
        tensors = load_file(file)
        module = {k[7:]: v for k, v in tensors.items() if k.startswith("module.")}
        self.module.load_state_dict(module)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if not name.startswith("module."):
                place, key = name.split(".")
                state.setdefault(int(place), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def build_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as every engine uses it."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: enough, beside the engine's own state, to go on exactly.

    Args:
        step: Steps done.
        ema: Averaged weights.
        best: Averaged weights at the best validation so far.
        best_accuracy: Its accuracy on `select` images of validation tasks; -1 before the first.
    """

    step: int
    ema: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    best_accuracy: float = -1.0

    @classmethod
    def start(cls, module: nn.Module) -> Progress:
        """Before the first step."""
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        return cls(step=0, ema=weights, best={k: v.clone() for k, v in weights.items()})

    def save(self, file: Path) -> None:
        """One safetensors file."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["step"] = torch.tensor(self.step)
        tensors["best_accuracy"] = torch.tensor(self.best_accuracy, dtype=torch.float64)
        write_tensors(file, tensors)

    @classmethod
    def load(cls, file: Path) -> Progress:
        """Inverse of `save`."""
        tensors = load_file(file)
        return cls(
            step=int(tensors["step"]),
            ema={k[4:]: v for k, v in tensors.items() if k.startswith("ema.")},
            best={k[5:]: v for k, v in tensors.items() if k.startswith("best.")},
            best_accuracy=float(tensors["best_accuracy"]),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step.

    Args:
        tokens: (Z, L, P), p-models.
        cond: (B, K, E), conditions; the first Z belong to `tokens`.
        mask: bool (B, K).
        body: (n_body,), inherited by every task.
        rows: (J, K, R), inherited by the fresh tasks.
        images: J inputs (N, ...) for the fresh tasks.
        labels: J times int64 (N,), rows of the head.
        draws: Generator of the noise of this step.
    """

    tokens: Tensor
    cond: Tensor
    mask: Tensor
    body: Tensor
    rows: Tensor
    images: list[Tensor]
    labels: list[Tensor]
    draws: torch.Generator

    def to(self, device: torch.device) -> Batch:
        """The same on a device; randomness stays on the CPU, equal for all devices."""
        moved: dict[str, Any] = {
            key: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
            for key, value in vars(self).items()
            if key != "draws"
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Batches as functions of (seed, step, rank).

    Args:
        generator: For its codec, vocabulary and inherited weights.
        zoo: Training p-models.
    """

    generator: Generator
    config: TrainConfig
    zoo: Zoo
    space: TaskSpace
    dataset: Dataset
    store: InputStore

    @cached_property
    def _tokens(self) -> Tensor:
        return encode_zoo(self.generator, self.zoo)

    @cached_property
    def _pools(self) -> list[np.ndarray]:
        count = self.dataset.num_classes
        return [self.dataset.indices("fit", (c,)).numpy() for c in range(count)]

    def batch(self, step: int, *, rank: int, world: int) -> Batch:
        """The share of one rank in a step of all of them."""
        rng = np.random.default_rng([self.config.seed, step, rank])
        picks = rng.integers(len(self.zoo.task_ids), size=self.config.zoo_batch // world)
        classes = [self.zoo.class_ids[i] for i in picks]
        images, labels = [], []
        if self.config.function_loss > 0:
            for task in self.space.sample_fresh(rng, self.config.fresh_tasks // world):
                rows = rng.integers(len(task), size=self.config.images_per_task)
                pools = [self._pools[task[row]] for row in rows]
                index = [pool[rng.integers(len(pool))] for pool in pools]
                images.append(self.store[torch.tensor(index)])
                labels.append(torch.from_numpy(rows))
                classes.append(tuple(task))
        vocabulary = self.generator.vocabulary
        embeddings, mask = vocabulary.of(classes, self.generator.max_classes)
        _, inherited = self.generator.inherit(embeddings[len(picks) :])
        return Batch(
            tokens=self._tokens[picks],
            cond=vocabulary.condition(embeddings),
            mask=mask,
            body=self.generator.generic.body,
            rows=inherited,
            images=images,
            labels=labels,
            draws=torch.Generator().manual_seed(int(rng.integers(2**62))),
        )


def encode_zoo(generator: Generator, zoo: Zoo) -> Tensor:
    """Tokens (Z, L, P) of the p-models' residuals on what their prompts inherit."""
    body, rows, _ = residuals(
        zoo, generator.codec.layout, generic=generator.generic, vocabulary=generator.vocabulary
    )
    return generator.codec.encode(body, rows)


def residuals(
    zoo: Zoo, layout: ParamLayout, *, generic: GenericModel, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """The p-models less what their prompts inherit: body (Z, n_body), rows (Z, K, R), mask."""
    body, rows = layout.split(zoo.theta)
    embeddings, mask = vocabulary.of(zoo.class_ids, layout.num_classes)
    inherited_body, inherited_rows = generic.inherit(vocabulary.attention(embeddings))
    return body - inherited_body, (rows - inherited_rows) * mask.unsqueeze(-1), mask


def losses(
    engine: Engine, generator: Generator, batch: Batch, config: TrainConfig, abar: Tensor
) -> dict[str, Tensor]:
    """The two losses of a batch, not yet weighted.

    Args:
        abar: (T,), the schedule's signal levels.
    """
    z, b = len(batch.tokens), len(batch.mask)
    top, device = len(abar) - 1, batch.tokens.device
    shape = (b, *batch.tokens.shape[1:])
    noise = torch.randn(shape, generator=batch.draws).to(device)
    first = torch.randn(shape, generator=batch.draws).to(device)
    t = torch.randint(top + 1, (b,), generator=batch.draws)
    pure = torch.rand(b, generator=batch.draws) < 0.5
    drop = torch.rand(b, generator=batch.draws) < config.condition_dropout
    drop[z:] = False  # without its condition, a fresh task has no right answer
    t[z:] = torch.where(pure[z:], top, t[z:])
    t, drop = t.to(device), drop.to(device)
    x0 = torch.cat([batch.tokens, torch.zeros_like(noise[z:])])
    again = z + torch.nonzero(~pure[z:]).flatten().to(device)
    if len(again):
        with torch.no_grad():
            tops = torch.full((len(again),), top, device=device)
            own = engine(first[again], tops, batch.cond[again], batch.mask[again])
        x0[again] = own.to(x0)
    guess = engine(add_noise(x0, noise, abar[t]), t, batch.cond, batch.mask, drop).float()
    valid = generator.codec.valid(batch.mask[:z])
    error = (guess[:z] - batch.tokens).square()
    found = {"weight_loss": (error * valid).sum() / valid.sum()}
    if b > z:
        body, rows = generator.codec.decode(guess[z:])
        body, rows = batch.body + body, batch.rows + rows
        counts = batch.mask[z:].sum(1).tolist()
        scores = [
            F.cross_entropy(generator.logits(body[i], rows[i, :k], images).float(), labels)
            for i, (k, images, labels) in enumerate(
                zip(counts, batch.images, batch.labels, strict=True)
            )
        ]
        found["function_loss"] = torch.stack(scores).mean()
    return found


def train(
    config: TrainConfig,
    *,
    engine: Engine,
    source: Source,
    start: Progress,
    report: Callable[[Progress, dict[str, float]], None],
    validate: Callable[[Mapping[str, Tensor]], float],
    rank: int = 0,
    world: int = 1,
    on_step: Callable[[int], object] = lambda step: None,
) -> Progress:
    """Run from `start` to `config.steps`.

    Args:
        report: Called on every rank each `checkpoint_every` steps and at the end, with what is
            needed to go on from there and the latest figures; it saves them.
        validate: Accuracy of the classifiers that averaged weights generate for validation tasks.
            Called on rank 0.
        on_step: Called with the number of steps done.

    Raises:
        NonFiniteError: A loss is NaN or infinite; the step is not taken.
    """
    device = next(engine.module.parameters()).device
    abar = signal_level(source.generator.config.diffusion).to(device)
    weights = {"weight_loss": config.weight_loss, "function_loss": config.function_loss}
    now = replace(start, ema={name: x.to(device, copy=True) for name, x in start.ema.items()})
    figures: dict[str, float] = {}
    for step in range(start.step, config.steps):
        rate = config.lr * annealed(step, config.steps, warmup=int(config.warmup * config.steps))
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        batch = source.batch(step, rank=rank, world=world).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            found = losses(engine, source.generator, batch, config, abar)
        loss = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {loss.item()} at step {step}; it was not taken")
        engine.backward(loss)
        engine.step()
        now = replace(now, step=step + 1, ema=_average(now.ema, engine.module, config, step))
        figures |= {name: value.item() for name, value in found.items()} | {"lr": rate}
        on_step(now.step)
        last = now.step == config.steps
        if (last or now.step % config.validate_every == 0) and rank == 0:
            figures["val_accuracy"] = validate(now.ema)
            if figures["val_accuracy"] > now.best_accuracy:
                best = {name: value.clone() for name, value in now.ema.items()}
                now = replace(now, best=best, best_accuracy=figures["val_accuracy"])
        if last or now.step % config.checkpoint_every == 0:
            report(now, figures)
    return now


@torch.no_grad()
def _average(
    ema: Mapping[str, Tensor], module: nn.Module, config: TrainConfig, step: int
) -> Mapping[str, Tensor]:
    """EMA, in place, whose horizon is a share of the run and shorter at its start."""
    decay = min((1 + step) / (10 + step), 1 - 1 / max(1.0, config.ema * config.steps))
    for name, parameter in module.named_parameters():
        ema[name].lerp_(parameter.float(), 1 - decay)
    return ema
