"""A training process that may be killed at any time, for `test_training.py`.

python resume_script.py RUN STATES STEPS EVERY: trains the run's generator, writes STATES/step-N
every few steps, and goes on from the latest state there.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tina.engine import LocalEngine
from tina.run import Run
from tina.training import Progress, train


def main(run: Run, states: Path, *, steps: int, every: int) -> None:
    torch.set_num_threads(1)
    config = replace(run.config.train, steps=steps, checkpoint_every=every)
    generator = run.new_generator()
    engine = LocalEngine(generator.denoiser, config)
    start = Progress.start(generator.denoiser)
    states.mkdir(exist_ok=True)
    found = sorted(states.glob("step-*"))
    if found:
        engine.load(found[-1] / "engine.safetensors")
        start = Progress.load(found[-1] / "progress.safetensors")
    print(f"from step {start.step}", flush=True)

    def report(progress: Progress, figures: dict[str, float]) -> None:
        half = states / f".step-{progress.step:04d}"
        engine.save(half / "engine.safetensors")
        progress.save(half / "progress.safetensors")
        os.rename(half, states / f"step-{progress.step:04d}")

    train(
        config,
        engine=engine,
        source=run.source(generator, config),
        start=start,
        report=report,
        validate=lambda weights: partial(run.validator(generator), weights),
    )


if __name__ == "__main__":
    run, states, steps, every = sys.argv[1:]
    main(Run.open(Path(run)), Path(states), steps=int(steps), every=int(every))
