"""How fast is a step of the generator's training, and how near what the processor can do?

    python -m benchmarks.training [RUN]     # appends a row to results/training.jsonl

sizes   Samples a second of the weight-space step at 14M, 46M and 168M parameters, and its FLOP/s
        over those of the best matrix product in the same turns (model FLOP utilisation).
input   With RUN, the folder of a run: a step whose batch is drawn before it, one whose batch a
        thread drew during the step before, and one whose batch is at hand.
zero    DeepSpeed's ZeRO stages on two ranks of one thread each, beside stage 0, at 14M parameters.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generation import timed
from benchmarks.record import append, as_command, load
from ray_jobs.engine import DeepSpeedEngine
from ray_jobs.process import settle_in
from tina.batches import Batch
from tina.checkpoint import load_generator
from tina.config import DenoiserConfig
from tina.diffusion import signal_level
from tina.engine import Engine, LocalEngine
from tina.jobconfig import ClusterConfig, JobConfig, TrainConfig
from tina.precision import has_bf16
from tina.run import Run
from tina.training import losses
from tina.transformer import Denoiser

# what CNN-5K with ten classes and CLIP's text vectors make of the denoiser's shapes
TOKENS, VALUES, ROW, CLASSES, EMBEDDING = 9, 576, 33, 10, 512
SIZES = {"14M": (320, 5), "46M": (512, 8), "168M": (768, 15)}
BATCH, TURNS, RANKS, STAGE_STEPS = 64, 3, 2, 8
PRODUCTS = ((1856, 768, 3072), (2048, 2048, 2048), (4096, 1024, 4096))


def new_denoiser(size: str) -> Denoiser:
    """A denoiser of that size, from seed 0."""
    width, depth = SIZES[size]
    torch.manual_seed(0)
    return Denoiser(
        DenoiserConfig(width=width, depth=depth, heads=width // 64),
        body_tokens=TOKENS,
        token_width=VALUES,
        row_width=ROW,
        embedding_width=EMBEDDING,
    )


def draw_inputs(batch: int) -> tuple[Tensor, ...]:
    """Noisy tokens, timesteps, conditions and mask of so many samples."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, TOKENS + CLASSES, VALUES, generator=draw),
        torch.randint(1000, (batch,), generator=draw),
        torch.randn(batch, CLASSES, EMBEDDING, generator=draw),
        torch.ones(batch, CLASSES, dtype=torch.bool),
    )


def take_step(engine: Engine, inputs: tuple[Tensor, ...]) -> None:
    """Forward, mean square error, backward, update."""
    engine.backward(engine(*inputs).float().square().mean())
    engine.step()


def product_rate(kind: torch.dtype) -> float:
    """FLOP/s of the best of a few matrix products."""
    best = 0.0
    for m, k, n in PRODUCTS:
        a, b = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)
        best = max(best, 2 * m * k * n / min(timed(partial(torch.matmul, a, b)) for _ in range(3)))
    return best


def utilisation(size: str) -> dict[str, Any]:
    """Rates of one size in every precision that the machine has."""
    engine = LocalEngine(new_denoiser(size), TrainConfig())
    inputs = draw_inputs(BATCH)
    with FlopCounterMode(display=False) as counter:
        engine.backward(engine(*inputs).square().mean())
    flops = counter.get_total_flops()
    engine.step()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "gflop_per_step": round(flops / 1e9, 1),
    }
    for kind in (torch.float32, *([torch.bfloat16] if has_bf16() else [])):
        steps, rates = [], []
        for _ in range(TURNS):
            with torch.autocast("cpu", kind, enabled=kind is not torch.float32):
                steps.append(timed(lambda: take_step(engine, inputs)))
            rates.append(product_rate(kind))
        seconds = median(steps)
        found[str(kind).removeprefix("torch.")] = {
            "samples_per_s": round(BATCH / seconds, 1),
            "achieved_gflop_per_s": round(flops / seconds / 1e9, 1),
            "attainable_gflop_per_s": round(max(rates) / 1e9, 1),
            "utilisation": round(flops / seconds / max(rates), 3),
        }
    return found


def input_share(run: Run, *, steps: int = 20) -> dict[str, float]:
    """Milliseconds of a training step by how its batch comes: what waiting for it takes of a step.

    In line: drawn before the step. Ahead: drawn by a thread during the step before, as training
    does. At hand: always the same one.
    """
    generator = load_generator(run.start)
    denoiser = generator.denoiser.train().requires_grad_(True)
    config = run.config.train
    engine, source = LocalEngine(denoiser, config), run.source(generator, config)
    abar, at_hand = signal_level(generator.config.diffusion), source.batch(0)
    half = config.precision == "bf16"

    batches = source.batches(range(steps), range(1), parts=1)
    ways: dict[str, Callable[[int], Batch]] = {
        "in_line": source.batch,
        "ahead": lambda n: next(batches),
        "at_hand": lambda n: at_hand,
    }

    def step(way: str, number: int) -> None:
        batch = ways[way](number)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = losses(engine, generator, batch, abar)
        engine.backward(found["function_loss"] + config.weight_loss * found["weight_loss"])
        engine.step()

    step("at_hand", 0)
    turns = [[timed(partial(step, way, n)) for way in ways] for n in range(steps)]
    medians = [1000 * median(times) for times in zip(*turns, strict=True)]
    found = dict(zip(ways, medians, strict=True))
    return {f"{way}_ms": round(ms, 1) for way, ms in found.items()} | {
        "share": round(1 - found["at_hand"] / found["ahead"], 3)
    }


def rank_of_stage(rank: int, stage: Literal[0, 1, 2, 3], folder: str, config: JobConfig) -> None:
    """One process of two: time its steps in a ZeRO stage, and leave the median in a file."""
    settle_in(threads=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    config = replace(config, cluster=replace(config.cluster, zero_stage=stage))
    engine = DeepSpeedEngine(new_denoiser("14M"), config, resume=None)
    inputs = draw_inputs(BATCH // RANKS)
    take_step(engine, inputs)
    times = [timed(lambda: take_step(engine, inputs)) for _ in range(STAGE_STEPS)]
    if rank == 0:
        Path(folder, "seconds").write_text(str(median(times)))
    distributed.destroy_process_group()


def stages() -> dict[int, dict[str, float]]:
    """Samples a second of each ZeRO stage, and its time over stage 0's."""
    config = JobConfig(name="zero", storage="/", cluster=ClusterConfig(train_workers=RANKS))
    seconds = {}
    for stage in range(4):
        with tempfile.TemporaryDirectory() as folder:
            spawn(rank_of_stage, (stage, folder, config), nprocs=RANKS)
            seconds[stage] = float(Path(folder, "seconds").read_text())
    return {
        stage: {"samples_per_s": round(BATCH / t, 1), "times_stage_0": round(t / seconds[0], 2)}
        for stage, t in seconds.items()
    }


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, for its input")
    args = parser.parse_args()
    before = load()
    settle_in()
    figures: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "sizes": {size: utilisation(size) for size in SIZES},
        "zero": stages(),
    }
    if args.run:
        figures["input"] = input_share(Run.open(args.run))
    append("training", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
