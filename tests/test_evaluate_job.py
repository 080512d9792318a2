"""The evaluate job: what it asks for, what travels, and that its report is the in-process one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import ray_jobs.evaluate
from ray_jobs.evaluate import evaluate, pack, unpack, work
from ray_jobs.job import run_job
from tina.checkpoint import check_manifest, load_generator, save_generator
from tina.errors import ConfigError, DataError
from tina.evaluation import CELL_TASKS
from tina.files import hash_file
from tina.metrics import Score
from tina.run import Run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tiny_run, tiny_generator, tmp_path):
    """A run up to its trained generator; nothing of it is measured yet."""
    return make_run(tiny_run, tiny_generator, tmp_path, held_out=tiny_run.config.tasks.held_out)


def make_run(tiny_run, tiny_generator, storage, *, held_out):
    tasks = replace(tiny_run.config.tasks, held_out=held_out)
    run = Run(replace(tiny_run.config, storage=str(storage), tasks=tasks))
    run.claim()
    shutil.copy(tiny_run.generic_file, run.generic_file)
    shutil.copytree(tiny_run.folder / "zoo", run.folder / "zoo")
    save_generator(tiny_generator, run.trained, card="Trained for a moment.\n")
    return run


@pytest.fixture
def without_ray(tiny_run, monkeypatch):
    """The job with its cells scored in this process."""
    monkeypatch.setattr(ray_jobs.evaluate, "start_ray", lambda: None)
    monkeypatch.setattr(
        ray_jobs.evaluate,
        "build_zoo",
        lambda run, kind: shutil.copytree(
            tiny_run.folder / kind, run.folder / kind, dirs_exist_ok=True
        ),
    )
    monkeypatch.setattr(ray_jobs.evaluate, "spread", lambda run, found: found.score_here())


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- without Ray ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_travel_bit_for_bit(seeds):
    rng = np.random.default_rng(0)
    scores = [
        Score(hit=rng.random((seeds, n)) < 0.5, confidence=rng.random((seeds, n)))
        for n in (7, 1, 12)
    ]
    table = pa.concat_tables([pack(4, scores), pack(0, scores[:1])])
    found = dict(unpack(table))
    assert found.keys() == {4, 0}
    for back, sent in ((found[4], scores), (found[0], scores[:1])):
        for one, other in zip(back, sent, strict=True):
            for name in ("hit", "confidence"):
                value, want = getattr(one, name), getattr(other, name)
                assert value.dtype == want.dtype
                assert np.array_equal(value, want), name


def test_it_wants_a_trained_generator(run, capsys):
    shutil.rmtree(run.trained)
    argv = ["--config", str(run.folder / "config.yaml")]
    assert run_job(work, argv, name="evaluate", about="A job.") == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {run.folder} holds no trained generator: run ray_jobs.train first\n"


@pytest.mark.parametrize("kind", ["zoo", "direct"])
def test_images_that_are_no_longer_the_zoos_are_refused(run, tiny_run, without_ray, kind):
    """They are cut into other partitions: training may have seen those of the report."""
    if kind == "direct":
        shutil.copytree(tiny_run.folder / "direct", run.folder / "direct")
    file = run.folder / kind / "zoo.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"dataset_fingerprint": "0" * 64}))
    for measure in (evaluate, lambda run: run.evaluate(load_generator(run.trained))):
        with pytest.raises(DataError, match=f"{kind} was made of other images than digits has now"):
            measure(run)
    assert not run.report_file.exists()


def test_a_checkpoint_of_another_generator_is_refused(run, tiny_run, without_ray):
    save_generator(tiny_run.new_generator(), run.checkpoint, card="Another one.\n")
    before = files(run.checkpoint)
    with pytest.raises(ConfigError, match="holds another generator than"):
        evaluate(run)
    assert files(run.checkpoint) == before
    assert not run.report_file.exists()


def test_a_checkpoint_with_a_key_more_is_of_the_same_generator(run, without_ray, capsys):
    """As a later version writes it."""
    evaluate(run)
    file, manifest = run.checkpoint / "config.json", run.checkpoint / "manifest.json"
    file.write_text(file.read_text() + "\n")
    names = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(names | {file.name: hash_file(file)}))
    before = files(run.checkpoint)
    evaluate(run)
    assert files(run.checkpoint) == before
    assert "was released before and keeps its card" in capsys.readouterr().out


def test_the_checkpoint_is_released_with_its_numbers(run, without_ray):
    report = evaluate(run)
    assert json.loads(run.report_file.read_text()) == json.loads(json.dumps(report))
    assert {file.name for file in (run.folder / "plots").iterdir()} == {
        "accuracy.png",
        "gap_closed.png",
        "steps.png",
        "classes.png",
    }
    check_manifest(run.checkpoint)
    released, trained = files(run.checkpoint), files(run.trained)
    differing = {name for name in released if released[name] != trained[name]}
    assert differing == {"README.md", "manifest.json"}
    assert report["checkpoint"] == json.loads(released["manifest.json"])["model.safetensors"]
    accuracy = report["axes"]["unseen_combination"]["methods"]["tina"]["accuracy"]
    assert f"| tina | {100 * accuracy:.1f} |".encode() in released["README.md"]


def test_a_released_checkpoint_is_left_and_the_report_written_anew(run, without_ray):
    first = evaluate(run)
    released = files(run.checkpoint)
    shutil.rmtree(run.folder / "direct")
    again = Run(replace(run.config, evaluation=replace(run.config.evaluation, seeds=1)))
    second = evaluate(again)
    assert (first["seeds"], second["seeds"]) == ([0, 1], [0])
    assert json.loads(run.report_file.read_text())["seeds"] == [0]
    assert files(run.checkpoint) == released


def test_what_training_does_not_read_may_change_after_it(run, without_ray):
    evaluate(run)
    released = files(run.checkpoint)
    doubting = replace(run.config.prompt, doubt=9.0)
    again = Run(replace(run.config, prompt=doubting))
    before = (run.folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="released with another prompt: remove it"):
        again.claim()
    assert (run.folder / "config.yaml").read_bytes() == before
    Run(run.config).claim()  # as it was
    assert files(run.checkpoint) == released
    shutil.rmtree(run.checkpoint)
    again.claim()
    evaluate(again)
    changed = {name for name, data in files(run.checkpoint).items() if data != released[name]}
    assert changed - {"README.md"} == {"config.json", "manifest.json"}
    assert load_generator(run.checkpoint).config.prompt == doubting


# --- with Ray -------------------------------------------------------------------------------------


def submit(run):
    """Run the job as it is submitted; what it printed."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)  # a cluster of its own, that ends with it
    with subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.evaluate", "--config", str(run.folder / "config.yaml")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=500)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err[-3000:]
    return out


def test_a_wrong_regressor_is_told_of_before_anything_is_fine_tuned(run, monkeypatch):
    asked = replace(run.config.evaluation, regressor="nowhere")
    monkeypatch.setattr(ray_jobs.evaluate, "start_ray", None)
    with pytest.raises(ConfigError, match="holds no run"):
        evaluate(Run(replace(run.config, evaluation=asked)))


@pytest.mark.ray
def test_the_report_is_the_in_process_one(tiny_run, tiny_generator, tmp_path, monkeypatch):
    """To the last bit, with one thread on both sides; only times differ."""
    monkeypatch.setenv("TINA_COMMIT", "c0ffee")
    run = make_run(tiny_run, tiny_generator, tmp_path, held_out=CELL_TASKS + 4)
    assert not (run.folder / "direct").exists()
    printed = submit(run)
    assert "tina_shuffled_prompt" in printed
    assert str(run.folder) in printed
    found = json.loads(run.report_file.read_text())
    assert found["axes"]["unseen_combination"]["methods"]["direct_finetuning"]["tasks"] == 2
    assert found["commit"] == "c0ffee"
    check_manifest(run.checkpoint)

    run.report_file.unlink()
    Run(run.config).evaluate(load_generator(run.trained))
    want = json.loads(run.report_file.read_text())
    assert found.pop("timing").keys() == want.pop("timing").keys()
    assert found == want
