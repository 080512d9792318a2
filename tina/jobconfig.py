"""Everything from images to a report: what a run adds to `tina.config`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import comb
from typing import Literal

from tina.checks import absolute, distinct, inside, not_negative, plain_name, positive, shares
from tina.config import (
    ClassifierConfig,
    DenoiserConfig,
    DiffusionConfig,
    GeneratorConfig,
    Precision,
    PromptConfig,
)
from tina.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are cut into fit, select and report.

    Args:
        name: digits, cifar100, caltech101, mini_imagenet, parquet (any Hugging Face image parquet
            folder) or folder (one sub-folder per class); some joined by "+" are one data set.
        root: Folder (path or URI) of the data set; default: TINA_DATA, then the user cache.
        image_size: Side in pixels that images are resized to once; default: the data set's own
            (the median of the first 512), of photographs at most 64, or 224 before a trunk that was
            trained at that.
        report_fraction: Share of images kept for the report where a data set has no test split.
        select_fraction: Share of the training images kept for choosing checkpoints and settings.
        mirror: Train on each image's mirror image too, where left and right mean nothing.
        shift: Most pixels by which training moves images, too; a head on a trunk sees them unmoved.
        seed: Seed of the partition.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int | None = None
    report_fraction: float = 0.3
    select_fraction: float = 0.1
    mirror: bool = False
    shift: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        inside(self, "report_fraction", "select_fraction")
        not_negative(self, "shift", "seed")
        positive(self, "image_size", optional=True)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How many tasks there are and of how many classes; `tina/tasks.py` has the three axes.

    Args:
        min_classes: Fewest classes of a task.
        max_classes: Most classes of a task; also the largest the generator accepts.
        train: Number of training tasks, one p-model each.
        val: Number of validation tasks, one p-model each.
        held_out: Number of held-out tasks per axis.
        excluded_fraction: Share of the classes kept out of all training; 0: no axis of such.
        unseen_per_task: Classes of an unseen-class task that come from the excluded ones.
        unseen_counts: Other such numbers, each with as many tasks, that the report compares.
        seed: Seed of all task draws.
    """

    min_classes: int = 2
    max_classes: int = 6
    train: int = 200
    val: int = 20
    held_out: int = 120
    excluded_fraction: float = 0.0
    unseen_per_task: int = 2
    unseen_counts: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.min_classes <= self.max_classes:
            message = f"2 and tasks.max_classes, got {self.min_classes} and {self.max_classes}"
            raise ConfigError(f"tasks.min_classes must lie between {message}")
        if not 0 <= (share := self.excluded_fraction) < 1:
            raise ConfigError(f"tasks.excluded_fraction must lie in [0, 1), got {share}")
        positive(self, "train", "val", "held_out")
        not_negative(self, "seed")
        distinct(self, "unseen_counts")

    def excluded(self, classes: int) -> int:
        """How many of so many classes are kept out of all training."""
        return round(self.excluded_fraction * classes)

    def sets(self, seen: int, excluded: int = 0, unseen: int = 0) -> int:
        """How many class sets there are, of which so many classes are of the excluded ones."""
        sizes = range(max(self.min_classes, unseen), self.max_classes + 1)
        return comb(excluded, unseen) * sum(comb(seen, k - unseen) for k in sizes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the denoiser is trained.

    Args:
        steps: Optimiser steps.
        zoo_batch: p-models per step over all ranks, for the weight-space loss.
        fresh_tasks: Fresh training tasks per step over all ranks, for the function-space loss.
        near_tasks: Share, at the end, of fresh tasks of neighbouring classes; grows from none.
        new_classes: Share of fresh tasks whose classes may inherit as if nothing had seen them.
        images_per_task: `fit` images that each fresh task's classifier is scored on.
        weight_loss: Factor of the weight-space loss (mean square error of x0).
        min_snr: Below this SNR it counts in proportion (Hang et al. 2023); 0, or no noise: in full.
        function_loss: Factor of the function-space loss (cross-entropy through theta).
        condition_dropout: Share of p-models trained on without condition, for guidance.
        lr: Peak learning rate; linear warm-up, cosine to zero.
        warmup: Share of the steps spent warming up.
        weight_decay: AdamW's decoupled weight decay.
        clip: Largest gradient norm.
        ema: Share of the run over which the weights are averaged.
        precision: Arithmetic of the transformer and the function-space loss; weights stay fp32.
        accumulation: Parts that a rank's share of a step is cut into, one after the other.
        checkpoint_every: Steps between resumable states. Each is validated; one is chosen.
        seed: Seed of initialisation and of every draw.
    """

    steps: int = 1000
    zoo_batch: int = 32
    fresh_tasks: int = 8
    near_tasks: float = 0.0
    new_classes: float = 0.0
    images_per_task: int = 64
    weight_loss: float = 1.0
    min_snr: float = 0.0
    function_loss: float = 1.0
    condition_dropout: float = 0.1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.05
    precision: Precision = "fp32"
    accumulation: int = 1
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        keys = ("steps", "zoo_batch", "lr", "clip", "ema", "images_per_task", "accumulation")
        positive(self, *keys, "checkpoint_every")
        not_negative(self, "weight_loss", "min_snr", "function_loss", "weight_decay", "seed")
        shares(self, "near_tasks", "new_classes", "condition_dropout", "warmup", "ema")
        if not self.weight_loss and not self.function_loss:
            raise ConfigError("train.weight_loss and train.function_loss cannot both be 0")
        if self.function_loss > 0 and self.fresh_tasks < 1:
            raise ConfigError("train.function_loss above 0 needs train.fresh_tasks above 0")

    @property
    def unconditional(self) -> bool:
        """Whether anything is trained without condition: fresh tasks never are."""
        return self.condition_dropout > 0 and self.weight_loss > 0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the report measures.

    Args:
        direct_tasks: Unseen combinations that direct fine-tuning is run on.
        direct_tasks_elsewhere: The same for each other axis.
        seeds: Sampling seeds per task.
        images_per_class: Report images per class at most; default: all.
        bootstrap: Resamples for the intervals.
        sampling_steps: Step counts of the accuracy-against-steps curve; those above T are left out.
        mixer_steps: Training steps of the mixer baseline (`tina.mixer`); 0 leaves its row out.
        regressor: Name of a run beside this one, but for schedule none the same: a row.
    """

    direct_tasks: int = 20
    direct_tasks_elsewhere: int = 20
    seeds: int = 3
    images_per_class: int | None = None
    bootstrap: int = 1000
    sampling_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    mixer_steps: int = 0
    regressor: str = ""

    def __post_init__(self) -> None:
        positive(self, "direct_tasks", "seeds", "bootstrap")
        positive(self, "images_per_class", optional=True)
        not_negative(self, "direct_tasks_elsewhere", "mixer_steps")
        distinct(self, "sampling_steps")
        if min(steps := self.sampling_steps, default=0) < 1:
            raise ConfigError(f"evaluation.sampling_steps must be positive, got {steps}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How a job spreads over a cluster.

    Args:
        zoo_workers: Most actors of a pool; on a GPU each to fine-tune where one is, else on a CPU.
        zoo_block: Most tasks that an actor fine-tunes at once and that are then written together.
        zoo_block_gpu: The same of an actor on a GPU, which takes about as long for one as for many.
        train_workers: Ranks of the generator's training.
        train_cpus: CPUs of each rank; without a GPU also its threads.
        zero_stage: DeepSpeed's partitioning: 0 none, 1 optimiser, 2 and gradients, 3 and weights.
        offload: Keep the optimiser's state in CPU memory (stages 1 to 3).
        activation_checkpointing: Compute activations again in the backward pass, storing none.
        max_failures: Times that training goes on after a rank's end or error; restarts of an actor.
        wait_s: Seconds to wait for the cluster to grow to what a job needs.
    """

    zoo_workers: int = 2
    zoo_block: int = 4
    zoo_block_gpu: int = 64
    train_workers: int = 2
    train_cpus: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    activation_checkpointing: bool = False
    max_failures: int = 3
    wait_s: float = 30.0

    def __post_init__(self) -> None:
        positive(self, "zoo_workers", "zoo_block", "zoo_block_gpu", "train_workers", "train_cpus")
        not_negative(self, "max_failures", "wait_s")
        if self.offload and not self.zero_stage:
            raise ConfigError("cluster.offload needs cluster.zero_stage 1, 2 or 3")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Everything from images to a report.

    Args:
        name: The run's name, a folder under `storage`. The same name goes on with the same run.
        storage: Folder of all runs: an absolute path, or a URI (s3://bucket/runs).
        tracking: tensorboard (in the run's folder), none, or mlflow or wandb (nodes' credentials).
    """

    name: str
    storage: str
    tracking: Literal["tensorboard", "mlflow", "wandb", "none"] = "tensorboard"
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        paths = {"storage": self.storage, "data.root": self.data.root}
        if self.prompt.encoder == "table" or "/" in self.prompt.weights:  # open_clip's tags: none
            paths["prompt.weights"] = self.prompt.weights or None
        absolute(paths)
        plain_name("name", self.name)
        if self.diffusion.guidance != 1 and not self.train.unconditional:
            needs = "train.condition_dropout and train.weight_loss above 0"
            raise ConfigError(f"diffusion.guidance other than 1 needs {needs}")
        parts = self.cluster.train_workers * self.train.accumulation
        for key in ("zoo_batch", "fresh_tasks"):
            if (given := getattr(self.train, key)) % parts:
                whole = "a multiple of cluster.train_workers times train.accumulation"
                raise ConfigError(f"train.{key} must be {whole}, got {given} and {parts}")

    @property
    def generator(self) -> GeneratorConfig:
        """The part that a checkpoint keeps."""
        return GeneratorConfig(**{f.name: getattr(self, f.name) for f in fields(GeneratorConfig)})
