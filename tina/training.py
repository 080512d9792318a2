"""The training loop: weight-space and function-space losses, EMA, exact resume.

Axes: B = Z + J samples of a part of a step (Z p-models of the zoo, J fresh tasks), L tokens,
P values per token, K classes (padded).

Two losses, both on the denoiser's prediction of x0:
  weight space    mean square error to a p-model's tokens at a uniform noise level (PAPER: Tina)
  function space  cross-entropy of the classifier that x0 decodes to, on `fit` images of a fresh
                  task, backpropagated through theta. No p-model exists for such a task, so its x_t
                  is pure noise, or the denoiser's own prediction from pure noise, noised again to
                  a uniform level: what a sampler will show it.

The loop knows no Ray and no DeepSpeed: the engine, the report and the validation are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tina.batches import Batch, BatchSource
from tina.diffusion import add_noise, as_x0, signal_level
from tina.engine import Engine, Weights
from tina.errors import CheckpointError, NonFiniteError, one_line
from tina.finetune import annealed
from tina.generator import Generator
from tina.jobconfig import TrainConfig
from tina.precision import in_bf16
from tina.tensors import write_tensors

Validate = Callable[[Weights], Callable[[], Sequence[float]]]
"""Begin to measure what weights generate; the result waits for it: per validation task, accuracy on
its `select` images."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: enough, beside the engine's own state, to go on exactly.

    Args:
        step: Steps done.
        ema: Averaged weights, whole.
        best: Averaged weights that `settle` chose; only rank 0's are kept up.
        best_accuracy: Their accuracy; 0 before the first.
        top: float64 (V,), the highest accuracy so far by validation task; empty before the first.
    """

    step: int
    ema: Weights
    best: Weights
    best_accuracy: float = 0.0
    top: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    @classmethod
    def start(cls, module: nn.Module) -> Progress:
        """Before the first step."""
        weights = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
        return cls(step=0, ema=weights, best=weights)

    def settle(self, accuracies: Tensor) -> Progress:
        """Its `ema` validated: the latest state within a standard error of the best is chosen.

        A few tasks cannot tell late states apart, and their highest accuracy is often an early
        one's luck (docs/log.md, 2026-11-25). The rule is Breiman et al. 1984, 3.4.3, with the
        error of the difference, paired over tasks; one task has none, and of two or three it says
        little.

        Args:
            accuracies: float64 (V,), of `ema`.
        """
        lead = self.top - accuracies if len(self.top) else torch.zeros_like(accuracies)
        error = lead.std(correction=0) / max(1, len(lead) - 1) ** 0.5
        if lead.mean() > error:
            return self
        top = accuracies if not len(self.top) or lead.mean() < 0 else self.top
        return replace(self, best=self.ema, best_accuracy=accuracies.mean().item(), top=top)

    def save(self, file: Path) -> None:
        """One safetensors file."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["step"] = torch.tensor(self.step)
        tensors["best_accuracy"] = torch.tensor(self.best_accuracy, dtype=torch.float64)
        tensors["top"] = self.top
        write_tensors(file, tensors)

    @classmethod
    def load(cls, file: Path) -> Progress:
        """Inverse of `save`.

        Raises:
            CheckpointError: It was cut off, or another version of Tina wrote it.
        """
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            why = f"{file} is not whole ({one_line(error)}): remove its train/ folder"
            raise CheckpointError(why) from error
        if "top" not in tensors:
            raise CheckpointError(f"{file} is of another version of Tina: remove its train/ folder")
        return cls(
            step=int(tensors["step"]),
            ema={k[4:]: v for k, v in tensors.items() if k.startswith("ema.")},
            # its own: on a shared file system the file may be gone while it is still to be read
            best={k[5:]: v.clone() for k, v in tensors.items() if k.startswith("best.")},
            best_accuracy=float(tensors["best_accuracy"]),
            top=tensors["top"],
        )


def losses(
    engine: Callable[..., Tensor],
    generator: Generator,
    batch: Batch,
    abar: Tensor,
    *,
    min_snr: float = 0.0,
) -> dict[str, Tensor]:
    """The two losses of a batch, not yet weighted, each a mean over its samples.

    Args:
        engine: The network.
        abar: (T,), the schedule's signal levels.
        min_snr: See `TrainConfig`.
    """
    denoise = as_x0(engine, generator.config.diffusion)
    z, x0 = len(batch.tokens), batch.tokens
    if len(batch.first):
        # whether or not one is needed: ranks that hold shards must call the denoiser alike
        with torch.no_grad():
            top = torch.full_like(batch.t[z:], len(abar) - 1)
            own = denoise(batch.first, top, batch.cond[z:], batch.mask[z:])
        x0 = torch.cat([x0, own.to(x0) * ~batch.pure[:, None, None]])
    x = add_noise(x0, batch.noise, abar[batch.t])
    guess = denoise(x, batch.t, batch.cond, batch.mask, batch.drop).float()
    valid = generator.codec.valid(batch.mask[:z])
    error = (guess[:z] - batch.tokens).square() * valid
    noiseless = generator.config.diffusion.schedule == "none"
    share = shown(abar[batch.t[:z]], 0.0 if noiseless else min_snr)
    found = {"weight_loss": (share * error.sum((1, 2)) / valid.sum((1, 2))).mean()}
    if len(batch.first):
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


def shown(abar: Tensor, min_snr: float) -> Tensor:
    """What a p-model's error counts at signal level abar: min(SNR / min_snr, 1).

    Where noise hides the p-model, its loss asks for the mean p-model whatever the prompt, and pulls
    away from what the function-space loss teaches at the same level (docs/log.md, 2026-11-27).
    """
    if not min_snr:
        return torch.ones_like(abar)
    return (abar / (1 - abar) / min_snr).clamp(max=1)


def train(
    config: TrainConfig,
    *,
    engine: Engine,
    source: BatchSource,
    start: Progress,
    report: Callable[[Progress, dict[str, float]], None],
    validate: Validate | None,
    rank: int = 0,
    world: int = 1,
    on_step: Callable[[int, Mapping[str, float]], object] = lambda step, figures: None,
    on_validated: Callable[[int, float], object] = lambda step, accuracy: None,
) -> Progress:
    """Run from `start` to `config.steps`.

    Args:
        report: Called on every rank each `checkpoint_every` steps and at the end, with what is
            needed to go on from there and figures: losses since the last report, over all ranks;
            with a validation also its latest accuracy, the step that it measured, and the accuracy
            of the state chosen so far.
        validate: Called with each report's averaged weights; None on ranks other than 0. Training
            goes on meanwhile: a result is waited for at the next report, the last one at the end.
        on_step: Called with the number of steps done and this rank's losses.
        on_validated: Called with the step of each state that was validated, and its accuracy.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite, and the step is not taken; or the
            weights are, and nothing of them is reported.
    """
    device = next(engine.module.parameters()).device
    half = in_bf16(config.precision)
    abar = signal_level(source.generator.config.diffusion).to(device)
    factors = {"weight_loss": config.weight_loss}
    if config.function_loss > 0:
        factors["function_loss"] = config.function_loss
    now, ema, parts = start, engine.split(start.ema), world * config.accumulation
    judged: Callable[[], Sequence[float]] | None = None
    if validate and start.step < config.steps:
        judged = validate(start.ema)  # selection's accuracy, or what an interruption cut short
    sums = dict.fromkeys(factors, 0.0)
    figures: dict[str, float] = {}

    def settle() -> None:
        nonlocal now
        assert judged
        accuracies = torch.tensor(judged(), dtype=torch.float64)
        if now.step:  # the untrained weights are no candidate
            now = now.settle(accuracies)
        figures.update(
            val_accuracy=accuracies.mean().item(),
            val_step=now.step,
            best_accuracy=now.best_accuracy,
        )
        on_validated(now.step, figures["val_accuracy"])

    own = range(rank * config.accumulation, (rank + 1) * config.accumulation)
    batches = source.batches(range(start.step, config.steps), own, parts=parts)
    reported = start.step
    for step in range(start.step, config.steps):
        rate = config.lr * annealed(step, config.steps, warmup=int(config.warmup * config.steps))
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        taken = dict.fromkeys(factors, 0.0)
        for _ in own:
            batch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                found = losses(engine, source.generator, batch, abar, min_snr=config.min_snr)
            loss = torch.stack([factors[name] * value for name, value in found.items()]).sum()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is {loss.item()} at step {step}; it was not taken")
            engine.backward(loss)
            engine.step()
            for name, value in found.items():
                taken[name] += value.item() / config.accumulation
        _average(ema, engine.shards(), config, step)
        sums = {name: value + taken[name] for name, value in sums.items()}
        on_step(step + 1, taken)
        last = step + 1 == config.steps
        if last or (step + 1) % config.checkpoint_every == 0:
            if judged:
                settle()
            means = engine.mean(torch.tensor(list(sums.values()), device=device))
            figures |= zip(sums, (means / (step + 1 - reported)).tolist(), strict=True)
            figures["lr"] = rate
            sums, reported = dict.fromkeys(factors, 0.0), step + 1
            now = replace(now, step=step + 1, ema=engine.gather(ema))
            # every rank sees the same, before any keeps a state that all later ones would die of
            if not all(bool(torch.isfinite(value).all()) for value in now.ema.values()):
                raise NonFiniteError(f"weights are NaN or infinite after step {step}; not kept")
            if validate:
                judged = validate(now.ema)
                if last:
                    settle()
            report(now, figures)
    return now


@torch.no_grad()
def _average(ema: Weights, weights: Weights, config: TrainConfig, step: int) -> None:
    """EMA, in place, whose horizon is a share of the run and shorter at its start."""
    decay = min((1 + step) / (10 + step), 1 - 1 / max(1.0, config.ema * config.steps))
    for name, value in weights.items():
        ema[name].lerp_(value, 1 - decay)
