"""Search spaces: what a file may say, and what every point of it has been checked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tina.config import DiffusionConfig
from tina.configio import config_from_dict, parse_config
from tina.errors import ConfigError
from tina.jobconfig import ClusterConfig, JobConfig, TrainConfig
from tina.space import KEYS, Domain, SweepConfig, changed, config_values, read_search

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = JobConfig(name="base", storage="/runs")


def search(tmp_path, space, config=BASE, **sweep):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"sweep": sweep, "space": space}))
    return read_search(file, config)


def refused(tmp_path, space, config=BASE, **sweep):
    """The reason, in one line."""
    with pytest.raises(ConfigError) as raised:
        search(tmp_path, space, config, **sweep)
    reason = str(raised.value)
    assert "\n" not in reason
    return reason


# --- what may be said -----------------------------------------------------------------------------


def test_the_preset_searches_what_the_design_names():
    config = parse_config(
        JobConfig, ["--config", str(CONFIGS / "quickstart.yaml"), "--storage", "/runs"]
    )
    found = read_search(CONFIGS / "tune_digits.yaml", config)
    assert found.sweep.trials >= 8
    assert {
        *["diffusion.schedule", "diffusion.beta_range", "diffusion.prediction"],
        *["diffusion.sampling_steps", "diffusion.guidance"],
        *["denoiser.width", "denoiser.depth", "train.lr"],
    } <= found.space.keys()
    assert found.trial(found.default) == found.config


def test_the_first_point_is_the_configurations_own_with_the_trials_resources(tmp_path):
    space = {"train.lr": {"uniform": [1e-4, 1e-2]}, "denoiser.depth": {"randint": [2, 4]}}
    found = search(tmp_path, space, workers=4, cpus=0.5)
    assert found.default == {"train.lr": 1e-3, "denoiser.depth": 4}
    cluster = ClusterConfig(train_workers=4, train_cpus=0.5)
    assert found.trial(found.default) == found.config == replace(BASE, cluster=cluster)


def test_a_point_changes_its_keys_and_nothing_else(tmp_path):
    space = {
        "diffusion.schedule": {"choice": ["cosine", "linear"]},
        "diffusion.beta_range": {"choice": [[1e-4, 0.02], [1e-4, 0.01]]},
        "train.lr": {"loguniform": [1e-4, 1e-2]},
    }
    found = search(tmp_path, space)
    labels = found.space["diffusion.beta_range"].labels
    assert labels == ["[0.0001, 0.02]", "[0.0001, 0.01]"]  # a searcher takes scalars
    point = {"diffusion.schedule": "linear", "diffusion.beta_range": labels[1], "train.lr": 3e-4}
    diffusion = DiffusionConfig(schedule="linear", beta_range=(1e-4, 0.01))
    trial = found.trial(point)
    assert trial == replace(found.config, diffusion=diffusion, train=TrainConfig(lr=3e-4))
    assert hash(trial.diffusion) == hash(diffusion)


def test_what_is_printed_reads_back(tmp_path):
    space = {
        "diffusion.beta_range": {"choice": [[1e-4, 0.02], [1e-4, 0.01]]},
        "train.lr": {"loguniform": [1e-4, 1e-2]},
    }
    found = search(tmp_path, space, name="mine", concurrent=2)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(found.plain()))
    assert read_search(again, BASE) == found


def test_numbers_without_a_point_are_numbers(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("space: {train.lr: {loguniform: [1e-4, 1e-2]}, train.clip: {choice: [1, 1e1]}}")
    found = read_search(file, BASE)
    assert found.space["train.lr"] == Domain("loguniform", (1e-4, 1e-2))
    assert found.space["train.clip"] == Domain("choice", (1.0, 10.0))
    assert found.sweep == SweepConfig()


def test_values_by_key_are_put_back_by_key():
    assert config_values(BASE).keys() == KEYS.keys()
    assert changed(BASE, config_values(BASE)) == BASE
    assert "data.name" not in KEYS  # the generic model and the zoo are shared
    assert config_from_dict(JobConfig, {"name": "base", "storage": "/runs"}) == BASE


def test_a_precision_that_is_yet_to_be_settled_is_no_point(tmp_path):
    config = replace(BASE, train=TrainConfig(precision="auto"))
    assert search(tmp_path, {"train.lr": {"uniform": [1e-4, 1e-2]}}, config)
    for values in (["auto", "fp32"], ["fp32", "bf16"]):
        reason = refused(tmp_path, {"train.precision": {"choice": values}}, config)
        assert reason.endswith("has auto: say --train.precision with what it stands for")
    reason = refused(tmp_path, {"train.precision": {"choice": ["auto", "fp32"]}})
    assert reason.startswith("space.train.precision: auto is settled once per run")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train.learning_rate", "data.name", "lr", "train", 3])
def test_an_unknown_key_is_answered_with_the_valid_ones(tmp_path, key):
    reason = refused(tmp_path, {key: {"choice": [1, 2]}})
    assert f"unknown key {key!r}" in reason
    assert all(known in reason for known in KEYS)


@pytest.mark.parametrize("space", [None, {}, [], "train.lr"])
def test_an_empty_space(tmp_path, space):
    reason = refused(tmp_path, space)
    assert "space is empty" in reason
    assert "valid keys: denoiser.width" in reason


@pytest.mark.parametrize(
    ("key", "domain", "words"),
    [
        ("train.lr", {"uniform": [1e-2, 1e-4]}, "is empty: its first end must be lower"),
        ("train.lr", {"loguniform": [1e-3, 1e-3]}, "is empty"),
        ("train.lr", {"uniform": [1e-4, float("inf")]}, "is empty"),
        ("train.lr", {"uniform": [float("nan"), 1]}, "train.lr"),
        ("train.lr", {"uniform": []}, "uniform is empty"),
        ("train.lr", {"choice": []}, "choice is empty"),
        ("train.lr", {"choice": None}, "choice is empty"),
        ("train.lr", {"uniform": [1e-4]}, "needs its two ends"),
        ("train.lr", {"uniform": [0, 1]}, "train.lr must be above 0"),
        ("train.weight_loss", {"loguniform": [0, 1]}, "must start above 0"),
        ("train.lr", {"choice": [1e-3, 1.0e-3]}, "a value twice"),
        ("train.lr", {"choice": [1e-3, "fast"]}, "space.train.lr: "),
        ("train.lr", {"choice": [1e-4, 1e-2]}, "does not hold the configuration's own value 0.001"),
        ("train.lr", {"uniform": [2e-3, 1e-2]}, "does not hold the configuration's own value"),
        ("train.lr", {"normal": [0, 1]}, "choice, uniform, loguniform, randint"),
        ("train.lr", {"uniform": [1e-4, 1e-2], "choice": [1]}, "must be one of"),
        ("train.lr", [1e-4, 1e-2], "must be one of"),
        ("train.lr", {"randint": [1, 2]}, "takes choice or uniform or loguniform, not randint"),
        ("denoiser.width", {"uniform": [64, 128]}, "takes choice or randint, not uniform"),
        ("denoiser.width", {"randint": [120, 136]}, "must be a multiple of 2 * heads"),
        ("denoiser.width", {"randint": [64, 256]}, "must be a multiple of 2 * heads"),
        ("diffusion.schedule", {"uniform": [0, 1]}, "takes choice, not uniform"),
        ("diffusion.schedule", {"choice": ["cosine", "sine"]}, "space.diffusion.schedule: "),
        ("diffusion.beta_range", {"choice": [[1e-4, 0.02], [0.02, 1e-4]]}, "must rise"),
    ],
)
def test_a_bad_domain(tmp_path, key, domain, words):
    reason = refused(tmp_path, {key: domain})
    assert words in reason
    assert key in reason


def test_values_that_do_not_go_together(tmp_path):
    space = {
        "denoiser.width": {"choice": [128, 96]},
        "denoiser.heads": {"choice": [4, 32]},
        "train.lr": {"uniform": [1e-4, 1e-2]},
        "denoiser.depth": {"choice": [4, 2]},
    }
    reason = refused(tmp_path, space)
    assert "'denoiser.width': 96" in reason
    assert "'denoiser.heads': 32" in reason


def test_three_values_that_do_not_go_together(tmp_path):
    """Betas of one and more: of a linear schedule, few timesteps and a high end alone."""
    space = {
        "diffusion.schedule": {"choice": ["cosine", "linear"]},
        "diffusion.timesteps": {"choice": [1000, 50]},
        "diffusion.beta_range": {"choice": [[1e-4, 0.02], [1e-4, 0.05]]},
    }
    reason = refused(tmp_path, space)
    assert "must rise in 0..T / 1000" in reason


def test_a_batch_that_the_ranks_cannot_share(tmp_path):
    space = {"train.zoo_batch": {"choice": [32, 33]}}
    assert search(tmp_path, space).sweep.workers == 1
    assert "train.zoo_batch must be a multiple" in refused(tmp_path, space, workers=2)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"trial": 3}, "trials"),
        ({"trials": 0}, "sweep.trials must be above 0"),
        ({"trials": "many"}, "trials"),
        ({"concurrent": 0}, "sweep.concurrent must be above 0"),
        ({"workers": 0}, "sweep.workers must be above 0"),
        ({"cpus": 0}, "sweep.cpus must be above 0"),
        ({"grace": 0}, "sweep.grace"),
        ({"grace": 1.5}, "sweep.grace"),
        ({"reduction_factor": 1}, "sweep.reduction_factor must exceed 1"),
        ({"searcher": "grid"}, "searcher"),
        ({"name": "../other"}, "sweep.name must be a plain folder name"),
    ],
)
def test_a_bad_sweep(tmp_path, sweep, words):
    assert words in refused(tmp_path, {"train.lr": {"uniform": [1e-4, 1e-2]}}, **sweep)


@pytest.mark.parametrize("text", ["space: [", "- 1", "", "spaces: {}", "\x00"])
def test_a_file_that_is_no_search(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"space\.yaml"):
        read_search(file, BASE)
