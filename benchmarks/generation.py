"""How fast is a classifier generated: beside the paper's recipe, fine-tuning, and the processor?

    python -m benchmarks.generation     # appends a row to results/generation.jsonl,
                                        # writes profiles/generation.txt
    python -m benchmarks.generation --short --checkpoint runs/quickstart/checkpoint

All in one process, variants in turns, medians of the turns beside each other as ratios:

- the pipeline with a checkpoint, prompts of as many trained names as it takes, at several batches;
- the paper's recipe: 12 blocks of the checkpoint's width, linear betas, 1,000 ancestral steps, the
  text encoded at each. A few steps are timed and multiplied. Weights are drawn, for time does not
  depend on them: those of the blocks, and those of CLIP's text tower (ViT-B/32), which encodes each
  name of a batch once per step;
- direct fine-tuning by the checkpoint's recipe, a share of its steps, on noise of the images'
  shape: with one thread and with all, and the better of the two counts;
- matrix products of several sizes, the best of which is what the denoiser could reach.

The long form also asks, on the images that the checkpoint's run selects by (its folder and its data
must be at hand), what accuracy the ancestral sampler reaches, and with how many steps fine-tuning
from classifier selection is as good as what the pipeline generates: whole recipes, each annealed
over its own length.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import append, as_command, checkpoint_folder, load, percentiles
from tina import TinaPipeline
from tina.asked import pad
from tina.config import RecipeConfig
from tina.diffusion import advance, as_x0, begin
from tina.files import write_text
from tina.finetune import Lesson, accuracy, finetune, initial_theta
from tina.generator import Generator, new_denoiser
from tina.inputs import InputStore
from tina.novelty import TIMED_STEPS
from tina.precision import has_bf16, settle
from tina.run import Run
from tina.views import Views

BATCHES = (1, 8, 64)
PAPER_DEPTH, PAPER_STEPS = 12, 1000
FINETUNE_STEPS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 512, 2048))
PROFILE = Path(__file__).parent / "profiles" / "generation.txt"


@dataclass(frozen=True, kw_only=True)
class Length:
    """How much of each is timed.

    Args:
        calls: Of the pipeline in a turn, by batch.
        steps: Of the paper's denoiser in a turn, by batch.
        share: Of the fine-tuning recipe's steps in a turn, at least `TIMED_STEPS`.
    """

    turns: int
    calls: Mapping[int, int]
    steps: Mapping[int, int]
    share: float


LONG = Length(turns=5, calls={1: 40, 8: 12, 64: 4}, steps={1: 10, 8: 5, 64: 2}, share=0.02)
SHORT = Length(turns=3, calls={1: 5, 8: 2, 64: 1}, steps={1: 2, 8: 1, 64: 1}, share=0.005)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def prompts(generator: Generator, batch: int) -> list[list[str]]:
    """Tasks of as many trained names as the generator takes, each task its own."""
    names, draw = generator.vocabulary.trained_names, random.Random(0)
    return [draw.sample(names, min(len(names), generator.max_classes)) for _ in range(batch)]


def paper_generator(generator: Generator) -> Generator:
    """The paper's denoiser and sampler, of this generator's width."""
    config = replace(
        generator.config,
        denoiser=replace(generator.config.denoiser, depth=PAPER_DEPTH),
        diffusion=replace(
            generator.config.diffusion,
            schedule="linear",
            timesteps=PAPER_STEPS,
            prediction="x0",
            sampler="ddpm",
            sampling_steps=PAPER_STEPS,
            guidance=1.0,
        ),
    )
    dim = generator.vocabulary.space.dim
    denoiser = new_denoiser(config, generator.codec, dim=dim, seed=0).eval().requires_grad_(False)
    return replace(generator, config=config, denoiser=denoiser)


def paper_steps(generator: Generator, tasks: Sequence[Sequence[str]], steps: int) -> float:
    """Seconds per ancestral step, the conditions projected anew in each."""
    diffusion, vocabulary = generator.config.diffusion, generator.vocabulary
    embeddings, mask = vocabulary.of([[vocabulary.names.index(n) for n in t] for t in tasks])
    walk = begin(
        diffusion,
        noise=generator.noise(range(len(tasks)))[:, : generator.codec.body_tokens + mask.shape[1]],
        cond=generator.condition(embeddings),
        mask=mask,
        steps=PAPER_STEPS,
        seeds=range(len(tasks)),
    )
    denoise = as_x0(generator.denoiser, diffusion)
    start = time.perf_counter()
    for _ in range(steps):
        walk = advance(denoise, walk)
    return (time.perf_counter() - start) / steps


def text_tower() -> Callable[[Sequence[str]], Tensor]:
    """CLIP's text tower with random weights: as fast as with OpenAI's, and no download."""
    import open_clip

    clip = open_clip.create_model("ViT-B-32").eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return lambda names: clip.encode_text(tokenizer(list(names)))


def direct_recipe(generator: Generator) -> RecipeConfig:
    """The checkpoint's, in the precision that is fast here and not where it was trained."""
    recipe = generator.config.classifier.direct
    return replace(recipe, **settle({"precision": "auto"}, {}))


def direct_seconds(generator: Generator, share: float, *, threads: int) -> float:
    """Seconds of direct fine-tuning per model, from a share of its steps."""
    family, classes = generator.family, generator.max_classes
    draw = torch.Generator().manual_seed(0)
    shape = (100 * classes, family.channels, family.image_size, family.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    store = InputStore(family, Views(images=images))
    index = torch.arange(shape[0])
    lesson = Lesson(class_ids=tuple(range(classes)), index=index, labels=index % classes, seed=0)
    recipe = direct_recipe(generator)
    steps = min(recipe.steps, max(TIMED_STEPS, round(recipe.steps * share)))
    short = replace(recipe, steps=steps)
    theta = initial_theta(family, classes, seed=0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spent = timed(
            lambda: finetune(family, [theta], [lesson], store, short, stacked=False),
        )
    finally:
        torch.set_num_threads(before)
    return spent * recipe.steps / short.steps


def in_turns(pipe: TinaPipeline, length: Length) -> dict[str, dict[int, list[float]]]:
    """Seconds of every variant by batch (of fine-tuning by threads)."""
    generator, encode = pipe.generator, text_tower()
    paper = paper_generator(generator)
    tasks = {batch: prompts(generator, batch) for batch in BATCHES}
    distinct = {b: sorted({name for task in found for name in task}) for b, found in tasks.items()}
    cores = torch.get_num_threads()
    times: dict[str, dict[int, list[float]]] = {
        name: {batch: [] for batch in BATCHES} for name in ("pipeline", "paper_step", "text")
    }
    times["direct"] = {threads: [] for threads in sorted({1, cores})}
    pipe(tasks[BATCHES[-1]])  # all are warm before the first turn
    paper_steps(paper, tasks[BATCHES[-1]], 1)
    encode(distinct[BATCHES[0]])
    direct_seconds(generator, length.share, threads=cores)
    for turn in range(length.turns):
        for batch in BATCHES:
            for call in range(length.calls[batch]):
                first = (turn * length.calls[batch] + call) * batch
                seeds = list(range(first, first + batch))
                times["pipeline"][batch].append(timed(partial(pipe, tasks[batch], seed=seeds)))
            times["paper_step"][batch].append(paper_steps(paper, tasks[batch], length.steps[batch]))
            times["text"][batch].append(timed(partial(encode, distinct[batch])))
        for threads, found in times["direct"].items():
            found.append(direct_seconds(generator, length.share, threads=threads))
    return times


def compared(
    times: Mapping[str, Mapping[int, Sequence[float]]], length: Length
) -> dict[str, object]:
    """Rates, latencies and ratios out of what `in_turns` returns."""
    pipeline = {b: median(found) for b, found in times["pipeline"].items()}
    step, text = ({b: median(t) for b, t in times[k].items()} for k in ("paper_step", "text"))
    direct = {threads: median(found) for threads, found in times["direct"].items()}
    # one model after another with all threads, or as many at once as there are threads
    alone, throughput = min(direct.values()), min(t / n for n, t in _spread(direct))
    return {
        "pipeline": {
            b: {"models_per_s": round(b / pipeline[b], 1), "calls": len(found)} | percentiles(found)
            for b, found in times["pipeline"].items()
        },
        "paper": {
            b: {
                "denoiser_ms_per_step": round(1000 * step[b], 2),
                "text_ms_per_step": round(1000 * text[b], 2),
                "s_per_model": round(PAPER_STEPS * (step[b] + text[b]) / b, 2),
                "s_per_model_text_once": round((PAPER_STEPS * step[b] + text[b]) / b, 2),
                "scaled_from_steps": len(times["paper_step"][b]) * length.steps[b],
            }
            for b in pipeline
        },
        "direct_s_per_model": {threads: round(t, 2) for threads, t in direct.items()},
        "times_paper": {
            b: round(PAPER_STEPS * (step[b] + text[b]) / pipeline[b], 1) for b in pipeline
        },
        "times_paper_text_once": {
            b: round((PAPER_STEPS * step[b] + text[b]) / pipeline[b], 1) for b in pipeline
        },
        "times_direct": {
            b: round((alone if b == 1 else throughput) * b / pipeline[b], 1) for b in pipeline
        },
    }


def _spread(direct: Mapping[int, float]) -> list[tuple[int, float]]:
    """Models that run at once and seconds of each: the run of all threads is alone."""
    most = max(direct)
    return [(most if threads == 1 else 1, seconds) for threads, seconds in direct.items()]


def roofline(generator: Generator, turns: int) -> dict[str, object]:
    """Achieved over attainable FLOP/s of the denoiser at the largest batch."""
    batch = BATCHES[-1]
    embeddings, mask = pad([generator.vocabulary.embeddings[: generator.max_classes]] * batch)
    walk = generator.begin(embeddings, mask, seeds=range(batch))
    modulation = generator.denoiser.modulate(torch.zeros(batch))

    @torch.no_grad()
    def run() -> Tensor:
        return generator.denoiser.predict(walk.x, modulation, walk.cond, mask)

    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_total_flops()
    types = [torch.float32, *([torch.bfloat16] if has_bf16() else [])]
    best = dict.fromkeys(types, 0.0)
    passes: dict[torch.dtype, list[float]] = {kind: [] for kind in types}
    for _ in range(1 + turns):
        for kind in types:
            with torch.autocast("cpu", kind, enabled=kind is not torch.float32):
                passes[kind].append(timed(run))
            for m, k, n in PRODUCTS:
                a, b = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)
                seconds = min(timed(partial(torch.matmul, a, b)) for _ in range(3))
                best[kind] = max(best[kind], 2 * m * k * n / seconds)
    spent = {kind: median(found[1:]) for kind, found in passes.items()}
    return {
        "batch": batch,
        "gflop_per_pass": round(flops / 1e9, 3),
        **{
            str(kind).removeprefix("torch."): {
                "attainable_gflop_per_s": round(best[kind] / 1e9, 1),
                "achieved_gflop_per_s": round(flops / spent[kind] / 1e9, 1),
                "achieved_over_attainable": round(flops / spent[kind] / best[kind], 3),
                "ms_per_pass": round(1000 * spent[kind], 2),
            }
            for kind in types
        },
    }


def accuracies(run: Run, generator: Generator) -> dict[str, Any]:
    """Of the run's validation tasks on `select` images: both samplers', and fine-tuning's."""
    weights = generator.denoiser.state_dict()
    diffusion = replace(generator.config.diffusion, sampler="ddpm", sampling_steps=PAPER_STEPS)
    slow = replace(generator, config=replace(generator.config, diffusion=diffusion))
    generated = mean(run.validator(generator)(weights))
    found: dict[str, Any] = {
        "tasks": len(run.space.val),
        "selection": round(mean(run.validator(generator)(None)), 4),
        "pipeline": round(generated, 4),
        "same_weights_ancestral": round(mean(run.validator(slow)(weights)), 4),
    }
    reached, needed, whole = {}, None, direct_recipe(generator)
    for steps in (*(s for s in FINETUNE_STEPS if s < whole.steps), whole.steps):
        scores = []
        for task in run.space.val:
            recipe = replace(whole, steps=steps)
            rows = generator.generic.select(task.class_ids)
            start = generator.theta(generator.generic.body, rows)
            lesson = Lesson.of(run.dataset, task.class_ids, seed=task.seed)
            theta = finetune(run.family, [start], [lesson], run.store, recipe, stacked=False)[0]
            judged = Lesson.of(run.dataset, task.class_ids, seed=0, partition="select")
            scores.append(accuracy(run.family, theta, run.store, judged))
        reached[steps] = round(mean(scores), 4)
        if mean(scores) >= generated:
            needed = steps
            break
    return found | {"direct_after_steps": reached, "direct_steps_to_pipeline": needed}


def write_profile(pipe: TinaPipeline, file: Path) -> None:
    """Where the time goes, by operator, as text."""
    parts = [f"TinaPipeline, {torch.get_num_threads()} threads; python -m benchmarks.generation\n"]
    for batch in (BATCHES[0], BATCHES[-1]):
        tasks, calls = prompts(pipe.generator, batch), 5
        pipe(tasks)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(calls):
                pipe(tasks)
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        parts.append(f"batch {batch}, {calls} calls\n{table}")
    file.parent.mkdir(exist_ok=True)
    write_text(file, "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n")


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "runs/cifar100_cnn5k/checkpoint"
    parser.add_argument("--checkpoint", type=checkpoint_folder, default=default)
    parser.add_argument("--short", action="store_true", help="few turns, speed alone")
    args = parser.parse_args()
    before, length = load(), SHORT if args.short else LONG
    pipe = TinaPipeline.from_pretrained(args.checkpoint)
    run = None if args.short else Run.open(args.checkpoint.parent)
    config = pipe.generator.config
    figures: dict[str, Any] = {
        "short": args.short,
        "dataset": pipe.generator.dataset,
        "family": pipe.generator.family.name,
        "denoiser": {"width": config.denoiser.width, "depth": config.denoiser.depth},
        "paper_denoiser": {"width": config.denoiser.width, "depth": PAPER_DEPTH},
        "sampling_steps": config.diffusion.sampling_steps,
        "direct_steps": config.classifier.direct.steps,
        "threads": torch.get_num_threads(),
        "turns": length.turns,
        "roofline": roofline(pipe.generator, length.turns),
    }
    figures |= compared(in_turns(pipe, length), length)
    if run:
        found = accuracies(run, pipe.generator)
        if steps := found["direct_steps_to_pipeline"]:
            share = steps / config.classifier.direct.steps
            ratios = figures["times_direct"].items()
            found["times_direct_to_pipeline"] = {b: round(r * share, 1) for b, r in ratios}
        figures["accuracy_on_select"] = found
        write_profile(pipe, PROFILE)
    append("generation", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
