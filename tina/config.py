"""What a checkpoint keeps of a configuration: classifier, prompts, denoiser, diffusion.

Nested frozen dataclasses, read by `tina.configio`, and their checks. What a run adds to them is in
`tina.jobconfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tina.checks import fits, not_negative, positive, shares
from tina.errors import ConfigError

TextEncoder = Literal["sentence", "open_clip"]  # what can stand beside a checkpoint of words alone
Precision = Literal["fp32", "bf16", "auto"]  # auto: bf16 where hardware has it (`tina.precision`)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How a classifier is trained: AdamW, its rate warmed up, then annealed by a cosine.

    Args:
        steps: Optimiser steps.
        batch_size: Images per step.
        lr: Peak learning rate.
        warmup: Share of the steps over which the rate rises to it; without, ReLUs may die.
        weight_decay: Decoupled weight decay.
        precision: Arithmetic of the forward and backward pass; weights stay fp32.
    """

    steps: int = 400
    batch_size: int = 64
    lr: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What turns words or pictures into conditions.

    Args:
        encoder: hash (spelling, no meaning), sentence (MiniLM), table (of vectors) or open_clip.
        model: For open_clip such as ViT-B-32; for a table a set of its vectors, or "a+b" for two.
        weights: open_clip: pretrained tag or path of a weights file; table: path of the parquet.
        template: Sentence that a bare class name is put into, with {} for the name.
        tower: Recipe of a ResNet-20 that names pictures; default: the generic model names them.
        shrinkage: How far conditions are drawn to the trained names that they inherit of, 0..1.
        favour: To the logit of a class is added favour (1 - its familiarity); default: fitted.
        doubt: Logits are divided by 1 + doubt (1 - mean familiarity of the task's classes);
            default: fitted (`tina.calibration`).
        prior: Weight of what the names give against pictures beside them (`tina.examples`).
    """

    encoder: Literal["hash", "sentence", "table", "open_clip"] = "hash"
    model: str = ""
    weights: str = ""
    template: str = "{}"
    tower: RecipeConfig | None = None
    shrinkage: float = 0.0
    favour: float | None = None
    doubt: float | None = None
    prior: float = 0.3

    def __post_init__(self) -> None:
        shares(self, "shrinkage")
        not_negative(self, "favour", "doubt", optional=True)
        positive(self, "prior")
        fits(self, "tower")
        if "{}" not in self.template:
            raise ConfigError(f"prompt.template must contain {{}}, got {self.template!r}")
        if self.tower and self.encoder == "open_clip":
            raise ConfigError("prompt.tower: open_clip has an image tower")

    def settled(self, fitted: PromptConfig) -> PromptConfig:
        """With the favour and the doubt that were fitted, where it names none."""
        favour = fitted.favour if self.favour is None else self.favour
        doubt = fitted.doubt if self.doubt is None else self.doubt
        return replace(self, favour=favour, doubt=doubt)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier that is generated, and how its teachers are trained.

    Args:
        family: One of `tina.families.FAMILIES`.
        generic: Recipe of the generic model (all seen classes).
        finetune: Recipe of the zoo's p-models.
        direct: Recipe of direct fine-tuning, the upper reference; tuned on `select`, then frozen.
        seed: Seed of initialisation and batches.
    """

    family: str = "cnn5k"
    generic: RecipeConfig = field(default_factory=RecipeConfig)
    finetune: RecipeConfig = field(default_factory=RecipeConfig)
    direct: RecipeConfig = field(default_factory=RecipeConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        fits(self, "generic", "finetune", "direct")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Size of the diffusion transformer.

    Args:
        width: D.
        depth: Number of blocks.
        heads: Attention heads.
        chunk: Most values of a body token.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    chunk: int = 576

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "heads", "chunk")
        if self.width % (n := 2 * self.heads):
            raise ConfigError(f"denoiser.width {self.width} must be a multiple of 2 * heads, {n}")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise schedule, what the network predicts, and sampler.

    Args:
        schedule: Betas: linear or cosine; none for a regressor: one step from zeros, no noise.
        beta_range: Ends of the linear betas at T = 1000; default: the paper's.
        timesteps: T, number of noise levels in training.
        prediction: x0, or v of Salimans & Ho 2022: then an untrained generator is not selection.
        sampler: ddim, dpm++ (second-order multistep) or ddpm (ancestral).
        sampling_steps: Default number of denoising steps.
        guidance: Default classifier-free guidance; 1 is the conditional model alone.
    """

    schedule: Literal["linear", "cosine", "none"] = "cosine"
    beta_range: tuple[float, float] = (1e-4, 0.02)
    timesteps: int = 1000
    prediction: Literal["x0", "v"] = "x0"
    sampler: Literal["ddim", "dpm++", "ddpm"] = "ddim"
    sampling_steps: int = 10
    guidance: float = 1.0

    def __post_init__(self) -> None:
        (low, high), steps, most = self.beta_range, self.sampling_steps, self.timesteps
        if not 0 < low < high or (self.schedule == "linear" and high >= most / 1000):
            raise ConfigError(f"diffusion.beta_range must rise in 0..T / 1000, got {low}, {high}")
        if not 1 <= steps <= most:
            raise ConfigError(f"diffusion.sampling_steps must lie in 1..{most}, got {steps}")
        if self.schedule == "none" and (most, self.prediction) != (1, "x0"):
            raise ConfigError("diffusion.schedule none needs diffusion.timesteps 1, prediction x0")
        not_negative(self, "guidance")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """All that a checkpoint needs to be rebuilt, beside its tensors."""

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
