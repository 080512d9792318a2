"""Are new classes answered with as often, and as surely, as is right, when that is fitted?

    python -m benchmarks.calibration cifar100_cnn5k    # appends a row to results/calibration.jsonl

For presets whose generators come with the package. Favour and doubt are fitted as at the end of a
training (`tina.calibration`), on `select` images of tasks with excluded classes; then tasks of
which none, one, two, five or ten classes were excluded are drawn anew, and their classifiers judged
on `report` images, on which nothing is chosen: accuracy, Brier score, calibration error, and how
far the mean confidence is above accuracy.

none     neither favoured nor doubted
preset   as the package has it, where both were chosen by hand
fitted   as training would fit them today
crossed  fitted to one half of the excluded classes, and judged on tasks with those of the other, in
         turn: what is to be expected of a user's new classes, which nothing was fitted to
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.record import append, as_command, load, packaged
from tina.calibration import Answers, answer, brier, calibrate
from tina.generator import Generator
from tina.inputs import InputStore
from tina.metrics import Score, calibration_error
from tina.run import Run

TASKS, NEW = 100, (0, 1, 2, 5, 10)
CROSSED = (1, 2, 5)  # a half may have no more than ten


def figures(answers: Sequence[Answers]) -> dict[str, float]:
    """Over all images of all tasks; accuracy, and confidence less that, in percent."""
    scores = [Score.of(found.logits.unsqueeze(0), found.labels) for found in answers]
    return {
        "accuracy": round(100 * float(np.mean([score.accuracy for score in scores])), 2),
        "brier": round(float(np.mean([brier(a.logits, a.labels) for a in answers])), 4),
        "ece": round(calibration_error(scores), 4),
        "overconfidence": round(
            100 * float(np.mean([score.confidence.mean() - score.accuracy for score in scores])), 2
        ),
    }


def crossed(generator: Generator, run: Run, store: InputStore) -> dict[str, dict[str, float]]:
    """Figures by the number of new classes, which are none of those that it was fitted to."""
    order = np.random.default_rng(0).permutation(run.space.excluded).tolist()
    halves = tuple(sorted(order[::2])), tuple(sorted(order[1::2]))
    answers: dict[int, list[Answers]] = {new: [] for new in CROSSED}
    for own, other in (halves, halves[::-1]):
        mended = calibrate(generator, run.dataset, store, replace(run.space, excluded=own))
        judged = replace(run.space, excluded=other)
        for new, found in answers.items():
            tasks = judged.sample_unseen(np.random.default_rng(new), TASKS // 2, new)
            found += answer(mended, run.dataset, store, tasks, partition="report")
    return {str(new): figures(found) for new, found in answers.items()}


def main() -> None:
    """Fit, measure and append, one preset after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", help="names of files in configs/")
    for name in parser.parse_args().presets:
        before = load()
        run, generator, store = packaged(name)
        fitted = calibrate(generator, run.dataset, store, run.space).config.prompt
        preset = generator.config.prompt
        prompts = {
            "none": replace(preset, favour=0.0, doubt=0.0),
            "preset": preset,
            "fitted": fitted,
        }
        found: dict[str, dict[str, object]] = {row: {} for row in prompts}
        for new in NEW:
            rng = np.random.default_rng(new)
            tasks = (
                run.space.sample_unseen(rng, TASKS, new)
                if new
                else run.space.sample_fresh(rng, TASKS)
            )
            for row, prompt in prompts.items():
                mended = generator.with_prompt(favour=prompt.favour, doubt=prompt.doubt)
                answers = answer(mended, run.dataset, store, tasks, partition="report")
                found[row][str(new)] = figures(answers)
        append(
            "calibration",
            {
                "run": name,
                "tasks": TASKS,
                **{
                    row: {"favour": prompt.favour, "doubt": prompt.doubt, "new": found[row]}
                    for row, prompt in prompts.items()
                },
                "crossed": {"new": crossed(generator, run, store)},
            },
            load_before=before,
        )


if __name__ == "__main__":
    as_command(main)
