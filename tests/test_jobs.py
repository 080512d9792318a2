"""Jobs: configuration and exit codes without Ray; the whole way, and its resumption, with it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from ray_jobs import build_zoo
from ray_jobs.job import run_job
from ray_jobs.quickstart import on_its_gpus, work
from ray_jobs.rank import Judge
from tina.checkpoint import check_manifest, load_generator, save_generator
from tina.config import RecipeConfig
from tina.configio import config_from_dict, config_to_dict
from tina.errors import ConfigError, DataError
from tina.jobconfig import JobConfig
from tina.run import Run

ROOT = Path(__file__).parents[1]


def short_config(storage, **changes):
    """A run that takes seconds, Ray aside; its numbers mean nothing."""
    short = {"steps": 20, "batch_size": 16, "lr": 3e-3}
    values = {
        "name": "short",
        "storage": str(storage),
        "data": {"name": "digits"},
        "tasks": {"min_classes": 2, "max_classes": 4, "train": 8, "val": 2, "held_out": 4},
        "classifier": {
            "family": "cnn5k",
            "generic": {"steps": 40, "batch_size": 32, "lr": 1e-2},
            "finetune": short,
            "direct": short,
        },
        "denoiser": {"width": 32, "depth": 2, "heads": 2},
        "diffusion": {"timesteps": 100, "sampling_steps": 4},
        "train": {
            "steps": 12,
            "zoo_batch": 4,
            "fresh_tasks": 2,
            "images_per_task": 16,
            "checkpoint_every": 4,
        },
        "evaluation": {
            "direct_tasks": 2,
            "seeds": 2,
            "bootstrap": 50,
            "images_per_class": 5,
            "sampling_steps": [1, 4],
        },
        "cluster": {"zoo_workers": 1, "train_workers": 2, "train_cpus": 0.5},
    }
    for key, change in changes.items():
        values[key] |= change
    return values


def start(work, argv):
    return run_job(work, argv, name="build_zoo", about="A job.")


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(short_config(tmp_path / "runs")))
    return file


def never(run):
    raise AssertionError("the work was started")


# --- without Ray ----------------------------------------------------------------------------------


def test_dry_run_prints_a_configuration_that_reads_back(config_file, tmp_path, capsys):
    assert start(never, ["--config", str(config_file), "--train.lr", "2e-4", "--dry-run"]) == 0
    printed = capsys.readouterr()
    config = config_from_dict(JobConfig, yaml.safe_load(printed.out))
    values = short_config(tmp_path / "runs")
    values["train"]["lr"] = 2e-4
    assert config == config_from_dict(JobConfig, values)
    assert printed.err == ""
    assert not (tmp_path / "runs").exists()  # it was dry


def test_printed_configuration_works_as_a_file(config_file, tmp_path, capsys):
    start(never, ["--config", str(config_file), "--dry-run"])
    once = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(once)
    start(never, ["--config", str(tmp_path / "again.yaml"), "--dry-run"])
    assert capsys.readouterr().out == once


def test_unknown_key_in_the_file_ends_with_2(config_file, tmp_path, capsys):
    values = short_config(tmp_path) | {"colour": "red"}
    config_file.write_text(yaml.safe_dump(values))
    assert start(never, ["--config", str(config_file)]) == 2
    printed = capsys.readouterr().err
    assert "colour" in printed
    assert "train.lr" in printed
    assert printed.count("\n") == 1


def test_missing_name_and_storage(capsys):
    assert start(never, []) == 2
    assert "name" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        start(never, ["--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "python -m ray_jobs.build_zoo --config configs/quickstart.yaml" in printed
    assert "--train.lr" in printed


def test_work_is_given_the_run_and_its_folder_keeps_the_configuration(config_file, tmp_path):
    runs = []
    assert start(runs.append, ["--config", str(config_file)]) == 0
    (run,) = runs
    assert run.folder == tmp_path / "runs" / "short"
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config_from_dict(JobConfig, kept) == run.config
    assert Run.open(run.folder).config == run.config


def test_a_key_that_a_runs_own_configuration_has_too_many_is_told_as_such(config_file, capsys):
    runs = []
    assert start(runs.append, ["--config", str(config_file)]) == 0
    file = runs[0].folder / "config.yaml"
    file.write_text(file.read_text() + "another: 1\n")
    assert start(runs.append, ["--config", str(config_file)]) == 2
    assert f"error: {file}: " in capsys.readouterr().err
    assert len(runs) == 1


def test_the_generic_model_is_trained_with_the_threads_that_joining_ray_gives(monkeypatch):
    order = []
    for name in ("start_ray", "ensure_generic", "build_zoo"):
        monkeypatch.setattr(build_zoo, name, lambda *_, name=name: order.append(name))
    build_zoo.work(None)
    assert order == ["start_ray", "ensure_generic", "build_zoo"]


def test_an_error_of_the_users_ends_with_2(config_file, capsys):
    def work(run):
        raise DataError("the zoo is spoilt")

    assert start(work, ["--config", str(config_file)]) == 2
    assert capsys.readouterr().err == "error: the zoo is spoilt\n"


def test_the_error_is_the_last_line_of_a_file_too(tmp_path):
    """Where what was printed before it waits in a buffer."""
    code = """if True:
        import sys
        from ray_jobs.job import run_job
        from tina.errors import DataError
        def work(run):
            print("so far")
            raise DataError("the zoo is spoilt")
        sys.exit(run_job(work, sys.argv[1:], name="build_zoo", about="Build."))
    """
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", code, "--name", "x", "--storage", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run(words, stdout=log, stderr=log, env=environment).returncode == 2
    assert (tmp_path / "log").read_text().splitlines()[-2:] == [
        "so far",
        "error: the zoo is spoilt",
    ]


def test_an_interrupt_says_how_to_go_on(config_file, capsys):
    def work(run):
        raise KeyboardInterrupt

    assert start(work, ["--config", str(config_file)]) == 130
    printed = capsys.readouterr().err
    assert printed.endswith(": interrupted; the same command goes on from what there is\n")
    assert "Traceback" not in printed


def test_an_error_of_ours_is_not_hidden(config_file, capsys):
    def work(run):
        raise ZeroDivisionError("a bug")

    assert start(work, ["--config", str(config_file)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1] == "error: ZeroDivisionError: a bug"


def test_a_module_runs_as_it_is_submitted(config_file):
    command = [sys.executable, "-m", "ray_jobs.quickstart", "--config", str(config_file)]
    done = subprocess.run(
        [*command, "--storage", "here"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: storage must be an absolute path")


@pytest.fixture
def claimed(tmp_path):
    run = Run(config_from_dict(JobConfig, short_config(tmp_path)))
    run.claim()
    return run


def test_the_same_configuration_may_go_on(claimed):
    Run(claimed.config).claim()
    assert Run.open(claimed.folder).config == claimed.config


def begin(run):
    """An untrained generator as far as a claim looks at it."""
    run.start.mkdir()
    (run.start / "manifest.json").write_text("{}")


OF_THE_GENERATOR = [
    ("train", {"steps": 13}),
    ("denoiser", {"width": 64}),
    ("diffusion", {"schedule": "linear"}),
]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        *OF_THE_GENERATOR,
        ("tasks", {"train": 9}),
        ("classifier", {"seed": 1}),
        ("data", {"seed": 1}),
        ("prompt", {"template": "a {}"}),
    ],
)
def test_another_configuration_is_refused(claimed, section, change):
    if section in dict(OF_THE_GENERATOR):
        begin(claimed)
    before = (claimed.folder / "config.yaml").read_bytes()
    part = replace(getattr(claimed.config, section), **change)
    other = Run(replace(claimed.config, **{section: part}))
    with pytest.raises(ConfigError, match=rf"with another {section}: choose another name"):
        other.claim()
    assert (claimed.folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("evaluation", {"seeds": 5}),
        ("cluster", {"zoo_workers": 7}),
        ("prompt", {"doubt": 2.0, "favour": 1.0, "shrinkage": 0.5, "prior": 1.0}),
        ("prompt", {"tower": RecipeConfig()}),
        *OF_THE_GENERATOR,
    ],
)
def test_what_the_folder_does_not_depend_on_may_change(claimed, section, change):
    part = replace(getattr(claimed.config, section), **change)
    other = Run(replace(claimed.config, **{section: part}))
    other.claim()
    assert Run.open(claimed.folder).config == other.config


@pytest.mark.parametrize("other", [None, RecipeConfig(steps=7)])
def test_an_image_tower_may_not_change_once_it_is_trained(claimed, other):
    """Its file would be another recipe's."""
    prompt = claimed.config.prompt

    def claim(tower):
        Run(replace(claimed.config, prompt=replace(prompt, tower=tower))).claim()

    for tower in (RecipeConfig(), other, RecipeConfig()):
        claim(tower)
    claimed.tower_file.touch()
    with pytest.raises(ConfigError, match="another prompt"):
        claim(other)


def test_a_folder_made_before_a_key_existed_goes_on_with_its_default(claimed):
    file = claimed.folder / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    del saved["train"]["min_snr"]
    file.write_text(yaml.safe_dump(saved))
    begin(claimed)
    Run(claimed.config).claim()
    assert yaml.safe_load(file.read_text())["train"]["min_snr"] == 0
    file.write_text(yaml.safe_dump(saved))
    changed = replace(claimed.config, train=replace(claimed.config.train, min_snr=5.0))
    with pytest.raises(ConfigError, match="another train"):
        Run(changed).claim()


@pytest.mark.parametrize("family", ["vitb32_head", "efficientnet_lite0_head"])
def test_moved_images_before_a_trunk_that_is_not_trained_are_refused_and_nothing_is_claimed(
    tmp_path, family
):
    moved = {"data": {"shift": 1}, "classifier": {"family": family}}
    run = Run(config_from_dict(JobConfig, short_config(tmp_path, **moved)))
    with pytest.raises(ConfigError, match=rf"data\.shift must be 0 for {family}"):
        run.claim()
    assert not run.folder.exists()


def test_a_report_of_other_settings_is_said(claimed, monkeypatch, capsys, tmp_path):
    run = Run(replace(claimed.config, storage=str(tmp_path)))
    run.checkpoint.mkdir(parents=True)
    monkeypatch.setattr("ray_jobs.quickstart.print_report", lambda report: None)
    for seeds, said in ((run.config.evaluation.seeds, False), (9, True)):
        made = replace(run.config.evaluation, seeds=seeds)
        run.report_file.write_text(json.dumps({"evaluation": config_to_dict(made)}))
        work(run)
        assert ("other evaluation settings" in capsys.readouterr().out) == said


def test_workers_look_whether_their_nodes_images_are_the_runs(tiny_run, tiny_generator, tmp_path):
    """Others would be parted otherwise, and a row be taught by images of its own report."""
    config = replace(tiny_run.config, storage=str(tmp_path))
    run = Run(replace(config, data=replace(config.data, select_fraction=0.3)))
    run.claim()
    shutil.copy(tiny_run.generic_file, run.generic_file)
    save_generator(tiny_generator, run.start, card="Untrained.\n")
    for begin in (
        build_zoo.Teacher(run.config, run.base, "zoo", [], "cpu").load,
        lambda: Judge()._new_validator(run.config, run.base),
    ):
        with pytest.raises(DataError, match="was trained on other images"):
            begin()


@pytest.mark.parametrize(
    ("gpus", "asked", "ranks"), [(0, 2, 2), (1, 2, 1), (2, 2, 2), (1, 1, 1), (4, 2, 2)]
)
def test_the_demo_has_no_more_ranks_than_gpus(tiny_run, monkeypatch, capsys, gpus, asked, ranks):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    cluster = replace(tiny_run.config.cluster, train_workers=asked)
    run = Run(replace(tiny_run.config, cluster=cluster))
    assert on_its_gpus(run).config.cluster.train_workers == ranks
    assert ("note: cluster.train_workers is" in capsys.readouterr().out) is (ranks < asked)


def test_a_run_may_be_moved(claimed, tmp_path):
    shutil.copytree(claimed.folder, tmp_path / "elsewhere" / "short")
    moved = Run(replace(claimed.config, storage=str(tmp_path / "elsewhere")))
    moved.claim()
    assert Run.open(moved.folder).config.storage == str(tmp_path / "elsewhere")


def test_configurations_survive_their_dictionary(claimed):
    assert config_from_dict(JobConfig, config_to_dict(claimed.config)) == claimed.config


# --- with Ray -------------------------------------------------------------------------------------


def environment():
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = os.environ | {"PATH": tools, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    found |= {"RAY_USAGE_STATS_ENABLED": "0"}
    found.pop("RAY_ADDRESS", None)  # a cluster of its own, that ends with it
    return found


def quickstart(config_file, log):
    """Start the job in a session of its own."""
    command = [sys.executable, "-m", "ray_jobs.quickstart", "--config", str(config_file)]
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(processes):
    """Kill what is left of processes that this test started."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def finish(config_file, log, *, timeout):
    """Run the job to its end; what it printed. It may leave no process behind."""
    process = quickstart(config_file, log)
    family = {}
    try:
        limit = time.monotonic() + timeout
        while process.poll() is None:
            assert time.monotonic() < limit, log.read_text()[-3000:]
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= {p.pid: p for p in psutil.Process(process.pid).children(recursive=True)}
            time.sleep(0.2)
        _, left = psutil.wait_procs(family.values(), timeout=20)
    finally:
        end([*family.values()])
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 0, log.read_text()[-3000:]
    assert not [p for p in left if p.is_running()], left
    return log.read_text()


def stamps(folder):
    return {
        str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()
    }


def recorded(training):
    """The states that Ray Train would go on from, as its own record lists them."""
    try:
        content = json.loads((training / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not yet written, or being written
        return []
    return [result["checkpoint_dir_name"] for result in content["checkpoint_results"]]


@pytest.mark.ray
def test_from_images_to_a_report(tmp_path):
    file, storage = tmp_path / "config.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(short_config(storage)))
    printed = finish(file, tmp_path / "first.log", timeout=400)
    assert "tina_shuffled_prompt" in printed

    run = Run.open(storage / "short")
    report = json.loads(run.report_file.read_text())
    assert {"dataset", "family", "checkpoint", "commit", "hardware", "axes"} <= report.keys()
    assert report["axes"]["unseen_combination"]["methods"]["direct_finetuning"]["tasks"] == 2
    assert report["commit"] != ""
    assert {f.name for f in (run.folder / "plots").iterdir()} == {
        "accuracy.png",
        "gap_closed.png",
        "steps.png",
        "classes.png",
    }
    zoo = run.read_zoo("zoo")
    assert set(zoo.task_ids) == {task.task_id for task in run.zoo_tasks("zoo")}
    direct = run.read_zoo("direct")
    assert set(direct.task_ids) == {task.task_id for task in run.zoo_tasks("direct")}
    assert direct.only("held_out").task_ids == direct.task_ids
    check_manifest(run.checkpoint)
    released = load_generator(run.checkpoint).config
    prompt = run.config.prompt.settled(released.prompt)
    assert released == replace(run.config.generator, prompt=prompt)
    assert (released.prompt.favour, released.prompt.doubt) == (0.0, 0.0)  # no class is kept out
    assert "| tina |" in (run.checkpoint / "README.md").read_text()

    # again: all of it is there, nothing is made anew
    before = stamps(run.folder)
    begin = time.monotonic()
    again = finish(file, tmp_path / "second.log", timeout=100)
    assert time.monotonic() - begin < 60
    after = stamps(run.folder)
    config = "config.yaml"  # claimed again, with the same content
    assert {k: v for k, v in after.items() if k != config} == {
        k: v for k, v in before.items() if k != config
    }
    assert "tina_shuffled_prompt" in again


LONGER = {"train": {"steps": 120, "checkpoint_every": 10}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a job that nothing happened to, with its log."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(short_config(folder, **LONGER)))
    finish(file, folder / "log", timeout=600)
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "fsspec+file://"], ids=["a folder", "a store"])
def test_a_killed_job_ends_as_an_undisturbed_one(whole, tmp_path, scheme):
    """SIGKILL to the job in the middle of training; the same command again; the same bytes."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(short_config(f"{scheme}{tmp_path}/killed", **LONGER)))

    log, training = tmp_path / "killed.log", tmp_path / "killed" / "short" / "train"
    process = quickstart(file, log)
    family = {}
    try:
        limit = time.monotonic() + 400
        while not recorded(training):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < limit, log.read_text()[-3000:]
            children = psutil.Process(process.pid).children(recursive=True)
            family |= {child.pid: child for child in children}
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        family |= {child.pid: child for child in children}
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end([*family.values()])
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL
    run = Run.open(tmp_path / "killed" / "short")
    assert not run.checkpoint.exists()
    assert not run.report_file.exists(), "training was over"
    zoo = stamps(run.folder / "zoo")

    finish(file, tmp_path / "resumed.log", timeout=600)
    assert stamps(run.folder / "zoo") == zoo
    # it went on, and did not start again
    first = "Reporting training result 1:"
    assert first in (whole / "log").read_text()
    assert first not in (tmp_path / "resumed.log").read_text()
    for name in ("model.safetensors", "codec.safetensors", "config.json"):
        undisturbed = (whole / "short" / "checkpoint" / name).read_bytes()
        assert (run.checkpoint / name).read_bytes() == undisturbed, name
