"""Sweeps: what they refuse, what they report, and that a killed one goes on."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray.exceptions import RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.search_generator import SearchGenerator

from ray_jobs import tune
from ray_jobs.trial import (
    HISTORY,
    STOPPED,
    Asha,
    Reports,
    distribution,
    read_history,
    run_trial,
    trial_run,
)
from tina.configio import parse_config
from tina.errors import ConfigError, DataError, NonFiniteError, TinaError
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.space import KEYS, Domain, read_search
from tina.storage import Place
from tina.sweep import (
    Outcome,
    Scale,
    best_of,
    front,
    plot_outcomes,
    print_outcomes,
    verdict,
    write_outcomes,
)

ROOT = Path(__file__).parents[1]
SWEEP = {"name": "s", "trials": 4, "searcher": "optuna", "cpus": 0.4, "reduction_factor": 2}
SPACE = {
    "train.lr": {"loguniform": [1e-4, 1e-2]},
    "denoiser.depth": {"randint": [1, 2]},
    "diffusion.beta_range": {"choice": [[1e-4, 0.02], [1e-4, 0.01]]},
}


@pytest.fixture
def space_file(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"sweep": SWEEP, "space": SPACE}))
    return file


@pytest.fixture
def search(tiny_file, space_file):
    return read_search(space_file, parse_config(JobConfig, ["--config", str(tiny_file)]))


# --- the command line -----------------------------------------------------------------------------


def refused(capsys, *flags):
    """The one line that a bad command ends with."""
    assert tune.main([*map(str, flags)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_dry_run_prints_the_configuration_and_the_space(tiny_file, space_file, search, capsys):
    flags = ["--config", tiny_file, "--space", space_file, "--train.steps", "7", "--dry-run"]
    assert tune.main([*map(str, flags)]) == 0
    config, found = yaml.safe_load_all(capsys.readouterr().out)
    assert config["train"]["steps"] == 7
    assert found == search.plain()
    assert not Path(config["storage"]).exists()


def test_an_unknown_key_ends_with_2_and_the_valid_ones(tiny_file, space_file, capsys):
    space_file.write_text("space: {train.learning_rate: {uniform: [0.1, 0.2]}}")
    reason = refused(capsys, "--config", tiny_file, "--space", space_file)
    assert "train.learning_rate" in reason
    assert all(key in reason for key in KEYS)


def test_an_empty_range_ends_with_2(tiny_file, space_file, capsys):
    space_file.write_text("space: {train.lr: {uniform: [0.2, 0.1]}}")
    reason = refused(capsys, "--config", tiny_file, "--space", space_file)
    assert "space.train.lr: the range [0.2, 0.1] is empty" in reason


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--space"),
        (["--space"], "--space"),
        (["--space", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--space", "{space}", "--train.learning_rate", "1"], "train.lr"),
        (["--space", "{space}", "--storage", "runs"], "storage must be an absolute path"),
    ],
)
def test_bad_flags_end_with_2(tiny_file, space_file, capsys, flags, words):
    flags = [flag.format(space=space_file) for flag in flags]
    assert words in refused(capsys, "--config", tiny_file, *flags)


def test_help_names_the_space(capsys):
    with pytest.raises(SystemExit) as left:
        tune.main(["--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--space FILE (required)" in printed
    example = "python -m ray_jobs.tune --space configs/tune_digits.yaml --config configs/quick"
    assert example in printed


# --- going on with a sweep ------------------------------------------------------------------------


def test_a_sweep_of_another_space_is_refused(search, tmp_path):
    file = tmp_path / "sweep.yaml"
    tune.refuse_another(Place(tmp_path), search)
    file.write_text(yaml.safe_dump(tune.recorded(search)))
    tune.refuse_another(Place(tmp_path), search)
    smaller = replace(search.sweep, workers=2, cpus=0.5)
    tune.refuse_another(Place(tmp_path), replace(search, sweep=smaller))
    longer = replace(search.config.train, steps=search.config.train.steps + 1)
    for what, other in (
        ("sweep", replace(search, sweep=replace(search.sweep, trials=5))),
        ("sweep", replace(search, sweep=replace(search.sweep, concurrent=1))),
        ("space", replace(search, space={"train.lr": Domain("uniform", (1e-4, 1e-2))})),
        # what the space does not vary, and all trials have in common
        ("train", replace(search, config=replace(search.config, train=longer))),
    ):
        with pytest.raises(ConfigError, match=rf"another {what}: choose another sweep\.name"):
            tune.refuse_another(Place(tmp_path), other)
    file.write_text("sweep: [")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        tune.refuse_another(Place(tmp_path), search)


def test_a_sweep_fails_with_its_trials_but_not_for_one_that_diverged():
    """That comes again at every start: nothing is left to be done."""
    diverged, full = (
        RayTaskError("run_trial", "its traceback", cause).as_instanceof_cause()
        for cause in (NonFiniteError("the loss is nan"), OSError(28, "No space left on device"))
    )
    assert tune.failures({"a": None, "b": diverged, "c": full, "d": full}) == [full, full]
    assert tune.failures({"a": None, "b": diverged}) == []


SNAPSHOT = ("experiment_state-{}.json", "search_gen_state-{}.json", "searcher-state-{}.pkl")


def snapshot(folder, start):
    """What Tune keeps of a sweep since a start."""
    files = [folder / name.format(start) for name in SNAPSHOT]
    for file in files:
        file.write_bytes(pickle.dumps({"live_trials": ["a", "b"]}))
    files[0].write_text('{"trial_data": []}')
    return files


@pytest.mark.parametrize("cut", range(len(SNAPSHOT)))
def test_a_snapshot_that_was_cut_off_gives_way_to_the_one_before(tmp_path, cut):
    """Whole: the searcher of another start knows trials that the sweep does not."""
    others = [tmp_path / name for name in ("sweep.yaml", "tuner.pkl", "trials-2026.parquet")]
    for file in others:
        file.write_text("")
    assert not tune.restorable(Place(tmp_path))
    first, second = (snapshot(tmp_path, f"2026-11-28_20-00-0{i}") for i in (1, 2))
    assert tune.restorable(Place(tmp_path))
    assert all(file.exists() for file in second)
    second[cut].write_bytes(second[cut].read_bytes()[:-1])
    assert tune.restorable(Place(tmp_path))
    assert all(file.exists() for file in first)
    assert not any(file.exists() for file in second)
    first[cut].write_bytes(b"")
    assert not tune.restorable(Place(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_the_first_snapshot_was_cut_off_between_two_files(tmp_path):
    experiment, *_ = snapshot(tmp_path, "2026-11-28_20-00-01")
    experiment.unlink()
    assert not tune.restorable(Place(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_files_of_a_snapshot_have_the_names_that_tune_gives_them():
    kinds = (TuneController, SearchGenerator, Searcher, BasicVariantGenerator)
    for kind in kinds:
        assert re.fullmatch(tune.SNAPSHOT, kind.CKPT_FILE_TMPL.format("2026-11-28_20-00-01"))
    assert TuneController.CKPT_FILE_TMPL.startswith(tune.EXPERIMENT)


def test_a_history_survives_a_line_that_was_cut_off(tmp_path):
    assert read_history(Place(tmp_path)) == []
    (tmp_path / HISTORY).write_text('{"step": 4}\n{"step": 8}\n{"ste')
    assert read_history(Place(tmp_path)) == [{"step": 4}, {"step": 8}]


def test_a_report_stands_on_a_line_of_its_own(tmp_path, monkeypatch):
    """After a line that was cut off, too."""
    for name in ("__init__", "after_report"):  # which need a trial around them
        monkeypatch.setattr(f"ray_jobs.trial.TuneReportCallback.{name}", lambda *_: None)
    row = {"step": 12, "val_step": 12, "val_accuracy": 0.5, "best_accuracy": 0.5}
    reports = Reports(Place(tmp_path), [])
    reports.after_report(None, [row], None)
    with (tmp_path / HISTORY).open("a") as stream:
        stream.write('{"ste')
    for _ in range(2):
        reports.after_report(None, [row], None)
    assert [found["step"] for found in read_history(Place(tmp_path))] == [12, 12, 12]


def test_an_interrupted_sweep_is_not_reported(search):
    class Results(list):
        num_terminated, num_errors = 2, 1

    with pytest.raises(TinaError, match="interrupted"):
        tune.ended(Results(), search)
    error = ValueError("a bug")
    results = Results(
        [SimpleNamespace(path=f"/s/{i}", error=error if i == 2 else None) for i in range(4)]
    )
    results.num_terminated = 3
    assert tune.ended(results, search) == {"0": None, "1": None, "2": error, "3": None}


# --- which trials go on ---------------------------------------------------------------------------


def rows(*accuracies, every=4):
    return [{"val_step": i * every, "val_accuracy": a} for i, a in enumerate(accuracies)]


def fake_trial(search, folder, name, history=(), **point):
    (folder / name).mkdir()
    (folder / name / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in history))
    point = {key.replace("_", ".", 1): value for key, value in point.items()}
    return SimpleNamespace(trial_id=name, config=search.default | point)


def test_weak_trials_are_stopped_and_the_default_never(search, tmp_path):
    asha = Asha(search, Place(tmp_path))
    strong = fake_trial(search, tmp_path, "strong", train_lr=2e-3)
    weak = fake_trial(search, tmp_path, "weak", train_lr=3e-3)
    own = fake_trial(search, tmp_path, "own")
    for trial in (strong, weak, own):
        asha.on_trial_add(None, trial)
    assert [asha.on_trial_result(None, strong, row) for row in rows(0.5, 0.9)] == ["CONTINUE"] * 2
    # before the first rung nobody is judged
    assert [asha.on_trial_result(None, weak, r) for r in rows(0.5, 0.8)] == ["CONTINUE", "STOP"]
    assert [asha.on_trial_result(None, own, r) for r in rows(0.5, 0.1, 0.1)] == ["CONTINUE"] * 3
    assert [file.parent.name for file in tmp_path.glob(f"*/{STOPPED}")] == ["weak"]


def test_rungs_are_filled_from_the_histories_of_an_earlier_start(search, tmp_path):
    asha = Asha(search, Place(tmp_path))
    ended = fake_trial(search, tmp_path, "ended", rows(0.5, 0.9), train_lr=2e-3)
    weak = fake_trial(search, tmp_path, "weak", train_lr=3e-3)
    for trial in (ended, weak):
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, weak, rows(0.5, 0.8)[1]) == "STOP"


def test_a_history_that_is_read_again_stops_nobody(search, tmp_path):
    asha = Asha(search, Place(tmp_path))
    for name, accuracy in (("strong", 0.9), ("weak", 0.8)):
        trial = fake_trial(search, tmp_path, name, rows(0.5, accuracy), train_lr=2e-3)
        asha.on_trial_add(None, trial)
    assert not list(tmp_path.glob(f"*/{STOPPED}"))


@pytest.mark.parametrize(("stopped", "last"), [(True, 8), (False, 12)])
def test_a_trial_that_has_ended_trains_no_more(search, tmp_path, monkeypatch, stopped, last):
    """Stopped or done, but Tune was restored from a snapshot that does not know."""
    run = trial_run(search, Place(tmp_path), "a", {})
    assert run.config.train.steps == 12
    run.folder.mkdir(parents=True)
    (run.folder / HISTORY).write_text(json.dumps({"step": last}) + "\n")
    if stopped:
        (run.folder / STOPPED).touch()
    reported = []
    context = SimpleNamespace(get_trial_id=lambda: "a")
    monkeypatch.setattr("ray_jobs.trial.tune.get_context", lambda: context)
    monkeypatch.setattr("ray_jobs.trial.tune.report", reported.append)
    monkeypatch.setattr("ray_jobs.trial.build_trainer", None)
    run_trial({}, search, Place(tmp_path), judge=None)
    assert reported == [{"step": last}]


def test_both_ends_of_whole_numbers_are_drawn():
    drawn = {distribution(Domain("randint", (1, 3))).sample() for _ in range(100)}
    assert drawn == {1, 2, 3}
    assert {distribution(Domain("choice", ((1, 2), (3, 4)))).sample()} < {"[1, 2]", "[3, 4]"}


# --- what a sweep reports -------------------------------------------------------------------------


def outcome(search, name="a", accuracy=0.9, *, state="done", default=False, **costs):
    config = replace(search.config, name=name)
    costs = {"seconds": 10.0, "parameters": 1000, "steps": 12} | costs
    return Outcome(config=config, state=state, accuracy=accuracy, default=default, **costs)


SCALE = Scale(selection=0.8, pmodels=0.9, tasks=4)


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9), (2.0, 0.6), (1.0, 0.5)]
    assert front(points) == [True, True, False, True, False, True]


def test_gap_closed_is_none_without_a_gap():
    assert SCALE.gap_closed(0.85) == pytest.approx(0.5)
    assert SCALE.gap_closed(0.7) == pytest.approx(-1)
    assert replace(SCALE, pmodels=0.8).gap_closed(0.85) is None
    assert replace(SCALE, pmodels=0.8 + 2e-8).gap_closed(0.85) is None  # a float32 apart


def test_the_best_of_equal_ones_is_the_default_then_the_smallest(search):
    big, small = (outcome(search, n, parameters=p) for n, p in (("big", 9), ("small", 3)))
    own = outcome(search, default=True, parameters=99)
    assert best_of([big, small]) is small
    assert best_of([big, small, own]) is own
    assert best_of([own, outcome(search, accuracy=0.91)]).accuracy == 0.91


def test_a_trial_that_was_stopped_is_never_the_best(search):
    """Its accuracy is that of an early state: an early maximum is often luck."""
    own = outcome(search, default=True)
    lucky = [outcome(search, state, 0.99, state=state) for state in ("stopped", "failed")]
    assert best_of([own, *lucky]) is own
    with pytest.raises(DataError, match="no trial"):
        best_of(lucky)


def test_the_default_is_known_by_what_the_space_varies(search, tmp_path):
    """Not by resources or evaluation, which a second start may change."""
    other = replace(
        search.config,
        name="trial",
        storage=str(tmp_path),
        cluster=replace(search.config.cluster, max_failures=7),
        evaluation=replace(search.config.evaluation, seeds=9),
    )
    assert search.is_default(other)
    assert not search.is_default(replace(other, train=replace(other.train, lr=2e-3)))


def test_the_verdict_says_what_is(search):
    own, other = outcome(search, default=True), outcome(search, "b", 0.95)
    same = verdict([own, other], np.zeros(4), SCALE, default=own, best=own)
    assert same == (
        "No trial of 2 beats the default configuration, 90.00 % "
        "on select images of 4 validation tasks."
    )
    sure = verdict([own, other], np.array([0.05, 0.06, 0.04, 0.05]), SCALE, default=own, best=other)
    assert "Trial b beats the default configuration by 5.00 points (95.00 % against" in sure
    assert "standard error 0.41)." in sure
    assert "the best of 2 on the images that it was chosen by" in sure
    unsure = verdict([own, other], np.array([0.5, -0.3, 0.0, 0.0]), SCALE, default=own, best=other)
    assert "that is within the noise" in unsure
    single = verdict([own, other], np.array([0.05]), SCALE, default=own, best=other)
    assert "of 1 validation tasks); that is within the noise" in single
    high = replace(SCALE, selection=0.95)
    vain = verdict([own, other], np.zeros(4), high, default=own, best=other)
    assert vain.endswith("None is above classifier selection, 95.00 %.")


def test_a_gain_of_less_than_two_standard_errors_is_noise(search):
    own, other = outcome(search, default=True), outcome(search, "b", 0.95)
    gains = np.array([0.15, 0.05, 0.05, -0.05])  # 5 points, its standard error 4.08
    said = verdict([own, other], gains, SCALE, default=own, best=other)
    assert "by 5.00 points" in said
    assert "standard error 4.08); that is within the noise" in said


def test_the_table_has_a_row_per_trial(search, tmp_path, capsys):
    file = tmp_path / "trials.parquet"
    outcomes = [
        outcome(search, "a", default=True),
        outcome(search, "b", 0.85, state="stopped", steps=4),
        outcome(search, "c", 0.7, state="failed"),
    ]
    write_outcomes(outcomes, SCALE, file)
    table = pq.read_table(file).to_pylist()
    assert [row["state"] for row in table] == ["done", "stopped", "failed"]
    assert [row["default"] for row in table] == [True, False, False]
    assert [row["gap_closed"] for row in table] == pytest.approx([1, 0.5, -1])
    assert KEYS.keys() < table[0].keys()
    assert table[0]["train.lr"] == 1e-3
    assert table[0]["diffusion.beta_range"] == [1e-4, 0.02]
    plot_outcomes(outcomes, SCALE, title="t", file=tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    print_outcomes(outcomes, list(search.space), SCALE)
    printed = capsys.readouterr().out
    assert printed.index("default") < printed.index("stopped") < printed.index("failed")
    assert "selection 80.00 %, p-models 90.00 %" in printed
    assert "beta_range" in printed


def lender(folder):
    """A run as `lend` knows it."""
    files = {f"{name}_file": folder / f"{name}.safetensors" for name in ("generic", "tower")}
    return SimpleNamespace(base=Place(folder), **files)


def test_what_is_lent_is_not_written_twice(tmp_path):
    from ray_jobs.sweep_report import lend

    base = tmp_path / "base"
    (base / "zoo").mkdir(parents=True)
    (base / "generic.safetensors").write_bytes(b"generic")
    (base / "tower.safetensors").write_bytes(b"tower")
    (base / "zoo" / "part-0.parquet").write_bytes(b"rows")
    (base / "zoo" / "zoo.json").write_text("{}")
    run = lender(base)
    for _ in range(2):
        lend(run, Place(tmp_path / "best"))
    assert (tmp_path / "best" / "zoo" / "part-0.parquet").read_bytes() == b"rows"
    for file in (run.generic_file, run.tower_file):
        assert os.path.samefile(tmp_path / "best" / file.name, file)


@pytest.mark.parametrize("said", [["old", "new"], ["the same", "the same"]])
def test_rows_of_two_zoos_are_not_lent_together(tmp_path, said):
    """Also of other tasks, of which zoo.json says nothing."""
    from ray_jobs.sweep_report import lend

    def base(name, said):
        folder = tmp_path / name
        (folder / "zoo").mkdir(parents=True)
        (folder / "generic.safetensors").write_text(name)
        (folder / "zoo" / "zoo.json").write_text(said)
        (folder / "zoo" / f"part-{name}.parquet").write_text(name)
        return lender(folder)

    def lent():
        return sorted(file.name for file in (tmp_path / "best" / "zoo").iterdir())

    old, new = map(base, ("old", "new"), said)
    lend(old, Place(tmp_path / "best"))
    lend(new, Place(tmp_path / "best"))
    assert lent() == ["part-new.parquet", "zoo.json"]
    (tmp_path / "best" / "config.yaml").write_text("in use")
    lend(new, Place(tmp_path / "best"))
    with pytest.raises(ConfigError, match="holds a run on another zoo: remove it"):
        lend(old, Place(tmp_path / "best"))
    assert lent() == ["part-new.parquet", "zoo.json"]
    assert (tmp_path / "best" / "generic.safetensors").read_text() == "new"


# --- with Ray -------------------------------------------------------------------------------------


def environment():
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    found.pop("RAY_ADDRESS", None)  # a cluster of its own, that ends with it
    return found


@contextlib.contextmanager
def started(job, log, *flags):
    """A job in a session of its own; whatever is left of it is killed."""
    command = [sys.executable, "-m", f"ray_jobs.{job}", *map(str, flags)]
    family = {}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def poll():
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update({p.pid: p for p in psutil.Process(process.pid).children(recursive=True)})
        time.sleep(0.2)
        return process.poll()

    try:
        yield process, poll
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for other in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        _, alive = psutil.wait_procs(family.values(), timeout=30)
        assert not alive


def end(job, log, *flags, timeout=400):
    """Run a job to its end; its exit code."""
    with started(job, log, *flags) as (process, poll):
        limit = time.monotonic() + timeout
        while poll() is None:
            assert time.monotonic() < limit, log.read_text()[-3000:]
    return process.returncode


def finish(job, log, *flags, timeout=400):
    """Run a job that succeeds; what it printed."""
    assert end(job, log, *flags, timeout=timeout) == 0, log.read_text()[-3000:]
    return log.read_text()


def histories(folder):
    return {file.parent.name: file.read_text() for file in folder.glob(f"*/{HISTORY}")}


def check(run, folder, printed):
    """All that a sweep of four trials leaves."""
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert len(table) == 4
    assert sum(row["default"] for row in table) == 1
    (own,) = (row for row in table if row["default"])
    assert own["state"] == "done"
    assert {row["trial"] for row in table} == set(histories(folder))
    assert (folder / "pareto.png").stat().st_size > 10_000
    best = parse_config(JobConfig, ["--config", str(folder / "best.yaml")])
    assert best.name == f"{run.config.name}-s-best"
    done = [row for row in table if row["state"] == "done"]
    top = max(row["val_accuracy"] for row in done)
    # of equal ones the default is taken
    winner = max(done, key=lambda row: (row["val_accuracy"], row["default"], -row["parameters"]))
    assert (winner["val_accuracy"], winner["train.lr"]) == (top, best.train.lr)
    said = printed.strip().splitlines()[-1]
    assert said.startswith("No trial of 4 beats" if winner["default"] else "Trial ")
    return best


@pytest.mark.parametrize(("workers", "most", "fit"), [(1, None, 2), (1, 1, 1), (2, None, 1)])
def test_trials_fill_the_cluster_to_its_last_cpu(search, monkeypatch, workers, most, fit):
    monkeypatch.setattr(tune, "require", lambda *_, **__: None)
    monkeypatch.setattr(tune, "on_gpu", lambda: False)
    room = {"CPU": 2.0, "memory": 9 * 2**30}
    monkeypatch.setattr(
        tune, "capacity", lambda x: min(int(room[k] / need) for k, need in x.items())
    )
    sweep = replace(search.sweep, workers=workers, cpus=1.0, concurrent=most)
    search = replace(search, sweep=sweep)
    assert tune.at_once(search) == fit
    assert "CPU" not in tune.DRIVER
    room["memory"] = 2 * 2**30  # of one trial's own process
    assert tune.at_once(search) == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_a_sweep_and_the_same_again(tiny_file, tmp_path, searcher):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"sweep": SWEEP | {"searcher": searcher}, "space": SPACE}))
    flags = ["--config", tiny_file, "--space", file]
    printed = finish("tune", tmp_path / "first.log", *flags)
    run = Run(parse_config(JobConfig, ["--config", str(tiny_file)]))
    folder = run.folder / "tune" / "s"
    best = check(run, folder, printed)

    before, begin = histories(folder), time.monotonic()
    printed = finish("tune", tmp_path / "second.log", *flags, timeout=100)
    assert time.monotonic() - begin < 60
    assert histories(folder) == before
    assert check(run, folder, printed) == best
    if searcher == "optuna":
        finish("train", tmp_path / "train.log", "--config", folder / "best.yaml")
        assert (Path(best.storage) / best.name / "trained").is_dir()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on(tiny_file, space_file, tmp_path):
    """SIGKILL to the driver; the same command again: what was finished is not repeated."""
    longer = ["--train.steps", "60", "--train.checkpoint_every", "10"]
    flags = ["--config", tiny_file, "--space", space_file, *longer]
    run = Run(parse_config(JobConfig, ["--config", str(tiny_file), *longer]))
    folder, log = run.folder / "tune" / "s", tmp_path / "killed.log"
    with started("tune", log, *flags) as (process, poll):
        limit = time.monotonic() + 400
        while "1 of 4 trials ended" not in log.read_text():
            assert poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < limit, log.read_text()[-3000:]
        ended = re.findall(r"sweep: \d of 4 trials ended, (\w+) with", log.read_text())
    assert ended
    assert process.returncode == -signal.SIGKILL
    before = histories(folder)
    assert not (folder / "best.yaml").exists()

    check(run, folder, finish("tune", tmp_path / "resumed.log", *flags))
    after = histories(folder)
    assert before.keys() <= after.keys()
    for name, text in before.items():
        assert after[name].startswith(text)
        if name in ended:
            assert after[name] == text
    for text in after.values():  # nor is a step done twice
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert steps == sorted(set(steps))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_whose_own_configuration_fails_says_why(tiny_file, tmp_path):
    file, log = tmp_path / "space.yaml", tmp_path / "log"
    sweep = SWEEP | {"trials": 1}
    file.write_text(yaml.safe_dump({"sweep": sweep, "space": {"train.lr": {"choice": [1e30]}}}))
    flags = ["--config", tiny_file, "--space", file, "--train.lr", "1e30"]
    assert end("tune", log, *flags) == 2
    assert log.read_text().splitlines()[-1].startswith("error: the loss is nan at step")


@pytest.mark.ray
@pytest.mark.parametrize("job", ["tune", "quickstart"])
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tracking", "wandb"], "error: tracking is wandb, which is not installed"),
        (["--cluster.train_cpus", "99"], "error: cluster.train_workers needs"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_starts(
    tiny_file, space_file, tmp_path, job, flags, reason
):
    if job == "tune":
        sweep = SWEEP | ({"cpus": 99} if "99" in flags else {})
        space_file.write_text(yaml.safe_dump({"sweep": sweep, "space": SPACE}))
        flags = [*flags, "--space", space_file]
        reason = reason.replace("cluster.train_workers", "sweep.workers")
    flags = ["--config", tiny_file, "--cluster.wait_s", 0, *flags]
    log = tmp_path / "log"
    assert end(job, log, *flags) == 2
    assert log.read_text().splitlines()[-1].startswith(reason)
    assert not list(Run(parse_config(JobConfig, ["--config", str(tiny_file)])).folder.glob("zoo"))
