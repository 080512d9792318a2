"""The README is true: its commands run, its tables are what the reports say."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from ray_jobs.job import run_job
from tina.checkpoint import load_generator
from tina.cli import main
from tina.configio import config_from_dict, config_to_dict, parse_config
from tina.datasets import Dataset
from tina.errors import ConfigError, PromptError
from tina.fitting import task_space
from tina.jobconfig import JobConfig
from tina.packaged import PRETRAINED, pretrained
from tina.pipeline import TinaPipeline
from tina.plots import plot_report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FAMILIES = ("cnn5k", "resnet20_head")  # of the packaged generators


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def lines(start: str) -> list[list[str]]:
    shell = "\n".join(blocks("sh"))
    found = [shlex.split(line, comments=True) for line in shell.splitlines() if start in line]
    assert found, f"README has no line with {start!r}"
    return found


def test_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, _ = blocks("python")  # the other needs a service: tests/test_serve_cluster.py
    scope: dict[str, object] = {}
    exec(block, scope)
    assert (tmp_path / "mine.safetensors").exists()
    assert (tmp_path / "mine.onnx").exists()
    assert tuple(scope["logits"].shape) == (4, 3)  # type: ignore[attr-defined]


def test_prompts_of_every_kind_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = re.findall(r"\| `(pipe\(.*?\))` \|", README)
    assert len(calls) == 7
    rng = np.random.default_rng(0)
    for name in re.findall(r"\w+\.jpg", " ".join(calls)):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(name)
    scope = {"pipe": TinaPipeline.from_pretrained("tina-cifar100-cnn5k")}
    *most, described = calls
    for call in most:
        eval(call, scope)
    with pytest.raises(PromptError, match='encoder="sentence"'):  # as it says, it needs one
        eval(described, scope)
    scope["pipe"] = TinaPipeline.from_pretrained("tina-cifar100-cnn5k", encoder="sentence")
    eval(described, scope)


def test_command_lines_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINA_CHECKPOINT", str(tiny_checkpoint))
    (tmp_path / "serve").symlink_to(ROOT / "serve")
    for words in lines(".venv/bin/tina"):
        if words[0].startswith("TINA_CHECKPOINT"):  # other classes: the CIFAR-100 checkpoint's
            continue
        assert words[0] == ".venv/bin/tina"
        assert main(words[1:]) == 0, words


def test_what_its_lines_make_is_no_part_of_the_code_nor_of_a_job() -> None:
    text = "\n".join(blocks("sh") + blocks("python"))
    made = set(re.findall(r"[\s\"](\w+\.(?:safetensors|onnx))\b", text))
    assert {"otter.onnx", "mine.safetensors", "m.safetensors"} <= made
    # what a job leaves behind is read from git's own file
    (ignored,) = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    for name in (*made, "data/cifar100/train.parquet"):
        assert ignored(ROOT / name), name
    for name in ("tina/pretrained/tina-cifar100-cnn5k/model.safetensors", "tina/datasets.py"):
        assert not ignored(ROOT / name), name


def test_words_that_it_names_are_known() -> None:
    text = " ".join(README.split())
    vocabulary = load_generator(PRETRAINED / "tina-cifar100-cnn5k").vocabulary
    for word in re.findall(r"Further words \((.*?);", text)[0].split(", "):
        assert vocabulary.lookup(word.strip('"')) is not None, word
    fox, pizza = vocabulary.familiarity(
        torch.stack([vocabulary.lookup(word) for word in ("red fox", "pizza")])  # type: ignore[misc]
    ).tolist()
    assert f"{fox:.2f} for the fox, {pizza:.2f} for the pizza" in text
    (said,) = re.findall(r"\*\*Both data sets\*\* \(\"(.*?)\"", text)
    for family in FAMILIES:
        both = PRETRAINED / f"tina-cifar100-mini-imagenet-{family.replace('_', '-')}"
        assert set(said.split(", ")) <= set(load_generator(both).vocabulary.trained_names)


def test_job_lines_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    jobs = lines("python -m ray_jobs.quickstart")
    assert ["--dry-run" in words for words in jobs] == [False, True]
    for words in jobs:
        argv = [word.replace("$PWD", str(ROOT)) for word in words[3:]]
        assert run_job(lambda run: None, [*argv, "--dry-run"], name="quickstart", about="") == 0
    shown = capsys.readouterr().out
    assert "root: /my/images" in shown
    assert "width: 128" in shown


@pytest.mark.parametrize(
    ("classes", "flags"),
    [
        (63, None),
        (62, r"--tasks.unseen_counts '\[1, 5\]'$"),
        (40, r"--tasks.unseen_counts '\[1, 5\]'$"),
        (10, r"--tasks.min_classes 2 .*--tasks.max_classes 8 .*--tasks.train "),
        (7, "this fits: "),
        (6, "train on$"),
    ],
)
def test_it_says_how_many_classes_photographs_need(classes: int, flags: str | None) -> None:
    text = " ".join(README.split())
    assert "Fewer than 63 classes are too few" in text
    assert "with forty, `--tasks.unseen_counts '[1, 5]'`; with ten, also smaller tasks" in text
    assert "Below seven there are too few sets" in text
    preset = yaml.safe_load((ROOT / "configs/caltech101_efficientnet_head.yaml").read_text())
    tasks = config_from_dict(JobConfig, {"storage": "/", **preset}).tasks
    names = tuple(f"class {i}" for i in range(classes))
    mine = SimpleNamespace(name="mine", class_names=names, num_classes=classes, groups=None)
    with pytest.raises(ConfigError, match=flags) if flags else nullcontext():
        task_space(cast(Dataset, mine), tasks)


# spaces of sweeps, tune_*.yaml, are read by tests/test_tune.py
PRESETS = sorted(set((ROOT / "configs").glob("*.yaml")) - set((ROOT / "configs").glob("tune_*")))


@pytest.mark.parametrize("config", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid(config: Path) -> None:
    argv = ["--config", str(config), "--storage", "/runs", "--dry-run"]
    assert run_job(lambda run: None, argv, name="quickstart", about="") == 0


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def load_publish() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "docs" / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    return publish


def test_tables_are_written_from_reports() -> None:
    publish = load_publish()
    for file in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        assert publish.rewrite(file.read_text()) == file.read_text(), f"run {publish.__file__}"


def test_publish_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_publish().main(["--help"])
    assert stop.value.code == 0
    assert "--release" in capsys.readouterr().out


def published(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / name / "report.json").read_text())


def test_what_photographs_reach_is_what_their_reports_say() -> None:
    head, whole = (
        published(name)["axes"]["unseen_combination"]["methods"]["tina"]["accuracy"]
        for name in ("caltech101_efficientnet_head", "caltech101_cnn5k")
    )
    said = f"right in {100 * head:.1f} % on known classes of Caltech-101"
    assert f"{said} where whole networks are in {100 * whole:.1f} " in README


def test_plots_show_no_trend_in_noise_and_no_line_in_a_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = published("cifar100_cnn5k")
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    for point in report["accuracy_by_steps"]:
        point.setdefault("tasks", 16)  # which a report of that commit does not say
    plot_report({"by_num_classes": [], **report}, tmp_path)
    monkeypatch.undo()
    plt.close("all")
    panels, (gap,), (steps,) = (figure.axes for figure in figures)
    labels = [panel.get_yticklabels()[-1].get_text() for panel in panels]
    assert labels == [f"direct finetuning ({tasks} tasks)" for tasks in (20, 4, 4)]
    assert gap.get_ylim()[0] <= -0.05
    low, high = steps.get_ylim()
    assert high - low == pytest.approx(0.02)


@pytest.mark.parametrize("file", ["README.md", "docs/results.md"])
def test_pictures_and_links_exist(file: str) -> None:
    place = ROOT / file
    for target in re.findall(r"\]\(([^)]+)\)", place.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        there = place.parent / path if path else place
        assert there.exists(), target
        if heading:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in heads]


def rows_of(benchmark: str, *commits: str) -> list[dict[str, Any]]:
    file = ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl"
    rows = map(json.loads, file.read_text().splitlines())
    return [row for row in rows if row["commit"] in commits]


def row_of(benchmark: str, commit: str) -> dict[str, Any]:
    (row,) = rows_of(benchmark, commit)
    assert f"`{commit}`" in README
    assert row["hardware"].startswith("2 cores of ")
    return row


def test_figures_are_those_of_the_rows() -> None:
    row = row_of("generation", "9b9d99f20e7e")
    alone, many = row["pipeline"]["1"], row["pipeline"]["64"]["models_per_s"]
    paper, times = row["paper"]["1"], row["times_direct"]["1"]
    found = row["accuracy_on_select"]
    after = found["direct_after_steps"]["2560"]
    start = row_of("startup", "b5bdf9cda6f2")["median_s"]
    quick, slow = (row_of("serve_load", c)["clients_32"] for c in ("d5a8167ef456", "cd85de0c2d62"))
    for figure in (
        f"{alone['models_per_s']} models/s ({alone['p50_ms']} ms at the median); {many}",
        f"{row['direct_steps']:,} steps on both cores",
        f"{row['direct_s_per_model']['2']:.0f} s a model: {times:,.0f} times as long as one",
        f"{100 * after:.1f} %, the generator {100 * found['pipeline']:.1f} %, "
        f"selection {100 * found['selection']:.1f} %",
        f"{paper['s_per_model_text_once']:.0f} s a model with the text encoded once, "
        f"{paper['s_per_model']:,.0f} with",
        f"{quick['models_per_s']} models/s, p99 {quick['p99_ms']:.0f} ms; "
        f"{slow['models_per_s']}, {slow['p99_ms']:.0f} ms",
        f"{start['cold_to_first_model']:.1f} s; {start['tina_help']:.2f} s",
    ):
        assert f" {figure} " in README, figure


def test_what_it_concludes_is_what_the_tables_say() -> None:
    """Words between the tables that a new report or row could make untrue."""
    gained = []
    for data in ("", "mini_imagenet_"):
        report = published(f"cifar100_{data}cnn5k")
        groups = [report["axes"]["unseen_combination"], report["axes"]["unseen_class"]]
        for group in (*groups, *report["by_unseen_classes"]):
            gained.append(100 * group["tina_minus"]["untrained"]["diff"])
    heads = [name for name in pretrained() if name.endswith("-head")]
    for name in heads:
        run = name.removeprefix("tina-").replace("-", "_")
        head = published(run)["axes"]["unseen_combination"]
        assert head["tina_minus"]["classifier_selection"]["diff"] < 0.001  # gains nothing
    assert f"generation pays: {min(gained):.0f} to {max(gained):.0f} points over" in README
    known = published("cifar100_cnn5k")["axes"]["unseen_combination"]
    assert known["tina_minus"]["direct_finetuning"]["ci95"][1] > 0  # as good as fine-tuning

    rows = rows_of("calibration", "f3a3234ef60e", "3903c78d1893")
    errors = [published(row["run"])["axes"]["unseen_combination"] for row in rows]
    known = [axis["methods"]["tina"]["ece"] for axis in errors]
    assert f"the packaged ones on known classes by {min(known):.2f} to {max(known):.2f}" in README
    assert all(row["preset"]["new"]["0"]["overconfidence"] > 0 for row in rows)

    def of_new(*kinds, rows=rows):
        found = [row[kind]["new"] for row in rows for kind in kinds]
        errors = [each[n]["ece"] for each in found for n in each if n != "0"]
        return f"off by {min(errors):.2f} to {max(errors):.2f}"

    assert f"confidence is then {of_new('fitted', 'crossed')}. The packaged ones" in README
    by_hand = rows_of("calibration", "f3a3234ef60e")
    assert f"by hand and are {of_new('preset', rows=by_hand)}, the CIFAR-100 head" in README
    (head,) = [row for row in rows if row["run"] == "cifar100_resnet20_head"]
    assert head["preset"]["new"]["10"]["overconfidence"] < -5  # "to the other side"

    (row,) = rows_of("elsewhere", "1b890550554d")
    shown = {}
    for name, found in row["generators"].items():
        right = found["accuracy"]
        more = right["tina_five_examples"] - right["untrained_five_examples"]
        assert more < 1.5, name  # what is inherited learns as well
        shown[name] = f"{right['tina_five_examples'] - right['tina']:.0f}"
    of_resnets = {more for name, more in shown.items() if "resnet20" in name}
    best = max(heads, key=lambda name: row["generators"][name]["accuracy"]["tina"])
    assert f"ImageNet's features**, `{best}`, is the most accurate" in README
    by_name = row["generators"][best]["accuracy"]["tina"]
    more = f"by {' and '.join(sorted(of_resnets))} points on another data set, the EfficientNet's, "
    more += f"of whose names alone {by_name:.0f} % are right there, by {shown[best]}"
    assert f"the heads of a ResNet-20 {more}" in README
    (cnn,) = [row for row in rows_of("examples", "1b890550554d") if row["family"] == "cnn5k"]
    ones = [found["1_of_each"]["tina_examples"] for found in cnn["new_of_ten"].values()]
    assert all(abs(one["points"]) < 2 * one["points_se"] for one in ones)  # nothing

    (row,) = rows_of("direct", "62fc3315d0b9")
    behind = [
        f"{-row['groups'][group]['tina_minus_direct']['value']:.0f}"
        for group in ("1_new", "unseen_class", "5_new", "10_new")
    ]
    assert f"whole networks by {', '.join(behind[:3])} and {behind[3]} points with one" in README

    ways = [row["ways"] for row in rows_of("groups", "4b89789abbec", "3a1eff206d1f")]
    by_word = [-found["word"]["points"] for found in ways]
    assert f"right {min(by_word):.0f} to {max(by_word):.0f} points more often so" in README
    assert all(found["one"]["tina"] < found["word"]["tina"] for found in ways)  # "less often"

    found = rows_of("texts", "11ca20f9e964", "3a1eff206d1f")

    def lost(groups, kinds, digits):
        points = [-of[kind]["points"] for of in groups for kind in kinds if kind in of]
        return f"{min(points):.{digits}f} to {max(points):.{digits}f}"

    two, ten = ([row["new_of_ten"][new] for row in found] for new in ("2", "10"))
    names, described = ("placed", "apart"), ("described",)
    assert f"A word costs {lost(two, names, 1)} points where two of ten" in README
    assert f"asked for so, and {lost(ten, names, 0)} where all ten are" in README
    assert f"the name costs {lost(two, described, 1)} and {lost(ten, described, 0)}, and" in README
    known = lost([row["ten_known"] for row in found], described, 0)
    assert f"and {known} in the place of ten known names" in README


def test_published_reports_name_their_commit() -> None:
    for file in (ROOT / "docs" / "results").glob("*/report.json"):
        report = json.loads(file.read_text())
        assert re.fullmatch(r"[0-9a-f]{7,40}", report["commit"]), file


def test_published_reports_were_made_as_their_presets_say(tmp_path: Path) -> None:
    """Those that say how: their precision is the machine's, the rest is the preset's."""
    made = {file.parent.name: file for file in (ROOT / "docs" / "results").glob("*/config.yaml")}
    assert made
    for name, file in made.items():
        words = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--storage", str(tmp_path)]
        given = yaml.safe_load(file.read_text()) | {"storage": str(tmp_path)}
        # a key that is younger than a report is at its default there
        preset, found = map(
            config_to_dict, (parse_config(JobConfig, words), config_from_dict(JobConfig, given))
        )
        for part in ("data", "tasks", "classifier", "prompt", "denoiser", "diffusion", "train"):
            assert without_precision(found[part]) == without_precision(preset[part]), (name, part)


def without_precision(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_precision(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "precision"
    }
