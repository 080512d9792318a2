"""How near does a generator come to fine-tuning on a task's own images where classes are new?

    python -m benchmarks.direct tina-cifar100-cnn5k --config configs/cifar100_cnn5k.yaml

Held-out tasks of each axis of the configuration, and of each number of new classes, are fine-tuned
from the checkpoint's generic model (`ray_jobs.build_zoo`'s pool, `classifier.direct`), and scored
beside generated classifiers on `report` images, by which nothing is chosen. Reports run that for
few tasks beyond the first axis, as it is dear. Intervals draw tasks and images anew, but no other
new classes than were kept out. Data and tasks have to be those of the training, which a checkpoint
does not know: of others, tasks may have been trained on, and `report` images too.

What is fine-tuned stays in the storage: run again, perhaps for more tasks, only what is missing is
done. Appends a row to results/direct.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import append, as_command, checkpoint_folder, load
from ray_jobs.build_zoo import build_zoo
from ray_jobs.job import start_ray
from tina.baselines import classifier_selection
from tina.checkpoint import load_generator
from tina.comparison import DIRECT, SELECTION, TINA, UNTRAINED, compare
from tina.configio import config_to_dict, parse_config
from tina.errors import ConfigError
from tina.evaluation import Evaluation
from tina.files import hash_file
from tina.generator import Generator
from tina.generic import save_generic
from tina.jobconfig import JobConfig
from tina.precision import settle
from tina.run import Run
from tina.storage import MANIFEST
from tina.tasks import Task


def prepare(generator: Generator, config: JobConfig) -> Run:
    """A run whose generic model is the checkpoint's.

    Raises:
        ConfigError: The configuration is another generator's.
    """
    its = config_to_dict(generator.config.classifier)
    if generator.dataset != config.data.name:
        raise ConfigError(f"the checkpoint was trained on {generator.dataset}")
    if settle(config_to_dict(config.classifier), its) != its:
        raise ConfigError("the checkpoint's classifier was configured otherwise")
    run, known = Run(config), (generator.generic.class_ids, generator.max_classes)
    if known != (run.space.seen, config.tasks.max_classes):
        raise ConfigError("the checkpoint was trained on other classes, or for another number")
    run.claim()
    save_generic(run.generic_file, generator.generic, generator.family, run.dataset)
    run.base.keep(run.generic_file.name)
    return run


def chosen(run: Run, most: int) -> dict[str, Sequence[Task]]:
    """The first tasks of each axis, and of each further number of new classes."""
    axes: list[tuple[str, Sequence[Task]]] = [*run.space.held_out.items()]
    more = [(f"{new}_new", tasks) for new, tasks in run.space.unseen.items()]
    return {name: tasks[:most] for name, tasks in axes + more}


def score(evaluation: Evaluation, tasks: Sequence[Task]) -> dict[str, object]:
    """Figures of a group of tasks; points and shares with 95 % intervals."""
    selection = classifier_selection(evaluation.generator)
    thetas = {
        TINA: evaluation.generate(tasks),
        UNTRAINED: evaluation.generate(tasks, untrained=True, seeds=1),
        SELECTION: [[evaluation.generator.theta(*selection(task))] for task in tasks],
        DIRECT: [[evaluation.direct_theta(task)] for task in tasks],
    }
    figures = compare(
        {method: evaluation.score(tasks, found) for method, found in thetas.items()},
        [evaluation.images(task).index.numpy() for task in tasks],
        range(len(tasks)),
        bootstrap=evaluation.config.bootstrap,
    )
    methods, minus = figures["methods"], figures["tina_minus"][DIRECT]
    gap = figures["above_inherited"]
    return {
        "tasks": len(tasks),
        "accuracy": {name: round(100 * of["accuracy"], 2) for name, of in methods.items()},
        "ece": {name: round(of["ece"], 3) for name, of in methods.items()},
        "tina_minus_direct": _rounded(100 * minus["diff"], [100 * x for x in minus["ci95"]]),
        "gap_closed": _rounded(gap["gap_closed"], gap["gap_closed_ci95"]),
    }


def _rounded(value: float | None, ci95: Sequence[float] | None) -> dict[str, Any]:
    return {
        "value": None if value is None else round(value, 2),
        "ci95": None if ci95 is None else [round(x, 2) for x in ci95],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, score, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="packaged name or folder")
    parser.add_argument("--config", required=True, help="what it was trained with")
    parser.add_argument("--storage", default=str(Path("runs").resolve()), help="default: runs")
    parser.add_argument("--tasks", type=int, default=20, help="of each group; default: 20")
    args = parser.parse_args(argv)
    if args.tasks < 1:
        raise ConfigError(f"--tasks must be at least 1, got {args.tasks}")
    before = load()
    folder = checkpoint_folder(args.checkpoint)
    sha256, generator = hash_file(folder / MANIFEST), load_generator(folder)
    keys = ["--storage", args.storage, "--name", f"direct_{sha256[:16]}"]
    run = prepare(generator, parse_config(JobConfig, ["--config", args.config, *keys]))
    groups = chosen(run, args.tasks)
    start_ray()
    with run.place.named():
        build_zoo(run, "direct", [task for tasks in groups.values() for task in tasks])
    direct = run.read_zoo("direct")
    evaluation = Evaluation(
        generator=generator,
        config=run.config.evaluation,
        dataset=run.dataset,
        space=run.space,
        zoo=direct,  # no baseline that learns from a zoo is asked for
        direct=direct,
        store=run.store,
    )
    figures: dict[str, object] = {
        "checkpoint": args.checkpoint,
        "sha256": sha256,
        "images": run.dataset.fingerprint,
        "direct": config_to_dict(run.config.classifier.direct),
        "evaluation": config_to_dict(run.config.evaluation),
        "groups": {name: score(evaluation, tasks) for name, tasks in groups.items()},
    }
    append("direct", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
