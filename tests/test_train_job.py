"""Training on Ray Train with DeepSpeed: every ZeRO stage, any number of ranks, killed workers."""

import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from ray.train import Checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_jobs.engine import deepspeed_config
from ray_jobs.job import start_ray
from ray_jobs.rank import PROGRESS, Judge, train_on_rank
from ray_jobs.tracking import check_tracking, open_tracking
from ray_jobs.train import build_trainer, check_zoo, last_state, train_generator
from tina import TinaPipeline
from tina.checkpoint import load_generator, save_generator
from tina.errors import ConfigError, DataError
from tina.jobconfig import ClusterConfig
from tina.run import Run
from tina.training import Progress

# Ray in this process: it sets deprecated options of its own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RANKS = {"train_workers": 2, "train_cpus": 0.5}


def trial(tiny_run, storage, *, train=None, **cluster):
    """A run of its own on the shared generic model and zoo."""
    steps = {"steps": 12, "checkpoint_every": 4, "fresh_tasks": 4, "zoo_batch": 4}
    config = replace(
        tiny_run.config,
        name="trial",
        storage=str(storage),
        train=replace(tiny_run.config.train, **steps | (train or {})),
        cluster=ClusterConfig(**RANKS | cluster),
    )
    run = Run(config, tiny_run.place)
    run.claim()
    return run


def curve(run):
    """Losses over all ranks since the last report, at each report."""
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    names = ("weight_loss", "function_loss", "val_accuracy")
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


def first_step(run):
    """Step of the first loss that the last start of a training logged."""
    last = max((run.folder / "tensorboard").glob("events.*"), key=lambda file: file.stat().st_mtime)
    events = EventAccumulator(str(last))
    events.Reload()
    return events.Scalars("weight_loss_of_step")[0].step


def weights(run):
    return load_generator(run.trained).denoiser.state_dict()


# --- without Ray ----------------------------------------------------------------------------------


def test_autocast_is_deepspeeds_own(tiny_run, tmp_path):
    """An autocast around its engine would be switched off inside it, silently."""
    run = trial(tiny_run, tmp_path, train={"precision": "bf16", "accumulation": 2})
    found = deepspeed_config(run.config, 2)
    assert found["zero_optimization"] == {"stage": 0}
    assert found["torch_autocast"]["enabled"] is True
    assert found["gradient_accumulation_steps"] == 2
    assert found["train_batch_size"] == 4


def test_offload_without_partitions_is_refused():
    with pytest.raises(ConfigError, match="offload needs"):
        ClusterConfig(offload=True)


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed(tiny_run, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("ray_jobs.tracking.find_spec", lambda name: None)
    run = Run(replace(trial(tiny_run, tmp_path).config, tracking=kind))
    with pytest.raises(ConfigError, match=f"pip install {kind}"):
        check_tracking(run)


@pytest.mark.parametrize(
    ("train", "reached"),
    [
        ({"condition_dropout": 0.0}, False),
        ({"condition_dropout": 0.1}, True),
        ({"condition_dropout": 0.1, "weight_loss": 0.0}, False),  # fresh tasks keep theirs
    ],
)
def test_what_no_training_has_reached_is_zero_in_the_end(
    tiny_run, tmp_path, monkeypatch, train, reached
):
    """Guidance would lead away from it; see `Generator.takes_guidance`."""
    run = trial(tiny_run, tmp_path, train=train)
    save_generator(run.new_generator(), run.start, card="x")

    state = tmp_path / "state"
    state.mkdir()
    Progress.start(load_generator(run.start).denoiser).save(state / PROGRESS)
    result = SimpleNamespace(checkpoint=Checkpoint.from_directory(str(state)), metrics={})
    trainer = SimpleNamespace(fit=lambda: result)
    for name in ("check_zoo", "check_tracking"):
        monkeypatch.setattr(f"ray_jobs.train.{name}", lambda run: None)
    monkeypatch.setattr("ray_jobs.train.build_trainer", lambda run: trainer)
    assert train_generator(run).takes_guidance is reached
    assert load_generator(run.trained).takes_guidance is reached


def test_a_training_that_another_job_began_meanwhile_is_compared_again(
    tiny_run, tmp_path, monkeypatch
):
    """Until there is a generator each of two jobs may claim the run for its own settings."""
    monkeypatch.setattr("ray_jobs.train.require_ranks", lambda run: (run.config.cluster, {}))
    first = trial(tiny_run, tmp_path)
    second = trial(tiny_run, tmp_path, train={"lr": 0.5})
    first.claim()
    save_generator(first.new_generator(), first.start, card="x")
    with pytest.raises(ConfigError, match="holds a run with another train"):
        build_trainer(second)
    assert Run.open(first.folder).config.train == first.config.train


def test_curves_go_on_without_a_gap(tiny_run, tmp_path):
    """The losses of the state that a training goes on from were logged before it."""
    run = trial(tiny_run, tmp_path)
    for start, steps in ((0, (100, 200)), (0, (100, 200, 300)), (200, (250,))):
        tracker = open_tracking(run, start=start)
        for step in steps:
            tracker.log(step, {"weight_loss": float(step)})
        tracker.close()
        time.sleep(1)  # a file's name has the second
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("weight_loss")] == [100, 200, 250]


def test_mlflow_needs_a_place(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.tracking.find_spec", lambda name: True)
    run = Run(replace(trial(tiny_run, tmp_path).config, tracking="mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="without MLFLOW_TRACKING_URI"):
        check_tracking(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    check_tracking(run)


def test_wandb_knows_a_training_and_not_its_place(tiny_run, tmp_path, monkeypatch):
    """Another training in the place of one that was removed has curves of its own."""
    begun = []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(define_metric=lambda *args, **options: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = trial(tiny_run, tmp_path)
    for _ in range(2):
        open_tracking(Run(replace(run.config, tracking="wandb")), start=0)
    shutil.rmtree(run.folder / "train")
    open_tracking(Run(replace(run.config, tracking="wandb")), start=0)
    first, again, other = (options["id"] for options in begun)
    assert first == again != other
    assert {options["name"] for options in begun} == {"trial"}


def test_a_list_of_states_that_was_cut_off(tiny_run, tmp_path):
    run = trial(tiny_run, tmp_path)
    file = run.folder / "train" / "checkpoint_manager_snapshot.json"
    file.parent.mkdir()
    file.write_text('{"ray_version": "2')
    with pytest.raises(
        DataError, match=r"holds: Unterminated .*; if a crash .* remove that folder"
    ):
        last_state(run)


def test_a_judge_loads_images_once(tiny_run, tmp_path, monkeypatch):
    judged, loaded = [], []
    for width in (16, 32):
        config = trial(tiny_run, tmp_path / str(width)).config
        denoiser = replace(config.denoiser, width=width)
        run = Run(replace(config, denoiser=denoiser), tiny_run.place)
        save_generator(run.new_generator(), run.start, card="x")
        judged.append(run)
    monkeypatch.setattr("ray_jobs.rank.settle_in", lambda threads: None)
    data = tiny_run.dataset
    monkeypatch.setattr("tina.run.load_dataset", lambda *_, **__: loaded.append(1) or data)
    judge = Judge()
    for run in judged * 2:
        start = load_generator(run.start)
        found = judge.accuracies(run.config, tiny_run.place, start.denoiser.state_dict())
        assert found == tiny_run.validator(start)(None)  # untrained, it is selection
    assert len(loaded) == 1


def test_without_a_zoo(tiny_run, tmp_path):
    run = Run(trial(tiny_run, tmp_path).config)
    with pytest.raises(DataError, match=r"run ray_jobs\.build_zoo first"):
        train_generator(run)


def own_zoo(tiny_run, storage, **finetune):
    """A run with a copy of the shared generic model and zoo in its own folder."""
    config = trial(tiny_run, storage).config
    recipe = replace(config.classifier.finetune, **finetune)
    run = Run(replace(config, classifier=replace(config.classifier, finetune=recipe)))
    shutil.copy(tiny_run.generic_file, run.generic_file)
    shutil.copytree(tiny_run.folder / "zoo", run.folder / "zoo")
    return run


def test_a_zoo_that_is_not_whole(tiny_run, tmp_path):
    run = own_zoo(tiny_run, tmp_path)
    check_zoo(run)
    next((run.folder / "zoo").glob("*.parquet")).unlink()
    with pytest.raises(DataError, match=r"zoo lacks \d+ of \d+ p-models: run ray_jobs.build_zoo"):
        train_generator(run)


def test_a_zoo_of_another_recipe(tiny_run, tmp_path):
    with pytest.raises(DataError, match="recipe"):
        train_generator(own_zoo(tiny_run, tmp_path, steps=7))


# --- with Ray -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A local cluster that ends with these tests."""
    import ray

    start_ray()
    yield
    ray.shutdown()


def train_smoothly(run):
    """Train with an Adam whose step goes to zero with the gradient.

    Its own eps, 1e-8, turns the rounding of a vanishing gradient, whose sign depends on the number
    of parts, into a whole step of that one weight (docs/log.md, 2026-11-26).
    """

    def on_rank(settings):
        import ray_jobs.engine

        build = ray_jobs.engine.build_optimiser

        def smooth(*args):
            optimiser = build(*args)
            for group in optimiser.param_groups:
                group["eps"] = 1e-5
            return optimiser

        ray_jobs.engine.build_optimiser = smooth  # this worker ends with its training
        train_on_rank(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_jobs.train.train_on_rank", on_rank)
        train_generator(run)


@pytest.fixture(scope="module")
def plain(tiny_run, cluster, tmp_path_factory):
    """Two ranks without ZeRO: what the others are compared with."""
    run = trial(tiny_run, tmp_path_factory.mktemp("plain"))
    train_smoothly(run)
    return run


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "train"),
    [
        ({"zero_stage": 1}, {}),
        ({"zero_stage": 2, "offload": True}, {}),
        ({"zero_stage": 3, "activation_checkpointing": True}, {"accumulation": 2}),
        ({"train_workers": 1}, {}),
    ],
    ids=["stage 1", "stage 2, offload", "stage 3, recomputed in two parts", "one rank"],
)
def test_stages_and_ranks_have_the_same_curve(tiny_run, plain, tmp_path, keys, train):
    run = trial(tiny_run, tmp_path, train=train, **keys)
    train_smoothly(run)
    want, found = curve(plain), curve(run)
    for name, values in want.items():
        assert found[name].keys() == values.keys()
        assert found[name] == pytest.approx(values, rel=1e-3), name
    start, want, found = run.new_generator().denoiser.state_dict(), weights(plain), weights(run)
    for name, value in want.items():
        gap, way = found[name] - value, value - start[name]
        assert gap.norm() <= 1e-2 * way.norm(), name
        assert gap.abs().max() <= 1e-5, name
    pipe = TinaPipeline.from_pretrained(str(run.trained))
    assert pipe(["one", "two"], seed=0).theta.isfinite().all()


def kill_a_worker(training: Path, killed: list[int]) -> None:
    """SIGKILL to one rank as soon as Ray Train has recorded a state."""
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        snapshot = training / "checkpoint_manager_snapshot.json"
        if snapshot.exists() and "checkpoint_dir_name" in snapshot.read_text():
            for process in psutil.Process().children(recursive=True):  # of this cluster alone
                if any("RayTrainWorker" in word for word in process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


LONG = {"steps": 160, "checkpoint_every": 8}  # long enough to be killed in the middle


@pytest.fixture(scope="module")
def undisturbed(tiny_run, cluster, tmp_path_factory):
    """Longer runs that nothing happens to, by ZeRO stage."""
    runs = {}

    def of(stage):
        if stage not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            runs[stage] = trial(tiny_run, folder, train=LONG, zero_stage=stage)
            train_generator(runs[stage])
        return runs[stage]

    return of


@pytest.fixture
def killer():
    """Kill a rank of a run that is about to start; the list of killed processes."""
    killed, threads = [], []

    def start(run):
        threads.append(threading.Thread(target=kill_a_worker, args=(run.folder / "train", killed)))
        threads[-1].start()
        return killed

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", [3])
def test_a_killed_rank_ends_as_an_undisturbed_one(tiny_run, undisturbed, killer, tmp_path, stage):
    run = trial(tiny_run, tmp_path, train=LONG, zero_stage=stage)
    killed = killer(run)
    train_generator(run)
    assert killed, "no rank was killed"
    assert first_step(run) > LONG["checkpoint_every"], "it began anew"
    for name in ("model.safetensors", "codec.safetensors"):
        want = (undisturbed(stage).trained / name).read_bytes()
        assert (run.trained / name).read_bytes() == want, name


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(tiny_run, undisturbed, killer, tmp_path, stage):
    """Begun by two ranks, ended by one: the same samples, so the same result but for rounding."""
    from ray.train import TrainingFailedError

    run = trial(tiny_run, tmp_path, train=LONG, zero_stage=stage, max_failures=0)
    killed = killer(run)
    with pytest.raises(TrainingFailedError):
        train_generator(run)
    assert killed
    other = trial(tiny_run, tmp_path, train=LONG, zero_stage=2)
    with pytest.raises(ConfigError, match=f"begun with cluster.zero_stage {stage}.*go on with"):
        train_generator(other)
    alone = trial(tiny_run, tmp_path, train=LONG, zero_stage=stage, train_workers=1)
    train_generator(alone)
    assert first_step(alone) > LONG["checkpoint_every"], "it began anew"
    want, found = curve(undisturbed(stage)), curve(alone)
    for name in ("weight_loss", "function_loss"):
        last = max(want[name])
        assert found[name][last] == pytest.approx(want[name][last], rel=1e-2), name
    progress = [max(found[name]) for name in found]
    assert progress == [160, 160, 160]
    for name, value in weights(undisturbed(stage)).items():
        torch.testing.assert_close(weights(alone)[name], value, rtol=0, atol=1e-3)
