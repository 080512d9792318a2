"""Tables over several published runs, and over rows of `benchmarks/results/`.

Each is named in README.md or results.md as `<!-- table NAME COMMIT ... -->`; the commits say which
rows of a benchmark are meant. `publish.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tina.checkpoint import load_generator
from tina.packaged import PRETRAINED, pretrained

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "docs" / "results"
ROWS = ROOT / "benchmarks" / "results"
FAMILIES = {
    "cnn5k": "all weights of a network of 5,000",
    "resnet20_head": "the last layer of a ResNet-20 of 270,000, which goes with every classifier",
    "efficientnet_lite0_head": "the last layer of an EfficientNet-Lite0, trained on ImageNet",
}
DATA = {"cifar100": "CIFAR-100", "cifar100+mini_imagenet": "CIFAR-100 and mini-ImageNet"}
SHOTS = (1, 5)  # pictures of each class


def _report(name: str) -> dict[str, Any]:
    return json.loads((REPORTS / name / "report.json").read_text())


def _rows(benchmark: str, commits: Sequence[str]) -> list[dict[str, Any]]:
    """What a benchmark appended at these commits, in their order in the file."""
    lines = (ROWS / f"{benchmark}.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["commit"] in commits]
    assert {row["commit"] for row in found} == set(commits), f"{benchmark} has no such rows"
    return found


def _said(command: str, rows: Sequence[dict[str, Any]]) -> str:
    """What made a table."""
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows))
    machines = "; ".join(dict.fromkeys(row["hardware"] for row in rows))
    return f"`python -m benchmarks.{command}` at {commits}, {machines}.\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """In Markdown; the first columns are words, the others figures."""
    bars = ["---"] * words + ["---:"] * (len(header) - words)
    lines = [header, bars, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def packaged_runs() -> Iterator[tuple[str, str]]:
    """Name of each packaged checkpoint and of the run that it was released from."""
    for name in sorted(pretrained(), key=lambda name: ("imagenet" in name, name)):
        yield name, name.removeprefix("tina-").replace("-", "_")


def _pair(percent: Mapping[str, float], shown: str = "") -> str:
    """What Tina and what is inherited have."""
    return f"**{percent[f'tina{shown}']:.1f}** ({percent[f'untrained{shown}']:.1f})"


def _percent(group: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * method["accuracy"] for name, method in group["methods"].items()}


def packaged(elsewhere: str) -> str:
    """The generators that come with the package, and how often they are right."""
    (there,) = _rows("elsewhere", [elsewhere])
    rows, commits = [], []
    for name, run in packaged_runs():
        report = _report(run)
        commits.append(report["commit"])
        known, two = (report["axes"][axis] for axis in ("unseen_combination", "unseen_class"))
        groups = (known, two, report["by_unseen_classes"][-1])
        other = there["generators"][name]["accuracy"]
        rows.append(
            [
                f"`{name}`",
                *(_pair(_percent(group)) for group in groups),
                _pair(other),
                _pair(other, "_five_examples"),
                f"{report['timing']['ms_per_model_batch1']:.0f}",
            ]
        )
    header = ["generator", "known classes", "two of ten new", "ten new", "another data set"]
    header += ["the same, five pictures of each shown", "ms a model"]
    return (
        f"{_table(header, rows)}\nPer cent of images told right among ten classes, in brackets "
        "with what the names inherit and no denoiser; chance is 10. Reports at "
        f"{', '.join(dict.fromkeys(f'`{commit}`' for commit in commits))}; the other data set is "
        f"Caltech-101, ten of {len(there['classes'])} classes, row `{elsewhere}` of "
        f"`benchmarks.elsewhere`; {there['hardware']}.\n"
    )


def words() -> str:
    """The same generators: what they make, and of which words."""
    rows = []
    for name, run in packaged_runs():
        report, vocabulary = _report(run), load_generator(PRETRAINED / name).vocabulary
        trained, lent = len(vocabulary.own_names), len(vocabulary.lent)
        rows.append(
            [
                f"`{name}`",
                FAMILIES[report["family"]],
                f"{trained} of {DATA[report['dataset']]}"
                + f", {lent} lent by ImageNet" * bool(lent),
                f"{len(vocabulary.names) - trained - lent:,}",
            ]
        )
    header = ["checkpoint", "generates", "trained on classes", "further words"]
    return _table(header, rows, words=3)


def elsewhere(commit: str) -> str:
    """Accuracy on a data set that no generator was made from."""
    (row,) = _rows("elsewhere", [commit])
    rows = []
    for name, found in row["generators"].items():
        of = {k: f"{v:.1f}" for k, v in found["accuracy"].items()}
        rows.append(
            [
                f"`{name}`",
                str(found["familiarity"]["trained_names"]),
                *(of[k] for k in ("tina", "untrained", "tina_five_images")),
                *(of[k] for k in ("tina_five_examples", "untrained_five_examples")),
                of["tina_shuffled_prompt"],
            ]
        )
    header = ["generator", "of these classes trained", "names", "names, no denoiser"]
    header += ["five pictures in their place", "names and five pictures"]
    header += ["names and five pictures, no denoiser", "shuffled names"]
    names = " ".join(row["generators"])
    return _table(header, rows) + "\n" + _said(f"elsewhere {names} --data {row['dataset']}", [row])


def examples(*commits: str) -> str:
    """What pictures beside the words bring, by how many of ten classes are new."""
    found = _rows("examples", commits)
    rows = []
    for row in found:
        for new, of in row["new_of_ten"].items():
            one, five = (of[f"{shots}_of_each"] for shots in SHOTS)
            shown = (five["tina_images"], five["centroids"], one["tina_examples"])
            later = five.get("tina_examples_of_new")
            rows.append(
                [
                    f"{DATA[row['dataset']]}, `{row['family']}`",
                    new,
                    *(f"{method['accuracy']:.1f}" for method in (of["tina"], *shown)),
                    f"{five['tina_examples']['accuracy']:.1f}",
                    "" if later is None else f"{later['accuracy']:.1f}",
                    f"{five['ms_to_learn']:.0f}",
                ]
            )
    header = ["generator", "new of ten", "names", "five pictures in their place"]
    header += ["nearest mean of five pictures", "names and one picture", "names and five"]
    header += ["names and five, of new classes only", "ms to learn"]
    return _table(header, rows, words=2) + "\n" + _said("examples PRESET", found)


ASKED = {
    "own": "their own vectors",
    "placed": "their names, placed as if not known",
    "apart": "the same, without words that share a part",
    "described": "descriptions without the names",
}


def texts(*commits: str) -> str:
    """What a generator makes of texts that it does not know, placed among its words by MiniLM."""
    found = _rows("texts", commits)
    rows = []
    for row in found:
        groups = [row["ten_known"], *row["new_of_ten"].values()]
        for kind, said in ASKED.items():
            if kind in row["ten_known"]:
                rows.append([f"`{row['checkpoint']}`", said, *(_pair(of[kind]) for of in groups)])
    header = ["generator", "these classes asked for by", "ten known classes"]
    header += [f"{new} new of ten" for new in found[0]["new_of_ten"]]
    names = " ".join(row["checkpoint"] for row in found)
    return _table(header, rows, words=2) + "\n" + _said(f"texts {names}", found)


WAYS = ("word", "one", "two", "all", "averaged")


def groups(*commits: str) -> str:
    """Classes that are groups of others, by how they are asked for."""
    found = _rows("groups", commits)
    rows = []
    for row in found:
        ways = row["ways"]
        asked = [_pair(ways[way]) for way in WAYS]
        rows.append([f"`{row['checkpoint']}`", *asked, f"{ways['summed']['tina']:.1f}"])
    header = ["generator", "the group's own word", "the word of one of its classes", "two words"]
    header += ["all words", "the mean of all their vectors as one word's"]
    header += ["no generator: the generic model's probabilities, added up"]
    names = " ".join(row["checkpoint"] for row in found)
    return _table(header, rows) + "\n" + _said(f"groups {names}", found)


GROUPS = {
    "unseen_combination": "all known",
    "shifted_combination": "all known, neighbours",
    "1_new": "one new",
    "unseen_class": "two new",
    "5_new": "five new",
    "10_new": "ten new",
}


def direct(commit: str) -> str:
    """A generator beside fine-tuning on the tasks' own images."""
    found = _rows("direct", [commit])
    rows = []
    for row in found:
        for group in sorted(row["groups"], key=[*GROUPS].index):
            of = row["groups"][group]
            right, minus, closed = of["accuracy"], of["tina_minus_direct"], of["gap_closed"]
            rows.append(
                [
                    f"`{row['checkpoint']}`",
                    GROUPS[group],
                    str(of["tasks"]),
                    *(f"{right[name]:.1f}" for name in ("untrained", "tina", "direct_finetuning")),
                    _with_interval(minus, "+.1f"),
                    _with_interval(closed, ".2f"),
                ]
            )
    header = ["generator", "of ten classes", "tasks", "inherited", "Tina", "direct fine-tuning"]
    header += ["Tina minus it (95 % interval)", "of the way from inherited to it"]
    runs, said = dict(packaged_runs()), []
    for row in found:
        name, (tasks, *_) = row["checkpoint"], [of["tasks"] for of in row["groups"].values()]
        command = f"direct {name} --config configs/{runs[name]}.yaml --tasks {tasks}"
        said.append(_said(command, [row]))
    return _table(header, rows, words=2) + "\n" + "\n".join(said)


def _with_interval(of: Mapping[str, Any], form: str) -> str:
    """Where the gap itself may be zero, its share has no interval, and says nothing."""
    if of["ci95"] is None:
        return ""
    least, most = (format(value, form) for value in of["ci95"])
    return f"{format(of['value'], form)} ({least} to {most})"


KINDS = {
    "pictures": "five pictures",
    "picture": "one picture",
    "wording": "the same name in another sentence",
    "synonym": "another everyday word",
    "wrong": "another trained class",
    "foreign": "a word that the data set does not know",
}


def prompts(commit: str) -> str:
    """What a prompt costs that says classes otherwise than training did."""
    (row,) = _rows("prompts", [commit])
    rows = []
    for kind, said in KINDS.items():
        for share in row["kinds"][kind].values():
            points = share["tina_points"]
            error = f"({points['accuracy_points_se']:.1f})"
            rows.append(
                [
                    said,
                    f"{share['changed_of_ten']:.0f}",
                    f"{points['accuracy_points']:+.1f} {error}",
                    f"{share['tina_minus_untrained_points']:+.1f}",
                    f"{share['familiarity']:.2f}",
                ]
            )
    header = ["in the name's place", "of ten", "points (standard error)"]
    header += ["Tina minus what is inherited", "familiarity"]
    return _table(header, rows) + "\n" + _said("prompts runs/cifar100_cnn5k", [row])


def calibration() -> str:
    """Expected calibration error of every published run."""
    rows = []
    for file in sorted(REPORTS.glob("*/report.json")):
        report = json.loads(file.read_text())
        axes = report["axes"]
        known = axes["unseen_combination"]["methods"]
        new = axes["unseen_class"].get("methods", {})
        all_new = [of for of in report["by_unseen_classes"] if of["unseen"] == 10]
        last = all_new[-1]["methods"] if all_new else {}
        errors = [known[m]["ece"] for m in ("direct_finetuning", "classifier_selection", "tina")]
        errors += [of["tina"]["ece"] if of else None for of in (new, last)]
        rows.append(
            [
                f"`{file.parent.name}`",
                *("" if error is None else f"{error:.2f}" for error in errors),
            ]
        )
    header = ["run", "known: direct fine-tuning", "known: selection", "known: Tina"]
    header += ["two new (2 to 20 classes: one): Tina", "ten new: Tina"]
    return _table(header, rows)


HOW = {
    "none": "none",
    "preset": "as packaged",
    "fitted": "fitted",
    "crossed": "fitted to others",
}


def fitted(*commits: str) -> str:
    """What fitting favour and doubt brings, and what choosing them by hand had brought."""
    found = _rows("calibration", commits)
    rows = []
    for row in found:
        for key, said in HOW.items():
            of = row[key]
            cells = [_calibrated(of["new"].get(new)) for new in ("1", "2", "5", "10")]
            pair = [f"{of[name]:g}" if name in of else "" for name in ("favour", "doubt")]
            rows.append([f"`{row['run']}`", said, *pair, *cells])
    header = ["run", "chosen", "favour", "doubt", *(f"{n} new" for n in ("one", "two", "five"))]
    names = " ".join(row["run"] for row in found)
    return _table([*header, "ten new"], rows, words=2) + "\n" + _said(f"calibration {names}", found)


def _calibrated(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return ""
    return f"{figures['accuracy']:.1f}, {figures['ece']:.3f} ({figures['overconfidence']:+.1f})"


TABLES: dict[str, Callable[..., str]] = {
    table.__name__: table
    for table in (
        *(packaged, words, elsewhere, examples, texts, groups),
        *(direct, prompts, calibration, fitted),
    )
}
