"""Copy a run's report and plots to docs/results/ and write its tables into README and results.md.

    python docs/publish.py runs/cifar100_cnn5k             # copy, then rewrite the tables
    python docs/publish.py runs/cifar100_cnn5k --release   # its checkpoint too, into the package
    python docs/publish.py runs/quickstart/tune/digits     # a sweep
    python docs/publish.py                                 # rewrite the tables alone

A table stands between `<!-- table NAME -->` (a run's axes) or `<!-- table NAME AXIS -->` and
`<!-- end -->`; everything in between is written here, so that no number is ever typed. Tables of
several runs and of benchmarks are in `across.py` beside this.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tina.checkpoint import load_generator, save_generator
from tina.configio import config_from_dict, config_to_dict
from tina.files import hash_file, write_text
from tina.generator import Generator
from tina.jobconfig import EvaluationConfig
from tina.packaged import PRETRAINED
from tina.report import markdown, model_card
from tina.run import Run
from tina.storage import MANIFEST

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # where there is no package, and a test loads this file by its path
from across import TABLES, packaged_runs  # noqa: E402

RESULTS = DOCS / "results"
STRANGE = 0.25  # less familiar words make classifiers that know little, and take room
CROWDED = 0.45  # the same, beside a thousand names that are lent


def table(name: str, axis: str | None = None) -> str:
    """The tables of a published report, with where and how they were measured."""
    report = json.loads((RESULTS / name / "report.json").read_text())
    generator, timing = report["generator"], report["timing"]
    facts = (
        f"{report['dataset']}, `{report['family']}`; generator of {generator['parameters']:,} "
        f"parameters, {generator['steps']} sampling steps: "
        f"{timing['ms_per_model_batch1']:.0f} ms per model alone, "
        f"{timing['ms_per_model_batch64']:.1f} ms in a batch of 64; direct fine-tuning "
        f"{_seconds(timing['finetune_s_per_model'])} s (timed over a twentieth of its steps). "
        f"Made by {_commands(name, report)}, evaluated on {report['hardware']}, at commit "
        f"`{report['commit']}`."
    )
    return f"{facts}\n\n{markdown(report, axis)}"


def _seconds(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _commands(name: str, report: Mapping[str, Any]) -> str:
    """What makes a report: the demo, and where it measures more than its preset says, a job."""
    preset = yaml.safe_load((DOCS.parent / f"configs/{name}.yaml").read_text())
    usual = config_to_dict(config_from_dict(EvaluationConfig, preset["evaluation"]))
    more = {k: v for k, v in report.get("evaluation", usual).items() if v != usual[k]}
    demo = f"`make demo CONFIG=configs/{name}.yaml`"
    if not more:
        return demo
    flags = " ".join(f"--evaluation.{k} {shlex.quote(str(v))}" for k, v in more.items())
    after = " after the regressor's training in `make reproduce`" if "regressor" in more else ""
    return (
        f"{demo}, then{after} `python -m ray_jobs.evaluate --config configs/{name}.yaml "
        f"--storage $PWD/runs {flags}`"
    )


def rewrite(text: str) -> str:
    """Text with every marked table written anew."""

    def fill(match: re.Match[str]) -> str:
        name, *rest = match[1].split()
        text = TABLES[name](*rest) if name in TABLES else table(name, *rest)
        return f"<!-- table {match[1]} -->\n{text}<!-- end -->"

    pattern = r"<!-- table (\w+(?: \w+)*) -->\n.*?<!-- end -->"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def publish_sweep(sweep: Path) -> None:
    """Copy what a sweep found."""
    folder = RESULTS / f"tune_{sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("trials.parquet", "pareto.png"):
        shutil.copy(sweep / name, folder)
    _copy_config(sweep / "best.yaml", folder)


def _copy_config(file: Path, folder: Path) -> None:
    """A configuration without the place where its run lies."""
    text = re.sub(r"^storage: .*\n", "", file.read_text(), flags=re.MULTILINE)
    write_text(folder / file.name, text)


def publish(run: Path) -> None:
    """Copy what a run measured, and how it was made."""
    folder = RESULTS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "report.json", folder)
    _copy_config(run / "config.yaml", folder)
    for plot in (run / "plots").glob("*.png"):
        shutil.copy(plot, folder)


def release(run: Path) -> None:
    """A run's checkpoint, rounded, into the package, in place of an earlier one.

    Without the words that are strangest to it.
    """
    folder = PRETRAINED / f"tina-{run.name.replace('_', '-')}"
    generator = load_generator(run / "checkpoint")
    words = generator.vocabulary
    kept = words.familiarity(words.embeddings) > (CROWDED if words.lent else STRANGE)
    kept[: len(Run.open(run).dataset.class_names)] = True  # ids of classes are places
    known = replace(
        words,
        names=tuple(name for name, near in zip(words.names, kept.tolist(), strict=True) if near),
        embeddings=words.embeddings[kept],
        trained=words.trained[kept],
    )
    generator = replace(generator, vocabulary=known)
    card = _card(run.name, generator)
    if folder.exists():  # only now that there is another to take its place
        shutil.rmtree(folder)
    save_generator(generator, folder, card=card, small=True)


def _card(name: str, generator: Generator) -> str:
    """What a packaged checkpoint says of itself, by the published report of its run."""
    report = json.loads((RESULTS / name / "report.json").read_text())
    return (
        f"{model_card(name, generator, report)}\n"
        "The denoiser's matrices and the embeddings are rounded to eight bits, its other weights "
        "to half precision; measured were those before it.\n"
    )


def rewrite_cards() -> None:
    """The cards of the packaged checkpoints, whose tables a report writes otherwise by now."""
    for name, run in packaged_runs():
        folder = PRETRAINED / name
        card = _card(run, load_generator(folder))
        write_text(folder / "README.md", card)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["README.md"] = hash_file(folder / "README.md")
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Publish the runs named, then rewrite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs or sweeps")
    parser.add_argument("--release", action="store_true", help="their checkpoints too")
    args = parser.parse_args(argv)
    for folder in args.runs:
        (publish_sweep if (folder / "best.yaml").exists() else publish)(folder)
        if args.release:
            release(folder)
    for file in (DOCS.parent / "README.md", DOCS / "results.md"):
        file.write_text(rewrite(file.read_text()))
    rewrite_cards()


if __name__ == "__main__":
    main()
