"""Train the generator on Ray Train, each rank driving a DeepSpeed engine.

Run again with the same name: the latest checkpoint is continued, with the same result.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_jobs.job import run_job, start_ray
from tina.checkpoint import load_generator, save_generator
from tina.config import JobConfig
from tina.generator import Generator
from tina.run import Run
from tina.training import Progress, build_optimiser, train

PROGRESS = "progress.safetensors"


def deepspeed_config(config: JobConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. Batches are ours, so its batch sizes only have to agree."""
    world = config.cluster.train_workers
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": config.train.clip,
        "zero_optimization": {"stage": config.cluster.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def train_on_rank(config: JobConfig) -> None:
    """What each worker of Ray Train runs."""
    import deepspeed
    import ray.train
    from ray.experimental import tqdm_ray

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    run = Run(config)
    generator = load_generator(run.start)
    denoiser = generator.denoiser.train().requires_grad_(True)
    engine, *_ = deepspeed.initialize(
        model=denoiser,
        optimizer=build_optimiser(denoiser, config.train),
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    start = Progress.start(denoiser)
    if latest := ray.train.get_checkpoint():
        with latest.as_directory() as folder:
            engine.load_checkpoint(folder, tag="engine")
            start = Progress.load(Path(folder) / PROGRESS)

    def report(progress: Progress, figures: dict[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag="engine")
            if rank == 0:
                progress.save(Path(folder) / PROGRESS)
            ray.train.report(
                {"step": progress.step, **figures},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
            )

    bar = tqdm_ray.tqdm(total=config.train.steps, desc="generator") if rank == 0 else None
    shown = 0

    def show(step: int) -> None:
        nonlocal shown
        # a bar of fifty strokes: each costs a line wherever the output is not a terminal
        if bar and (step == config.train.steps or step - shown >= config.train.steps / 50):
            bar.update(step - shown)
            shown = step

    train(
        config.train,
        engine=engine,
        source=run.source(generator, config.train),
        start=start,
        report=report,
        validate=run.validator(generator),
        rank=rank,
        world=world,
        on_step=show,
    )
    if bar:
        bar.close()


def train_generator(run: Run) -> Generator:
    """Train, or continue; the generator with the averaged weights that validated best."""
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if not run.start.exists():
        save_generator(run.new_generator(), run.start, card="Untrained: classifier selection.\n")
    cluster, gpu = run.config.cluster, torch.cuda.is_available()
    trainer = TorchTrainer(
        train_on_rank,  # type: ignore[arg-type]
        train_loop_config=run.config,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=cluster.train_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.train_cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    assert result.checkpoint, "training reported no checkpoint"
    with result.checkpoint.as_directory() as folder:
        progress = Progress.load(Path(folder) / PROGRESS)
    print(json.dumps({"train": result.metrics}))
    generator = load_generator(run.start)
    best: dict[str, Tensor] = dict(progress.best)
    generator.denoiser.load_state_dict(best)
    return generator


def work(run: Run) -> None:
    """The whole job."""
    start_ray()
    train_generator(run)


if __name__ == "__main__":
    sys.exit(run_job(work, sys.argv[1:], name="train", about="Train the generator on a zoo."))
