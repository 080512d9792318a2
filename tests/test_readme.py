"""The README is true: its commands run, its tables are what the reports say."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from ray_jobs.job import run_job
from tina.checkpoint import PRETRAINED, load_generator
from tina.cli import main
from tina.config import JobConfig
from tina.configio import config_from_dict, config_to_dict, parse_config
from tina.report import plot_report

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


def test_it_counts_the_words_of_the_packaged_generator() -> None:
    vocabulary = load_generator(PRETRAINED / "tina-cifar100-cnn5k").vocabulary
    trained = len(vocabulary.trained_names)
    further = len(vocabulary.names) - trained
    text = " ".join(README.split())
    assert f"trained on {trained} classes of CIFAR-100 and knows {further:,} further" in text
    words = load_generator(PRETRAINED / "tina-cifar100-mini-imagenet-cnn5k").vocabulary
    both = len(words.trained_names)
    more = len(words.names) - both
    (said,) = re.findall(
        r"on (\d+) classes of CIFAR-100 and mini-ImageNet in one \(\"(.*?)\"\)", text
    )
    assert int(said[0]) == both
    assert f" and know {more:,} more words" in text
    heads = load_generator(PRETRAINED / "tina-cifar100-mini-imagenet-resnet20-head").vocabulary
    assert heads.names == words.names
    assert set(said[1].split(", ")) <= set(words.trained_names)
    for word in re.findall(r"further words \((.*?);", README)[0].split(", "):
        assert vocabulary.lookup(word.strip('"')) is not None, word
    fox, pizza = vocabulary.familiarity(
        torch.stack([vocabulary.lookup(word) for word in ("red fox", "pizza")])  # type: ignore[misc]
    ).tolist()
    assert f"{fox:.2f} for the fox, {pizza:.2f} for the pizza" in text


def test_job_lines_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in lines("python -m ray_jobs.quickstart"):
        argv = [word.replace("$PWD", str(ROOT)) for word in words[3:]]
        assert "--dry-run" in argv
        assert run_job(lambda run: None, argv, name="quickstart", about="") == 0
    assert "width: 128" in capsys.readouterr().out


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


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def row_of(benchmark: str, commit: str, **facts: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl"
    wanted = {"commit": commit, **facts}
    rows = map(json.loads, file.read_text().splitlines())
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
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


def test_what_prompts_cost_is_what_the_row_says() -> None:
    row = row_of("prompts", "3391b112160f")
    points = {
        kind: row["kinds"][kind][share]["tina_points"]["accuracy_points"]
        for kind, share in (("pictures", "100%"), ("picture", "100%"), ("synonym", "50%"))
    }
    names, (five, one, synonym) = row["true_names"], points.values()
    for words in (
        f"{names:.0f} % by their names, {names + five:.0f} by five pictures",
        f"{names + one:.0f} by one, and {names + synonym:.0f} with another everyday word",
    ):
        assert words in README, words


def test_what_it_does_elsewhere_is_what_the_row_says() -> None:
    row = row_of("elsewhere", "e7898b7431b9")
    names = re.findall(r"^\| `(tina-[\w-]+)` \|", README, flags=re.MULTILINE)
    generators = [row["generators"][name] for name in names]  # in the order of the table
    assert len(generators) == len(row["generators"])
    trained = [generator["familiarity"]["trained_names"] for generator in generators]
    assert trained == [10, 10, 17, 17]
    rows = ("tina", "untrained", "tina_five_examples", "untrained_five_examples")
    tina, bar, shown, learnt = (
        [f"{generator['accuracy'][row]:.0f}" for generator in generators] for row in rows
    )
    four = "{}, {}, {} and {}"
    for words in (
        f"ten at a time of {len(row['classes'])} classes, the packaged",
        f"right in {four.format(*tina)} % of the cases (what is inherited: {four.format(*bar)};",
        f"as `examples` it is {four.format(*shown)} %",
        f"comes to {four.format(*learnt)}, so that",
        f"nothing was chosen, it is {shown[0]} instead of {tina[0]} (below)",
    ):
        assert words in README, words


def test_what_examples_bring_is_what_the_row_says() -> None:
    found = row_of("examples", "4d53ab88d5c6")["new_of_ten"]
    rows = ("tina_examples", "tina_images", "centroids")
    five = {row: found["10"]["5_of_each"][row]["accuracy"] for row in rows}
    words = (
        f"told apart in {five['tina_examples']:.0f} % of the cases, where names alone give "
        f"{found['10']['tina']['accuracy']:.0f}, pictures in their place "
        f"{five['tina_images']:.0f} and the nearest mean of the pictures {five['centroids']:.0f} ("
    )
    assert words in README, words
    took = found["10"]["5_of_each"]["ms_to_learn"]
    assert f"in {round(took, -1):.0f} ms for ten classes and five pictures of each" in README
    assert 0.25 < found["1"]["5_of_each"]["tina_examples"]["points"] < 0.75  # half a point
    later = row_of("examples", "ddf8f20e8938")["new_of_ten"]
    five = later["5"]["5_of_each"]
    few, all_ = (five[row]["points"] for row in ("tina_examples_of_new", "tina_examples"))
    assert f"they bring {few:.1f} points, pictures of all {all_:.1f}, and with two new n" in README
    two = later["2"]["5_of_each"]["tina_examples_of_new"]
    assert abs(two["points"]) < 2 * two["points_se"]
    told = []
    for data in ("cifar100", "cifar100+mini_imagenet"):
        heads = row_of("examples", "e7898b7431b9", dataset=data)["new_of_ten"]
        ten, two = heads["10"], heads["2"]["5_of_each"]
        one, five = (ten[f"{shots}_of_each"]["tina_examples"] for shots in (1, 5))
        nearest = ten["5_of_each"]["centroids"]
        assert abs(nearest["points"] - five["points"]) < nearest["points_se"]  # as good
        worse = two["tina_examples"]["accuracy"] - two["centroids"]["accuracy"]
        told.append(
            [*(f"{row['accuracy']:.0f}" for row in (ten["tina"], one, five)), f"{worse:.0f}"]
        )
    (names, one, five, worse), both = told
    for words in (
        f"apart in {names} % of the cases by names (both data sets: {both[0]}), with one picture",
        f"of each beside them in {one} ({both[1]}), with five in {five} ({both[2]}), where the",
        f"with two of ten new that is {worse} ({both[3]}) points worse",
    ):
        assert words in README, words
    ones = [found[new]["1_of_each"]["tina_examples"] for new in found]
    assert all(abs(one["points"]) < 2 * one["points_se"] for one in ones)  # nothing


def calibration(name: str, axis: str = "unseen_combination") -> list[str]:
    report = published(name)
    methods = report["axes"][axis]["methods"]
    rows = ("tina", "classifier_selection", "direct_finetuning")
    return [f"{methods[row]['ece']:.2f}" for row in rows]


def test_calibration_errors_are_those_of_the_reports() -> None:
    named = {
        "cifar100_cnn5k": "{} with CNN-5K on CIFAR-100 (selection {}, direct fine-tuning {})",
        "cifar100_cnn15k": "{} with CNN-15K ({}, {})",
        "cifar100_cnn33k": " with CNN-33K ({1}, {2})",
        "cifar100_resnet20_head": " for the head of a ResNet-20 ({1}, {2})",
        "cifar100_mini_imagenet_resnet20_head": "{} for that of both data sets ({}, {})",
        "mini_imagenet_cnn5k": "{} on mini-ImageNet ({}, {})",
    }
    for name, words in named.items():
        assert words.format(*calibration(name)) in README, name
    for name in ("cifar100_cnn33k", "cifar100_resnet20_head"):
        assert calibration(name)[0] == calibration("cifar100_cnn15k")[0]
    both = "cifar100_mini_imagenet_"
    doubting = ("cifar100_cnn5k", "cifar100_resnet20_head", f"{both}cnn5k", f"{both}resnet20_head")
    others = named.keys() - set(doubting)
    new = sorted(calibration(name, "unseen_class")[0] for name in others)
    assert f"With two new classes of ten it is {new[0]} to {new[-1]};" in README
    known, other = calibration("caltech101_cnn5k"), calibration("caltech101_cnn5k", "unseen_class")
    assert f"is taught each as often, {known[0]} and {other[0]}." in README
    all_new = {
        name: f"{published(name)['by_unseen_classes'][-1]['methods']['tina']['ece']:.2f}"
        for name in (*others, *doubting, "caltech101_cnn5k")
    }
    there, *mended = (all_new.pop(name) for name in ("caltech101_cnn5k", *doubting))
    low, high = min(all_new.values()), max(all_new.values())
    assert f"With all ten new it is {low} to {high}, there {there}:" in README
    two = [calibration(name, "unseen_class")[0] for name in doubting]
    words = "it is {}, {}, {} and {} with two new, {}, {}, {} and {} with ten"
    assert words.format(*two, *mended) in README


def known_two_and_ten_new(name: str) -> tuple[list[str], ...]:
    """Accuracies of Tina, of what is inherited and of selection."""
    report = published(name)
    groups = [report["axes"]["unseen_combination"], report["axes"]["unseen_class"]]
    groups.append(report["by_unseen_classes"][-1])
    assert groups[-1]["unseen"] == 10
    return tuple(
        [f"{100 * group['methods'][method]['accuracy']:.1f}" for group in groups]
        for method in ("tina", "untrained", "classifier_selection")
    )


def test_its_first_screen_says_what_the_reports_say() -> None:
    tina, untrained, selection = known_two_and_ten_new("cifar100_cnn5k")
    head, inherited, _ = known_two_and_ten_new("cifar100_resnet20_head")
    first = " ".join(README.split("```")[0].split())
    for words in (
        f"right in {tina[0]} % of the cases",
        f"one generic model are in {selection[0]} %",
        f"With two of the ten classes new to it {tina[1]} %, with all ten {tina[2]} %",
        f"gives {untrained[1]} and {untrained[2]} %",
        f"it is {head[0]}, {head[1]} and {head[2]} %",
        f"inheriting gives {inherited[1]} and {inherited[2]} %",
    ):
        assert words in first, words
    names = [f"cifar100_{data}{f}" for data in ("", "mini_imagenet_") for f in FAMILIES]
    two = (published(name)["axes"]["unseen_class"]["methods"] for name in names)
    more = [f"{100 * (of['tina']['accuracy'] - of['untrained']['accuracy']):.1f}" for of in two]
    words = "{} points where all weights are generated and {} where a head is (both data sets: {} "
    assert words.format(*more[:3]) + f"and {more[3]})" in README


def test_what_it_says_of_both_data_sets_is_what_the_reports_say() -> None:
    (cnn, _, _), (head, _, _) = (
        known_two_and_ten_new(f"cifar100_mini_imagenet_{family}") for family in FAMILIES
    )
    for words in (
        f"the third is right in {cnn[0]} % of the cases and the fourth in {head[0]},",
        f"with two new ones in {cnn[1]} and {head[1]} (",
    ):
        assert words in README, words


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
