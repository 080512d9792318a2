"""The report: its schema, its controls, and who may read which images; the baselines."""

import contextlib
import copy
import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

import tina.evaluation
import tina.novelty
from ray_jobs import build_zoo
from tests.conftest import kept_out
from tina.baselines import (
    _least_squares,
    class_mean,
    classifier_selection,
    nearest_pmodel,
    ridge,
)
from tina.batches import BatchSource
from tina.checkpoint import save_generator
from tina.comparison import by_steps, compare
from tina.config import ClassifierConfig, DenoiserConfig, RecipeConfig
from tina.controls import other_classes, shuffled_classes
from tina.engine import LocalEngine
from tina.errors import ConfigError, DataError
from tina.evaluation import Evaluation
from tina.finetune import Lesson, accuracy
from tina.generator import Generator
from tina.generic import save_generic, train_generic
from tina.inputs import InputStore
from tina.metrics import Score, overlap
from tina.mixer import Mixer, train_mixer
from tina.novelty import novelty, timing, twin
from tina.plots import plot_report
from tina.report import FEWEST, ORDER, _points, markdown, print_report
from tina.run import Run
from tina.tasks import Task
from tina.training import Progress, train
from tina.zoo import Zoo, build_rows, zoo_of, zoo_schema

AXIS = "unseen_combination"
SHOWN = [name for name in ORDER if name != "clip_zero_shot"]  # there is no CLIP in these tests
WITHOUT_IMAGES = {
    "tina",
    "one_step_regressor",
    "untrained",
    "generic",
    "classifier_selection",
    "nearest_pmodel",
    "class_mean",
    "ridge",
    "taper",
    "tina_swapped_condition",
    "tina_shuffled_prompt",
}


class Watched(Generator):
    """A generator that remembers what it was asked."""

    def generate(self, embeddings, mask, **options):
        self.asked.append({"embeddings": embeddings, "mask": mask, **options})
        return super().generate(embeddings, mask, **options)


class Recording(InputStore):
    """A store that remembers which images were read."""

    def __init__(self, family, images):
        super().__init__(family, images)
        self.read = set()

    def __getitem__(self, index):
        self.read |= set(index.flatten().tolist())
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def evaluation(tiny_run, tiny_generator, tiny_regressor):
    watched = Watched(**{f.name: getattr(tiny_generator, f.name) for f in fields(tiny_generator)})
    object.__setattr__(watched, "asked", [])
    return Evaluation(
        generator=watched,
        config=tiny_run.config.evaluation,
        dataset=tiny_run.dataset,
        space=tiny_run.space,
        zoo=tiny_run.read_zoo("zoo"),
        direct=tiny_run.read_zoo("direct"),
        store=tiny_run.store,
        regressor=tiny_regressor,
    )


def full_report(evaluation):
    """What `Run.evaluate` writes, without a folder to write into."""
    return evaluation.report(
        dict(evaluation.score_here()),
        checkpoint="c" * 64,
        commit="unknown",
        hardware="a machine",
        novelty=novelty(evaluation),
        timing=timing(evaluation),
    )


def noisy(generator):
    """The same generator with larger outputs: prompts and seeds show."""
    denoiser = copy.deepcopy(generator.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in denoiser.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return replace(generator, denoiser=denoiser)


@contextlib.contextmanager
def watching():
    """Which images are read: by split of the task scored, to predict at all, to train."""
    seen = {"held_out": set(), "val": set(), "predicted": set(), "trained_on": set()}
    images, predict = Evaluation.images, tina.evaluation.predict
    finetune = tina.novelty.finetune

    def watched_images(self, task):
        lesson = images(self, task)
        seen[task.split].update(lesson.index.tolist())
        return lesson

    def watched_predict(family, theta, store, index, **options):
        seen["predicted"].update(index.tolist())
        return predict(family, theta, store, index, **options)

    def watched_finetune(family, thetas, lessons, *args, **options):
        seen["trained_on"].update(*(lesson.index.tolist() for lesson in lessons))
        return finetune(family, thetas, lessons, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "images", watched_images)
        patch.setattr(tina.evaluation, "predict", watched_predict)
        patch.setattr(tina.novelty, "finetune", watched_finetune)
        yield seen


@pytest.fixture(scope="module")
def watched(evaluation):
    """The report; which images each kind of reading saw; what the generator was asked."""
    with watching() as seen:
        report = full_report(evaluation)
    return report, seen, list(evaluation.generator.asked)


@pytest.fixture(scope="module")
def report(watched):
    return watched[0]


@pytest.fixture(scope="module")
def axis(report):
    return report["axes"][AXIS]


# --- schema ---------------------------------------------------------------------------------------


def test_report_has_the_keys_of_the_contract(report):
    head = {"dataset", "family", "checkpoint", "commit", "hardware", "seeds", "generator"}
    assert head | {"axes", "novelty", "timing"} <= report.keys()
    assert report["dataset"] == "digits"
    assert report["family"] == "cnn5k"
    assert report["commit"] == "unknown"
    assert report["seeds"] == [0, 1]
    assert {"parameters", "steps", "schedule"} == report["generator"].keys()
    assert report["generator"]["parameters"] > 100_000
    assert report["generator"]["steps"] == 4
    timing = {"ms_per_model_batch1", "ms_per_model_batch64", "finetune_s_per_model"}
    assert report["timing"].keys() == timing
    assert all(value > 0 for value in report["timing"].values())


def test_axes_are_measured_or_say_why_not(report):
    assert report["axes"].keys() == {AXIS, "shifted_combination", "unseen_class"}
    for name in ("shifted_combination", "unseen_class"):
        assert report["axes"][name].keys() == {"missing"}
        assert len(report["axes"][name]["missing"]) > 10


def test_axis_has_all_rows(axis):
    keys = {"tasks", "images_per_class", "methods", "tina_minus", "gap_closed", "gap_closed_ci95"}
    assert keys <= axis.keys()
    assert axis["tasks"] == 4
    assert axis["images_per_class"] == 5
    assert axis["methods"].keys() == WITHOUT_IMAGES | {"direct_finetuning"}
    assert axis["tina_minus"].keys() == axis["methods"].keys() - {"tina"}
    for name, row in axis["methods"].items():
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] + 1e-9, name
        assert row["accuracy"] <= high + 1e-9 <= 1 + 1e-8, name
        assert 0 <= row["p05"] <= row["accuracy"] + 1e-9, name
        assert 0 <= row["ece"] <= 1, name
    for name, row in axis["tina_minus"].items():
        if name != "direct_finetuning":  # which is measured on fewer tasks
            difference = axis["methods"]["tina"]["accuracy"] - axis["methods"][name]["accuracy"]
            assert row["diff"] == pytest.approx(difference)
        assert row["ci95"][0] <= row["diff"] + 1e-9
        assert row["diff"] <= row["ci95"][1] + 1e-9


def test_chance_is_the_mean_over_tasks(axis, tiny_run):
    tasks = tiny_run.space.held_out[AXIS]
    assert axis["chance"] == pytest.approx(sum(1 / t.num_classes for t in tasks) / len(tasks))


def test_report_is_json_without_nan(report):
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report


def test_direct_finetuning_counts_its_own_tasks(axis):
    assert axis["methods"]["direct_finetuning"]["tasks"] == 2


def test_gap_closed_is_a_ratio_on_the_same_tasks(evaluation, axis, tiny_run):
    tasks = [t for t in tiny_run.space.held_out[AXIS] if t.task_id in evaluation.direct.task_ids]
    assert len(tasks) == 2
    layout = evaluation.generator.family.layout
    direct = dict(zip(evaluation.direct.task_ids, evaluation.direct.theta, strict=True))
    selection = classifier_selection(evaluation.generator)

    def mean(thetas):
        return sum(s.accuracy for s in evaluation.score(tasks, thetas)) / len(tasks)

    tina = mean(evaluation.generate(tasks))
    base = mean([[evaluation.generator.theta(*selection(task))] for task in tasks])
    thetas = []
    for task in tasks:
        body, rows = layout(4).split(direct[task.task_id])
        thetas.append([layout(task.num_classes).join(body, rows[: task.num_classes])])
    top = mean(thetas)
    assert axis["methods"]["direct_finetuning"]["accuracy"] == pytest.approx(top)
    assert axis["gap"]["diff"] == pytest.approx(top - base)
    assert axis["gap_closed"] == (
        pytest.approx((tina - base) / (top - base)) if top != base else None
    )


def test_a_comparison_by_hand():
    """Tina lies half way between selection and direct fine-tuning, which ran on some tasks."""

    def of(hits):
        return [Score(hit=np.arange(100)[None] < n, confidence=np.ones((1, 100))) for n in hits]

    levels, subset = np.arange(20), [3, 8, 9, 15]
    scores = {"tina": of(40 + levels), "classifier_selection": of(20 + levels)}
    scores["untrained"] = of(35 + levels)
    scores["direct_finetuning"] = of(60 + levels[subset])
    images = list(np.arange(2000).reshape(20, 100))
    found = compare(scores, images, subset, bootstrap=500)
    assert found["gap"]["diff"] == pytest.approx(0.4)
    assert found["gap_closed"] == pytest.approx(0.5)
    low, high = found["gap_closed_ci95"]
    assert 0.3 < low < 0.5 < high < 0.7
    above = found["above_inherited"]  # 5 of the 25 that are left
    assert above["gap"]["diff"] == pytest.approx(0.25)
    assert above["gap_closed"] == pytest.approx(0.2)
    low, high = above["gap_closed_ci95"]
    assert 0 < low < 0.2 < high < 0.4
    for other, sign, below in (("classifier_selection", 1, 0), ("direct_finetuning", -1, 1)):
        minus = found["tina_minus"][other]
        assert minus["diff"] == pytest.approx(0.2 * sign)
        low, high = minus["ci95"]
        assert 0.1 < sign * low < 0.3
        assert 0.1 < sign * high < 0.3
        assert minus["tasks_below"] == below
    tina = found["methods"]["tina"]
    assert (tina["accuracy"], tina["p05"]) == pytest.approx((0.495, 0.4095))
    # a gap that may be nothing has no interval of a ratio
    scores["direct_finetuning"] = of(20 + levels[subset] + [-9, 9, 5, -3])
    assert compare(scores, images, subset, bootstrap=500)["gap_closed_ci95"] is None


def test_a_run_asked_for_less_direct_finetuning_reads_less(tiny_run):
    fewer = replace(tiny_run.config.evaluation, direct_tasks=1, direct_tasks_elsewhere=0)
    run = Run(replace(tiny_run.config, evaluation=fewer))
    (first,) = {t.task_id for t in run.zoo_tasks("direct")} & {
        t.task_id for tasks in run.space.held_out.values() for t in tasks
    }
    kept = run.evaluation(None).direct.task_ids
    assert first in kept
    assert len(kept) < len(tiny_run.evaluation(None).direct.task_ids)


def test_an_axis_without_direct_finetuning_has_no_gap(evaluation):
    none = evaluation.direct.only("nobody")
    config = replace(evaluation.config, sampling_steps=(1,), bootstrap=10)
    report = full_report(replace(evaluation, direct=none, config=config))
    axis = report["axes"][AXIS]
    assert axis["methods"].keys() == WITHOUT_IMAGES
    assert axis["gap_closed"] is None
    assert axis["gap_closed_ci95"] is None
    assert "not measured" in markdown(report)
    assert report["novelty"]["l2_between_two_finetunings"] is None
    json.dumps(report, allow_nan=False)


def test_accuracy_by_steps(report):
    assert [point["steps"] for point in report["accuracy_by_steps"]] == [1, 4]
    few, most = report["accuracy_by_steps"]
    assert few["tasks"] == most["tasks"] == 2
    assert most["minus_most"] == {"diff": 0, "ci95": [0, 0], "tasks_below": 0}
    low, high = few["minus_most"]["ci95"]
    assert low <= few["minus_most"]["diff"] == few["accuracy"] - most["accuracy"] <= high


def test_accuracy_by_steps_is_that_of_so_many_steps(evaluation, tiny_run, tiny_generator):
    other = replace(evaluation, generator=noisy(tiny_generator))
    found = other.report(dict(other.score_here()))["accuracy_by_steps"]
    tasks = tiny_run.space.val
    for point in found:
        scores = other.score(tasks, other.generate(tasks, steps=point["steps"], seeds=1))
        assert point["accuracy"] == pytest.approx(np.mean([s.accuracy for s in scores]))
    assert found[0]["accuracy"] != found[1]["accuracy"]


def test_steps_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    hits = rng.random((40, 1, 100)) < rng.random((40, 1, 1))  # of tasks that are unlike each other
    lost = hits & (np.arange(100) >= 10)  # the first ten images of each
    scores = {
        steps: [Score(hit=hit, confidence=np.ones(hit.shape)) for hit in found]
        for steps, found in ((2, lost), (1000, hits))
    }
    images = list(np.arange(4000).reshape(40, 100))
    few, most = by_steps(scores, images, bootstrap=200)
    assert (few["accuracy"], most["accuracy"]) == pytest.approx((lost.mean(), hits.mean()))
    assert few["minus_most"]["diff"] == pytest.approx(lost.mean() - hits.mean())
    low, high = few["minus_most"]["ci95"]
    assert low < few["minus_most"]["diff"] < high < 0
    assert high - low < 0.05  # tasks alone spread by 0.3
    assert by_steps({}, images, bootstrap=200) == []


def test_accuracy_by_the_number_of_unseen_classes(evaluation, axis, tiny_run):
    tasks = tiny_run.space.held_out[AXIS]
    wider = replace(evaluation, space=replace(tiny_run.space, unseen={2: tasks[:3], 1: tasks}))
    found = wider.report(dict(wider.score_here()))["by_unseen_classes"]
    assert [(row["unseen"], row["tasks"]) for row in found] == [(2, 3), (1, 4)]
    for row in found:
        assert row["methods"].keys() == {"tina", "untrained", "classifier_selection"}
        assert row["gap_closed"] is None
    for name, method in found[1]["methods"].items():
        assert method["accuracy"] == axis["methods"][name]["accuracy"]
    text = markdown(full_report(evaluation) | {"by_unseen_classes": found})
    accuracy = 100 * found[0]["methods"]["tina"]["accuracy"]
    assert f"| 2 | 3 | {accuracy:.1f} |" in text


def test_accuracy_by_the_number_of_classes(report, axis, tiny_run):
    found = report["by_num_classes"]
    sizes = [task.num_classes for task in tiny_run.space.held_out[AXIS]]
    assert [(row["classes"], row["tasks"]) for row in found] == [
        ([k, k], sizes.count(k)) for k in sorted(set(sizes))
    ]
    for method in ("tina", "classifier_selection", "direct_finetuning"):
        rows = [
            row["methods"][method] | {"of": row["tasks"]}
            for row in found
            if method in row["methods"]
        ]
        total = sum(row["accuracy"] * row.get("tasks", row["of"]) for row in rows)
        whole = axis["methods"][method]
        assert total == pytest.approx(whole["accuracy"] * whole.get("tasks", axis["tasks"])), method
    accuracy = 100 * found[0]["methods"]["tina"]["accuracy"]
    assert f"| {found[0]['classes'][0]} | {found[0]['tasks']} | {accuracy:.1f} |" in markdown(
        report
    )


def test_many_numbers_of_classes_are_grouped(evaluation, tiny_run, monkeypatch):
    monkeypatch.setattr(tina.evaluation, "CLASS_GROUPS", 2)
    found = evaluation.report(dict(evaluation.score_here()))["by_num_classes"]
    low, high = tiny_run.config.tasks.min_classes, tiny_run.config.tasks.max_classes
    assert [row["classes"] for row in found] == [[2, 3], [4, 4]]
    assert (low, high) == (2, 4)
    assert sum(row["tasks"] for row in found) == 4


def test_tasks_of_one_size_have_no_groups(evaluation, tiny_run):
    config = replace(tiny_run.space.config, min_classes=4, max_classes=4)
    same = replace(evaluation, space=replace(tiny_run.space, config=config))
    report = same.report(dict(same.score_here()))
    assert report["by_num_classes"] == []


def test_the_regressors_row_is_what_it_generates(evaluation, axis, tiny_run, tiny_regressor):
    tasks = tiny_run.space.held_out[AXIS]
    thetas = []
    for task in tasks:
        body, rows = tiny_regressor.generate(
            *tiny_regressor.vocabulary.of([task.class_ids]), seeds=[7]
        )
        thetas.append([tiny_regressor.theta(body[0], rows[0])])
    scores = evaluation.score(tasks, thetas)
    accuracy = sum(score.accuracy for score in scores) / len(scores)
    assert axis["methods"]["one_step_regressor"]["accuracy"] == pytest.approx(accuracy)
    others = evaluation.score(tasks, evaluation.generate(tasks, seeds=1))
    assert any((a.confidence != b.confidence).any() for a, b in zip(scores, others, strict=True))


def test_a_run_names_its_regressor(tiny_run, tiny_regressor, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(tiny_run.folder, folder / "tiny", ignore=lambda *_: ["config.yaml"])
    other = replace(
        tiny_run.config,
        name="other",
        storage=str(folder),
        diffusion=tiny_regressor.config.diffusion,
    )
    asked = replace(tiny_run.config.evaluation, regressor="other")
    run = Run(replace(tiny_run.config, storage=str(folder), evaluation=asked))
    with pytest.raises(ConfigError, match="holds no run"):
        run.regressor()
    Run(other).claim()
    with pytest.raises(ConfigError, match="regressor other is no trained run of schedule none"):
        run.regressor()
    elsewhere = replace(tiny_regressor.generic, rows=tiny_regressor.generic.rows + 1e-6)
    save_generator(replace(tiny_regressor, generic=elsewhere), Run(other).trained, card="x")
    with pytest.raises(ConfigError, match="regressor other began with another generic model"):
        run.regressor()
    shutil.rmtree(Run(other).trained)
    save_generator(tiny_regressor, Run(other).trained, card="x")
    found = run.evaluation(tiny_regressor).regressor
    assert found.config.diffusion.schedule == "none"
    doubting = replace(run.config.prompt, doubt=3.0)  # which training does not read
    Run(replace(other, prompt=doubting)).claim()
    assert Run(replace(run.config, prompt=doubting)).regressor().config.prompt == doubting
    Run(other).claim()
    Run(replace(other, name="noisy", diffusion=tiny_run.config.diffusion)).claim()
    Run(replace(other, name="wide", denoiser=DenoiserConfig(width=64))).claim()
    for name, words in (("noisy", "schedule none"), ("wide", "another denoiser than")):
        config = replace(run.config, evaluation=replace(asked, regressor=name))
        with pytest.raises(ConfigError, match=words):
            Run(config).regressor()
    assert tiny_run.regressor() is None


def test_tasks_below_are_counted_one_by_one(evaluation, axis, tiny_run):
    tasks = tiny_run.space.held_out[AXIS]
    mine = evaluation.score(tasks, evaluation.generate(tasks))
    others = evaluation.score(tasks, evaluation.contenders["ridge"](tasks))
    below = sum(a.accuracy < b.accuracy for a, b in zip(mine, others, strict=True))
    assert axis["tina_minus"]["ridge"]["tasks_below"] == below / 4


def test_novelty_stands_beside_twins(report):
    novelty = report["novelty"]
    assert novelty["l2_to_nearest_pmodel"] > 0
    assert novelty["l2_between_two_finetunings"] > 0
    for key in ("error_overlap_with_nearest_pmodel", "error_overlap_between_two_finetunings"):
        assert 0 <= novelty[key] <= 1


def test_novelty_by_hand(evaluation, report, tiny_run):
    tasks, layout = tiny_run.space.held_out[AXIS][:2], evaluation.generator.family.layout
    train = evaluation.zoo.only("train")
    nearest = nearest_pmodel(evaluation.generator, train)
    distances, overlaps = [], []
    for own in tasks:
        mine = evaluation.generate([own], seeds=2)
        other = [[evaluation.generator.theta(*nearest(own))]]
        body = layout(own.num_classes).split(mine[0][0])[0]
        distances.append(min(float((z - body).norm()) for z in layout(4).split(train.theta)[0]))
        overlaps.append(overlap(*evaluation.score([own], mine), *evaluation.score([own], other)))
    found = report["novelty"]
    assert found["l2_to_nearest_pmodel"] == pytest.approx(sum(distances) / 2, rel=1e-4)
    assert found["error_overlap_with_nearest_pmodel"] == pytest.approx(sum(overlaps) / 2)
    assert 0 < sum(overlaps) < 2  # there was something to compare


@pytest.fixture
def head_run(tiny_run, tmp_path):
    """Of the head of a ResNet-20, with its generic model."""
    short = RecipeConfig(steps=3, batch_size=8)
    recipes = dict.fromkeys(("generic", "finetune", "direct"), short)
    classifier = ClassifierConfig(family="resnet20_head", **recipes)
    run = Run(replace(tiny_run.config, storage=str(tmp_path), classifier=classifier))
    run.claim()
    generic = train_generic(run.family, run.all_views, run.space.seen, short, seed=0)
    save_generic(run.generic_file, generic, run.family, run.dataset)
    return run


def test_a_trunks_features_are_computed_once_for_a_run(head_run, monkeypatch):
    places = torch.arange(len(head_run.dataset.views))
    expected = InputStore(head_run.family, head_run.dataset.views)[places]
    torch.testing.assert_close(head_run.store[places], expected, rtol=0, atol=0)
    (file,) = head_run.folder.glob("features-*")
    other = Run.open(head_run.folder)
    monkeypatch.setattr(type(other.family), "embed", None)
    torch.testing.assert_close(other.store[places], expected, rtol=0, atol=0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="holds no features: remove it"):
        assert Run.open(head_run.folder).store


def test_a_generic_model_may_be_trained_on_the_features_that_the_run_keeps(head_run):
    short, seen = head_run.recipe("zoo"), head_run.space.seen
    again = Run.open(head_run.folder)
    found = train_generic(
        again.family, again.all_views, seen, short, seed=0, inputs=lambda: again.shown("cpu")
    )
    torch.testing.assert_close(found.rows, head_run.generic.rows)
    (file,) = head_run.folder.glob("features-*")  # the trunk is the same, and so is its file
    before = file.stat().st_mtime_ns
    assert head_run.store
    assert file.stat().st_mtime_ns == before


def test_workers_of_a_zoo_find_a_trunks_features(head_run, monkeypatch):
    """On CPUs; each would make them for itself."""
    monkeypatch.setattr(build_zoo, "on_gpu", lambda: False)
    monkeypatch.setattr(build_zoo, "capacity", lambda each: 2)
    monkeypatch.setattr(build_zoo, "stream", lambda *args, **kwargs: head_run.folder.iterdir())
    tasks = head_run.zoo_tasks("zoo")
    names = {file.name.split("-")[0] for file in build_zoo.finetuned(head_run, "zoo", tasks)}
    assert "features" in names


def test_another_trunk_has_features_of_its_own(head_run):
    before = head_run.store[torch.arange(5)]
    again = Run.open(head_run.folder)
    short = head_run.recipe("zoo")
    generic = train_generic(again.family, again.all_views, again.space.seen, short, seed=1)
    save_generic(again.generic_file, generic, again.family, again.dataset)
    assert not torch.equal(Run.open(head_run.folder).store[torch.arange(5)], before)


def test_where_a_head_alone_is_generated_there_is_no_distance(head_run):
    run, short = head_run, head_run.recipe("zoo")
    schema = zoo_schema(run.family.layout(4).size)
    tools = {"family": run.family, "dataset": run.dataset, "store": run.store, "recipe": short}
    tools |= {"generic": run.generic, "max_classes": 4, "stacked": False}
    zoo, direct = (
        zoo_of(pa.Table.from_pylist(build_rows(run.zoo_tasks(kind), **tools), schema=schema))
        for kind in ("zoo", "direct")
    )
    found = novelty(
        Evaluation(
            generator=run.new_generator(),
            config=run.config.evaluation,
            dataset=run.dataset,
            space=run.space,
            zoo=zoo,
            direct=direct,
            store=run.store,
        )
    )
    assert found["l2_to_nearest_pmodel"] is None
    assert found["l2_between_two_finetunings"] is None
    assert 0 <= found["error_overlap_with_nearest_pmodel"] <= 1


def test_a_twin_is_the_same_task_with_other_batches(tiny_run):
    task = tiny_run.space.held_out[AXIS][0]
    other = twin(task)
    assert other.class_ids == task.class_ids
    assert other.task_id != task.task_id


@pytest.mark.parametrize(("all_steps", "seconds"), [(20, 1), (500, 10), (4000, 20)])
def test_times_are_per_model_and_of_all_steps(
    evaluation, tiny_generator, monkeypatch, all_steps, seconds
):
    """With a clock that shows one second more each time: 20, 50 and 200 steps were timed."""
    clock, tuned = itertools.count(), []
    config = tiny_generator.config
    recipe = replace(config.classifier.direct, steps=all_steps)
    config = replace(config, classifier=replace(config.classifier, direct=recipe))
    evaluation = replace(evaluation, generator=replace(tiny_generator, config=config))
    monkeypatch.setattr(tina.novelty, "finetune", lambda *args, **_: tuned.append(args[4].steps))
    monkeypatch.setattr(tina.novelty, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert timing(evaluation) == {
        "ms_per_model_batch1": 1000,
        "ms_per_model_batch64": 1000 / 64,
        "finetune_s_per_model": seconds,
    }
    assert tuned == [3, all_steps // seconds]


# --- cells ----------------------------------------------------------------------------------------


def sliced(evaluation, monkeypatch, size):
    """The same evaluation in cells of another size."""
    monkeypatch.setattr(tina.evaluation, "CELL_TASKS", size)
    found = replace(evaluation)
    assert max(len(cell.tasks) for cell in found.cells) == size
    return found


def rows_of(evaluation):
    """Scores by axis and method."""
    rows = {}
    for cell, scores in evaluation.score_here():
        assert len(scores) == len(cell.tasks)
        rows.setdefault((cell.axis, cell.method), []).extend(scores)
    return rows


def test_cells_cover_each_task_of_each_method_once(evaluation, tiny_run, monkeypatch):
    cells = sliced(evaluation, monkeypatch, 3).cells
    found = Counter((c.axis, c.method, task.task_id) for c in cells for task in c.tasks)
    assert set(found.values()) == {1}
    tasks = tiny_run.space.held_out[AXIS]
    want = {(AXIS, method, task.task_id) for method in WITHOUT_IMAGES for task in tasks}
    want |= {(AXIS, "direct_finetuning", task.task_id) for task in tasks[:2]}
    for steps in (1, 4):
        want |= {("validation", f"{steps}_steps", task.task_id) for task in tiny_run.space.val}
    assert found.keys() == want


@pytest.mark.parametrize("size", [1, 3])
def test_slices_do_not_change_scores(evaluation, monkeypatch, size):
    """But for theta's rounding, which depends on the shape of the generated batch."""
    whole = rows_of(evaluation)
    parts = rows_of(sliced(evaluation, monkeypatch, size))
    assert parts.keys() == whole.keys()
    for row, scores in whole.items():
        for one, other in zip(scores, parts[row], strict=True):
            assert np.array_equal(one.hit, other.hit), row
            np.testing.assert_allclose(one.confidence, other.confidence, rtol=0, atol=1e-5)


def test_a_cell_scores_the_same_alone_and_last(evaluation):
    """Nothing that was scored before it has a part in it."""
    for cell, scores in [*replace(evaluation).score_here()][::-1]:
        for one, other in zip(replace(evaluation).score_cell(cell), scores, strict=True):
            assert np.array_equal(one.hit, other.hit)
            assert np.array_equal(one.confidence, other.confidence)


def test_each_seed_is_another_classifier(evaluation, tiny_run, tiny_generator):
    tasks, generator = tiny_run.space.held_out[AXIS], noisy(tiny_generator)
    thetas = replace(evaluation, generator=generator).generate(tasks)
    embeddings, mask = generator.vocabulary.of([t.class_ids for t in tasks])
    for seed in range(evaluation.config.seeds):
        body, rows = generator.generate(embeddings, mask, seeds=[seed] * len(tasks))
        for i, own in enumerate(tasks):
            want = generator.theta(body[i], rows[i, : own.num_classes])
            assert torch.equal(thetas[i][seed], want)
    assert not torch.equal(thetas[0][0], thetas[0][1])


def test_a_report_needs_every_cell_in_any_order(evaluation):
    scores = dict(evaluation.score_here())
    backwards = dict(reversed(scores.items()))
    assert evaluation.report(backwards) == evaluation.report(scores)
    del scores[evaluation.cells[-1]]
    with pytest.raises(KeyError):
        evaluation.report(scores)


# --- controls -------------------------------------------------------------------------------------


def test_untrained_is_classifier_selection(axis):
    rows = axis["methods"]
    assert rows["untrained"] == rows["classifier_selection"]
    minus = axis["tina_minus"]
    assert minus["untrained"] == minus["classifier_selection"]


def test_untrained_weights_are_classifier_selections(evaluation, tiny_run):
    tasks = tiny_run.space.held_out[AXIS]
    selection = classifier_selection(evaluation.generator)
    for task, (theta,) in zip(
        tasks, evaluation.generate(tasks, untrained=True, seeds=1), strict=True
    ):
        want = evaluation.generator.theta(*selection(task))
        torch.testing.assert_close(theta, want, rtol=0, atol=1e-5)


def test_steps_beyond_the_levels_of_noise_are_left_out(evaluation):
    most = evaluation.generator.config.diffusion.timesteps
    config = replace(evaluation.config, sampling_steps=(1, most, most + 1))
    cells = replace(evaluation, config=config).cells
    compared = {cell.method for cell in cells if cell.axis == "validation"}
    assert compared == {"1_steps", f"{most}_steps"}


def test_the_new_denoiser_says_what_untrained_says(tiny_run, evaluation):
    """`untrained` replaces the denoiser by zeros; that is what a new one predicts."""
    start = tiny_run.new_generator()
    tasks = tiny_run.space.held_out[AXIS]
    (one,), (other,) = (
        replace(evaluation, generator=start).generate(tasks[:1], seeds=1),
        evaluation.generate(tasks[:1], seeds=1, untrained=True),
    )
    assert torch.equal(one[0], other[0])


def test_untrained_is_a_new_network_whatever_that_predicts(evaluation, tiny_run):
    """Which may be no selection: v of nothing is the posterior mean of noise."""
    config = evaluation.generator.config
    diffusion = replace(config.diffusion, prediction="v")
    generator = replace(tiny_run.new_generator(), config=replace(config, diffusion=diffusion))
    other = replace(evaluation, generator=generator)
    tasks = tiny_run.space.held_out[AXIS][:2]
    for (one,), (new,) in zip(
        other.generate(tasks, seeds=1, untrained=True), other.generate(tasks, seeds=1), strict=True
    ):
        torch.testing.assert_close(one, new, rtol=0, atol=1e-5)


def test_swapped_condition_keeps_the_rows_and_changes_the_classes(watched, tiny_run, evaluation):
    _, _, asked = watched
    vocabulary = evaluation.generator.vocabulary
    calls = [call for call in asked if call["conditions"] is not None]
    assert len(calls) == evaluation.config.seeds
    tasks = tiny_run.space.held_out[AXIS]
    for call in calls:
        for i, task in enumerate(tasks):
            k = task.num_classes
            own = vocabulary.embeddings[list(task.class_ids)]
            assert call["mask"][i].sum() == k
            assert torch.equal(call["embeddings"][i, :k], own)
            shown = call["conditions"][i, :k]
            ids = [int((vocabulary.embeddings == row).all(1).nonzero()) for row in shown]
            assert len(set(ids)) == k
            assert tuple(ids) != task.class_ids


def test_swapped_condition_never_shows_a_task_its_own(evaluation):
    """Even to the only task with that many classes."""
    tasks = [task(0, 1), task(2, 3), task(4, 5, 6, 7)]
    others = other_classes(tasks)
    for own, other in zip(tasks, others, strict=True):
        assert len(other) == own.num_classes
        assert other != own.class_ids


def test_swapped_condition_shows_other_classes_where_there_are_any():
    tasks = [task(0, 1, 2), task(1, 2, 3), task(2, 3, 4, 5)]
    assert other_classes(tasks) == [(3, 4, 5), (4, 5, 0), (0, 1, 2, 3)]
    assert other_classes([task(0, 1, 2), task(2, 1, 0)]) == [(2, 1, 0), (0, 1, 2)]


def test_a_swapped_condition_leaves_what_is_inherited(tiny_generator, tiny_run):
    """The denoiser sees other classes; zeros in its place show what the rows begin with."""
    vocabulary = tiny_generator.vocabulary
    embeddings, mask = vocabulary.of([(0, 1, 2)])
    conditions, _ = vocabulary.of([(5, 6, 7)])
    _, rows = tiny_generator.generate(
        embeddings,
        mask,
        seeds=[0],
        conditions=conditions,
        denoise=lambda x, *_: torch.zeros_like(x),
    )
    assert torch.equal(rows[0], tiny_generator.generic.select((0, 1, 2)))
    other = noisy(tiny_generator)
    one, two = (
        other.generate(embeddings, mask, seeds=[0], conditions=shown)[1]
        for shown in (None, conditions)
    )
    assert (one - two).abs().max() > 1e-2


def test_shuffled_prompt_permutes_the_tasks_own_names(watched, tiny_run, evaluation):
    _, _, asked = watched
    table = evaluation.generator.vocabulary.embeddings
    tasks = tiny_run.space.held_out[AXIS]
    found = []
    for call in asked:
        if len(call["mask"]) == len(tasks) and call["conditions"] is None:
            ids = [
                [int((table == row).all(1).nonzero()) for row in rows[mask]]
                for rows, mask in zip(call["embeddings"], call["mask"], strict=True)
            ]
            if all(sorted(i) == sorted(t.class_ids) for i, t in zip(ids, tasks, strict=True)):
                found.append([tuple(i) for i in ids])
    own = [t.class_ids for t in tasks]
    assert own in found  # tina's own prompts
    assert any(ids != own for ids in found)


def test_a_shuffle_is_the_tasks_own():
    orders = Counter()
    for seed in range(60):
        shuffled = shuffled_classes(replace(task(3, 1, 7), seed=seed))
        assert shuffled == shuffled_classes(replace(task(3, 1, 7), seed=seed))
        orders[tuple(shuffled)] += 1
    assert len(orders) == 6
    assert max(orders.values()) < 25


def test_uniform_shuffles_fall_to_chance_whatever_the_classifier(evaluation, tiny_run):
    """Over all orders of the prompt each image is right in exactly one of K."""
    (task,) = [t for t in tiny_run.space.train if t.num_classes == 3][:1]
    orders = list(itertools.permutations(task.class_ids))
    thetas = evaluation.generate([task] * len(orders), names=orders, seeds=1, untrained=True)
    scores = evaluation.score([task] * len(orders), thetas)
    assert np.stack([s.hit[0] for s in scores]).mean(0) == pytest.approx(1 / 3, abs=1e-9)
    assert scores[0].accuracy > 0.8  # the first order is the true one


def test_generic_is_scored_over_all_classes(evaluation, axis, tiny_run):
    """It may name any class it knows; by hand from its logits."""
    generic, data = evaluation.generator.generic, tiny_run.dataset
    theta = evaluation.generator.theta(generic.body, generic.rows)
    means = []
    for task in tiny_run.space.held_out[AXIS]:
        index = torch.cat([data.indices("report", (c,))[:5] for c in task.class_ids])
        logits = evaluation.generator.family.logits(theta, tiny_run.store[index], num_classes=10)
        means.append(float((logits.argmax(1) == data.labels[index]).float().mean()))
    assert axis["methods"]["generic"]["accuracy"] == pytest.approx(sum(means) / len(means))


def test_a_perfect_classifier_scores_one(evaluation, tiny_run, monkeypatch):
    labels = tiny_run.dataset.labels

    def know(family, theta, store, index, *, num_classes):
        rows = {c: k for k, c in enumerate(known.class_ids)}
        places = torch.tensor([rows[int(c)] for c in labels[index]])
        return 20.0 * torch.nn.functional.one_hot(places, num_classes).float()

    monkeypatch.setattr(tina.evaluation, "predict", know)
    for known in tiny_run.space.held_out[AXIS]:
        (score,) = evaluation.score([known], [[torch.zeros(1)]])
        assert isinstance(score, Score)
        assert score.accuracy == 1
        assert score.hit.shape == (1, 5 * known.num_classes)


# --- images ---------------------------------------------------------------------------------------


def test_evaluation_scores_on_report_and_chooses_on_select(watched, tiny_run):
    _, seen, _ = watched
    data = tiny_run.dataset
    # fine-tuning is timed
    partitions = {"held_out": "report", "val": "select", "trained_on": "fit"}
    for kind, partition in partitions.items():
        assert seen[kind], kind
        assert seen[kind] <= set(data.indices(partition).tolist()), kind
    assert seen["predicted"] == seen["held_out"] | seen["val"]


def test_a_validation_measures_what_its_weights_generate(tiny_run, tiny_generator):
    generator, tasks = noisy(tiny_generator), tiny_run.space.val
    validate = tiny_run.validator(tiny_generator)

    def by_hand(made):
        found = []
        for own in tasks:
            embeddings, mask = made.vocabulary.of([own.class_ids])
            body, rows = made.generate(embeddings, mask, seeds=[0])
            theta = made.theta(body[0], rows[0])
            lesson = Lesson.of(tiny_run.dataset, own.class_ids, seed=0, partition="select")
            found.append(accuracy(made.family, theta, tiny_run.store, lesson))
        return found

    want, plain = by_hand(generator), by_hand(tiny_run.new_generator())
    assert validate(generator.denoiser.state_dict()) == pytest.approx(want)
    assert validate(None) == pytest.approx(plain)  # classifier selection
    assert want != plain
    assert validate(generator.denoiser.state_dict()) == pytest.approx(want)


def test_the_ridge_penalty_is_chosen_without_report_images(evaluation, tiny_run):
    with watching() as seen:
        assert replace(evaluation)._tuned_ridge
    assert seen["predicted"]
    assert seen["predicted"] <= set(tiny_run.dataset.indices("select").tolist())


def test_the_ridge_penalty_is_the_best_on_validation_tasks(evaluation, monkeypatch):
    best = classifier_selection(evaluation.generator)

    def worst(task):
        body, rows = best(task)
        return body, -rows

    monkeypatch.setattr(
        tina.evaluation, "ridge", lambda *_, penalty: best if penalty == 10 else worst
    )
    assert replace(evaluation)._tuned_ridge is best


def test_training_and_zoo_never_read_report_images(tiny_run):
    run = Run(tiny_run.config)  # the same folder, only read; its own store
    store = Recording(run.family, run.dataset.views)
    run.__dict__["store"] = store
    build_rows(
        run.zoo_tasks("zoo")[-1:],
        family=run.family,
        dataset=run.dataset,
        store=store,
        generic=run.generic,
        recipe=run.recipe("zoo"),
        max_classes=4,
        stacked=False,
    )
    generator = run.new_generator()
    config = replace(run.config.train, steps=3)
    train(
        config,
        engine=LocalEngine(generator.denoiser, config),
        source=BatchSource(
            generator=generator,
            config=config,
            zoo=run.read_zoo("zoo").only("train"),
            space=run.space,
            dataset=run.dataset,
            store=store,
        ),
        start=Progress.start(generator.denoiser),
        report=lambda progress, figures: None,
        validate=lambda weights: partial(run.validator(generator), weights),
    )
    partitions = {
        key: set(run.dataset.indices(key).tolist()) for key in ("fit", "select", "report")
    }
    assert not store.read & partitions["report"]
    assert store.read & partitions["fit"]
    assert store.read & partitions["select"]


# --- baselines ------------------------------------------------------------------------------------


def task(*class_ids):
    names = tuple(f"name {c}" for c in class_ids)
    return Task(
        dataset="digits",
        class_ids=class_ids,
        class_names=names,
        split="train",
        axis="unseen_combination",
        seed=0,
    )


def make_zoo(generator, models):
    """A zoo of (class_ids, body, rows)."""
    layout = generator.family.layout(generator.max_classes)
    thetas = []
    for class_ids, body, rows in models:
        padding = torch.zeros(generator.max_classes - len(class_ids), layout.row_size)
        thetas.append(layout.join(body, torch.cat([rows, padding])))
    count = len(models)
    return Zoo(
        task_ids=tuple(f"{i:04d}" for i in range(count)),
        class_ids=tuple(ids for ids, _, _ in models),
        splits=("train",) * count,
        theta=torch.stack(thetas),
        accuracy=torch.ones(count),
        steps=torch.ones(count),
    )


@pytest.fixture(scope="module")
def random_zoo(tiny_generator):
    """P-models of random numbers, on random class sets."""
    draw = torch.Generator().manual_seed(0)
    layout = tiny_generator.family.layout(4)
    models = []
    for ids in [(3, 1), (5, 1, 7), (1, 3, 9), (2, 6)]:
        body = torch.randn(layout.body_size, generator=draw)
        models.append((ids, body, torch.randn(len(ids), layout.row_size, generator=draw)))
    return models, make_zoo(tiny_generator, models)


def test_class_mean_by_hand(tiny_generator, random_zoo):
    models, zoo = random_zoo
    body, rows = class_mean(tiny_generator, zoo)(task(1, 5, 8))
    torch.testing.assert_close(body, sum(m[1] for m in models) / 4)
    of_one = (models[0][2][1] + models[1][2][1] + models[2][2][0]) / 3
    torch.testing.assert_close(rows[0], of_one)
    torch.testing.assert_close(rows[1], models[1][2][0])
    _, own = tiny_generator.inherit_classes([8])  # in no p-model, nor in the generic model
    torch.testing.assert_close(rows[2], own[0])


def test_nearest_is_the_p_model_itself_for_its_own_classes(tiny_generator, random_zoo):
    models, zoo = random_zoo
    predict = nearest_pmodel(tiny_generator, zoo)
    for class_ids, body, rows in models:
        order = [*range(1, len(class_ids)), 0]
        found_body, found_rows = predict(task(*(class_ids[k] for k in order)))
        assert torch.equal(found_body, body)
        assert torch.equal(found_rows, rows[order])


@pytest.mark.parametrize("larger_first", [True, False])
def test_nearest_prefers_the_same_set_to_a_larger_one(tiny_generator, random_zoo, larger_first):
    models, _ = random_zoo
    pair = [models[2], models[0]] if larger_first else [models[0], models[2]]
    body, _ = nearest_pmodel(tiny_generator, make_zoo(tiny_generator, pair))(task(3, 1))
    assert torch.equal(body, models[0][1])


def test_nearest_inherits_rows_that_its_p_model_lacks(tiny_generator, random_zoo):
    models, zoo = random_zoo
    body, rows = nearest_pmodel(tiny_generator, zoo)(task(6, 2, 4))
    assert torch.equal(body, models[3][1])
    assert torch.equal(rows[:2], models[3][2][[1, 0]])
    assert torch.equal(rows[2], tiny_generator.inherit_classes([4])[1][0])


def test_a_class_that_nothing_knows_has_the_row_that_its_name_inherits(tiny_generator, random_zoo):
    """In every method that explains the generator away, as in the generator; not in selection."""
    unseen = kept_out(tiny_generator, ["eight"])  # no p-model has it
    _, zoo = random_zoo
    own = unseen.inherit_classes([1, 8])[1]
    mean = unseen.generic.rows.mean(0)
    assert not torch.allclose(own[1], mean, atol=1e-3)
    assert torch.equal(classifier_selection(unseen)(task(1, 8))[1][1], mean)
    for predict in (class_mean(unseen, zoo), nearest_pmodel(unseen, zoo)):
        assert torch.equal(predict(task(1, 8))[1][1], own[1])
    torch.testing.assert_close(ridge(unseen, zoo, penalty=1e9)(task(1, 8))[1], own)
    torch.testing.assert_close(Mixer(unseen, zoo, num_classes=10)((1, 8))[1], own)


def test_what_a_p_model_inherited_is_no_residual(tiny_generator):
    sets = [(1, 3), (1, 5, 7), (3, 9), (2, 1, 6)]
    own = [(ids, *tiny_generator.inherit_classes(ids)) for ids in sets]
    zoo = make_zoo(tiny_generator, own)
    body, rows = tiny_generator.inherit_classes((1, 3, 9))
    mixer = Mixer(tiny_generator, zoo, num_classes=10)
    mixer.shares[-1].bias.data.fill_(1)
    for found in (ridge(tiny_generator, zoo, penalty=0.01)(task(1, 3, 9)), mixer((1, 3, 9))):
        torch.testing.assert_close(found[0], body, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], rows, atol=1e-5, rtol=1e-4)


def test_nearest_is_what_has_a_near_class_for_each_of_the_tasks(tiny_generator, random_zoo):
    """And not what is near on average: a class more would speak against a model that has all."""
    models, _ = random_zoo
    layout = tiny_generator.family.layout(4)
    rows = torch.randn(4, layout.row_size)
    pair = [((1, 5), models[0][1], rows[:2]), ((2, 7, 5, 1), models[1][1], rows)]
    body, _ = nearest_pmodel(tiny_generator, make_zoo(tiny_generator, pair))(task(1, 5, 7))
    assert torch.equal(body, models[1][1])


@pytest.fixture(scope="module")
def linear_world(tiny_generator):
    """A zoo whose residuals are linear in the conditions, and the maps that made it."""
    draw = torch.Generator().manual_seed(1)
    layout, vocabulary = tiny_generator.family.layout(4), tiny_generator.vocabulary
    conditions = vocabulary.condition(vocabulary.embeddings)
    width = conditions.shape[1]
    body_map = torch.randn(width, layout.body_size, generator=draw) / width
    row_map = torch.randn(2 * width, layout.row_size, generator=draw) / width

    def truth(class_ids):
        own = conditions[list(class_ids)]
        mean = own.mean(0)
        body = tiny_generator.generic.body + mean @ body_map
        rows = tiny_generator.generic.select(class_ids)
        return body, rows + torch.cat([own, mean.expand_as(own)], 1) @ row_map

    sets = list(itertools.combinations(range(10), 3))[::2]
    zoo = make_zoo(tiny_generator, [(ids, *truth(ids)) for ids in sets])
    return zoo, truth


def error(found, want, base):
    """Error relative to how far the truth lies from classifier selection."""
    return max(
        float((f - w).norm() / (w - b).norm()) for f, w, b in zip(found, want, base, strict=True)
    )


def test_ridge_recovers_a_linear_map_on_new_sets(tiny_generator, linear_world):
    zoo, truth = linear_world
    predict = ridge(tiny_generator, zoo, penalty=1e-4)
    selection = classifier_selection(tiny_generator)
    new = [*list(itertools.combinations(range(10), 3))[1::14], (9, 0), (7, 2, 4, 6)]
    for ids in new:
        assert ids not in zoo.class_ids
        assert error(predict(task(*ids)), truth(ids), selection(task(*ids))) < 0.05


def test_a_large_penalty_leaves_classifier_selection(tiny_generator, linear_world):
    zoo, _ = linear_world
    found = ridge(tiny_generator, zoo, penalty=1e6)(task(4, 0))
    for value, want in zip(found, classifier_selection(tiny_generator)(task(4, 0)), strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=1e-3)


def test_ridge_is_the_textbook_solution(tiny_generator, linear_world):
    zoo, _ = linear_world
    vocabulary = tiny_generator.vocabulary
    conditions = vocabulary.condition(vocabulary.embeddings)
    means = torch.stack([conditions[list(ids)].mean(0) for ids in zoo.class_ids]).double()
    x = torch.cat([means, torch.ones(len(means), 1)], 1)
    layout = tiny_generator.family.layout(4)
    y = (layout.split(zoo.theta)[0] - tiny_generator.generic.body).double()
    scale = 0.1 * (x @ x.T).diagonal().mean()
    primal = torch.linalg.solve(x.T @ x + scale * torch.eye(x.shape[1]), x.T @ y)
    found, _ = ridge(tiny_generator, zoo, penalty=0.1)(task(4, 0))
    own = torch.cat([conditions[[4, 0]].mean(0).double(), torch.ones(1)])
    want = tiny_generator.generic.body + own @ primal
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_few_and_many_samples_have_the_same_least_squares(shape):
    """Stacked on sqrt(penalty) times the identity, it is an ordinary one."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    y = torch.randn(shape[0], 3, generator=draw, dtype=torch.float64)
    ridge_of = (0.1 * (x @ x.T).diagonal().mean()).sqrt() * torch.eye(shape[1])
    want = torch.linalg.lstsq(torch.cat([x, ridge_of]), torch.cat([y, torch.zeros(shape[1], 3)]))
    found = _least_squares(x.float(), y.float(), 0.1)
    torch.testing.assert_close(found.double(), want.solution, rtol=0, atol=1e-5)


def test_baselines_know_training_p_models_alone(evaluation, tiny_run, monkeypatch):
    seen, selection = {}, classifier_selection(evaluation.generator)
    for name in ("nearest_pmodel", "class_mean", "ridge", "train_mixer"):

        def make(generator, zoo, *rest, name=name, **options):
            seen[name] = set(zoo.splits)
            return selection

        monkeypatch.setattr(tina.evaluation, name, make)
    contenders, tasks = replace(evaluation).contenders, tiny_run.space.held_out[AXIS]
    for method in ("nearest_pmodel", "class_mean", "ridge", "taper"):
        contenders[method](tasks)
    assert set(evaluation.zoo.splits) == {"train", "val"}
    assert list(seen.values()) == [{"train"}] * 4


# --- the mixer ------------------------------------------------------------------------------------


def test_an_untrained_mixer_is_classifier_selection(tiny_generator, random_zoo, tiny_run):
    _, zoo = random_zoo
    mixer = Mixer(tiny_generator, zoo, num_classes=10)
    body, rows = mixer((6, 2, 4))
    assert torch.equal(body, tiny_generator.generic.body)
    assert torch.equal(rows, tiny_generator.generic.select((6, 2, 4)))


def test_a_whole_share_of_one_p_model_is_that_p_model(tiny_generator, random_zoo):
    models, zoo = random_zoo
    mixer = Mixer(tiny_generator, zoo, num_classes=10)
    shares = torch.zeros(len(mixer.layout.body) + 1, len(models))
    shares[:, 1] = 1
    mixer.shares[-1].bias.data = shares.flatten()
    class_ids, body, rows = models[1]
    found_body, found_rows = mixer(class_ids)
    torch.testing.assert_close(found_body, body)
    torch.testing.assert_close(found_rows, rows)
    # a class that the p-model lacks keeps its inherited row
    other = next(c for c in range(10) if c not in class_ids)
    row = mixer((other, class_ids[0]))[1][0]
    torch.testing.assert_close(row, tiny_generator.generic.select([other])[0])


def test_training_a_mixer_helps_and_repeats(tiny_generator, tiny_run):
    """On the images that it was trained on, of sets that are no task."""
    zoo = tiny_run.read_zoo("zoo").only("train")
    parts = (tiny_generator, zoo, tiny_run.space, tiny_run.dataset, tiny_run.store)
    new = tiny_run.space.sample_fresh(np.random.default_rng(5), 8)

    def loss(baseline):
        values = []
        for class_ids in new:
            lesson = Lesson.of(tiny_run.dataset, class_ids, seed=0)
            with torch.no_grad():
                logits = tiny_generator.logits(
                    *baseline(task(*class_ids)), tiny_run.store[lesson.index]
                )
            values.append(torch.nn.functional.cross_entropy(logits, lesson.labels).item())
        return sum(values) / len(values)

    trained, again = (train_mixer(*parts, steps=100, seed=0) for _ in range(2))
    assert loss(trained) < 0.95 * loss(train_mixer(*parts, steps=0, seed=0))
    assert loss(trained) == loss(again)


def test_a_mixer_is_trained_on_fit_images(tiny_generator, tiny_run):
    store = Recording(tiny_run.family, tiny_run.dataset.views)
    zoo = tiny_run.read_zoo("zoo").only("train")
    train_mixer(tiny_generator, zoo, tiny_run.space, tiny_run.dataset, store, steps=3, seed=0)
    assert store.read
    assert store.read <= set(tiny_run.dataset.indices("fit").tolist())


# --- for people -----------------------------------------------------------------------------------


def test_markdown_has_every_method_and_only_measured_axes(report):
    text = markdown(report)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    groups = [str(found["classes"][0]) for found in report["by_num_classes"]]
    assert rows == ["method", *SHOWN, "classes", *groups]
    assert set(SHOWN) == report["axes"][AXIS]["methods"].keys()
    assert "unseen combination: 4 tasks, at least 5 report images per class" in text
    assert "shifted" not in text
    accuracy = report["axes"][AXIS]["methods"]["tina"]["accuracy"]
    assert f"| tina | {100 * accuracy:.1f} |" in text


def test_each_row_of_the_table_has_its_own_numbers(report):
    axis = report["axes"][AXIS]
    rows = [line.split(" | ") for line in markdown(report, AXIS).splitlines()[4:] if line]
    assert len(rows) == len(SHOWN)
    for name, right, _, worst, _, minus in rows:
        name, minus = name.removeprefix("| "), minus.removesuffix(" |")
        method = axis["methods"][name]
        assert right == f"{100 * method['accuracy']:.1f}"
        assert worst == f"{100 * method['p05']:.1f}"
        assert minus == ("" if name == "tina" else _points(axis["tina_minus"][name], 4))


def test_print_report(report, capsys):
    print_report(report)
    printed = capsys.readouterr().out
    assert all(name in printed for name in SHOWN)
    assert "shifted combination: not measured, data set has no superclasses" in printed


@pytest.mark.parametrize(("tasks", "shown"), [(FEWEST - 1, False), (FEWEST, True)])
def test_few_tasks_have_no_interval(report, tasks, shown):
    report = json.loads(json.dumps(report))
    axis = report["axes"][AXIS]
    axis |= {"gap_closed": 0.4, "gap_closed_ci95": [0.1, 0.6]}
    axis["methods"]["direct_finetuning"]["tasks"] = tasks
    caption, *_ = text = markdown(report, AXIS).splitlines()
    row = next(line for line in text if line.startswith("| direct_finetuning"))
    assert (f"gap closed 0.40 (0.10 to 0.60, {tasks} tasks)" in caption) == shown
    assert (f"gap closed 0.40 ({tasks} tasks)" in caption) != shown
    assert row.count(" to ") == (2 if shown else 0)


def test_what_names_inherit_is_not_counted_as_gained(report):
    """On the axis of new classes the share of what inheritance leaves stands beside the whole."""
    report = json.loads(json.dumps(report))
    axis = report["axes"]["unseen_class"] = report["axes"][AXIS]
    axis["methods"]["direct_finetuning"]["tasks"] = FEWEST
    axis |= {"gap_closed": 0.4, "gap_closed_ci95": [0.1, 0.6]}
    axis["above_inherited"] = {"gap_closed": 0.1, "gap_closed_ci95": [-0.1, 0.3]}
    said = "gap closed 0.40 (0.10 to 0.60, 10 tasks), 0.10 (-0.10 to 0.30) of what untrained leaves"
    new, known = (markdown(report, name).splitlines()[0] for name in ("unseen_class", AXIS))
    assert said in new
    assert "untrained leaves" not in known
    axis["above_inherited"]["gap_closed_ci95"] = None
    assert "untrained leaves" not in markdown(report, "unseen_class")
    del axis["above_inherited"]  # as in older reports
    assert "gap closed 0.40" in markdown(report, "unseen_class")


@pytest.mark.parametrize("determined", [True, False])
def test_plots(report, tmp_path, determined):
    report = json.loads(json.dumps(report))
    axis = report["axes"][AXIS]
    axis["gap_closed"], axis["gap_closed_ci95"] = (0.4, [0.1, 0.6]) if determined else (0.4, None)
    files = plot_report(report, tmp_path / "plots")
    names = ["accuracy.png", "gap_closed.png", "steps.png", "classes.png"]
    assert [file.name for file in files] == names
    assert sorted(tmp_path.rglob("*.*")) == sorted(files)
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000


@pytest.mark.parametrize(
    ("gap_closed", "interval", "words"),
    [
        (0.4, [0.1, 0.6], "gap closed 0.40 (0.10 to 0.60, 10 tasks)"),
        (0.4, None, "gap closed: undetermined"),
        (None, None, "gap closed: undetermined"),  # a gap of exactly nothing
    ],
)
def test_the_gap_in_words(report, gap_closed, interval, words):
    report = json.loads(json.dumps(report))
    axis = report["axes"][AXIS]
    axis["methods"]["direct_finetuning"]["tasks"] = FEWEST
    axis |= {"gap_closed": gap_closed, "gap_closed_ci95": interval}
    assert words in markdown(report)
    assert math.isfinite(axis["chance"])
