"""`precision: auto`: settled once for a run, and never left to chance afterwards."""

from dataclasses import replace

import pytest
import torch
import yaml

from tina import precision
from tina.config import RecipeConfig
from tina.errors import ConfigError
from tina.families import build_family
from tina.finetune import Lesson, finetune, initial_theta
from tina.inputs import InputStore
from tina.precision import in_bf16, settle
from tina.run import Run
from tina.views import Views


def cpu_with(monkeypatch, *features):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_that_computes_in_bf16(monkeypatch, feature):
    cpu_with(monkeypatch, "avx2", feature)
    assert precision.has_bf16()


def test_a_cpu_that_would_emulate_it(monkeypatch):
    cpu_with(monkeypatch, "avx2", "avx512_f")
    assert not precision.has_bf16()


@pytest.mark.parametrize("saved", ["fp32", "bf16"])
def test_what_was_settled_before_is_kept(monkeypatch, saved):
    cpu_with(monkeypatch)
    values = {"train": {"precision": "auto", "steps": 3}, "precision": "bf16", "name": "auto"}
    kept = settle(values, {"train": {"precision": saved}, "precision": "fp32"})
    assert kept == {"train": {"precision": saved, "steps": 3}, "precision": "bf16", "name": "auto"}
    assert values["train"]["precision"] == "auto"
    assert settle(values, {})["train"]["precision"] == "fp32"


def test_a_gpu_does_not_speak_for_the_cpu_that_trains_the_generic_model(monkeypatch):
    cpu_with(monkeypatch, "avx2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    auto = {"precision": "auto"}
    found = settle({"classifier": {"generic": auto, "direct": auto}, "train": auto}, {})
    assert found["classifier"] == {
        "generic": {"precision": "fp32"},
        "direct": {"precision": "bf16"},
    }
    assert found["train"] == {"precision": "bf16"}


def test_a_run_goes_on_as_it_began_on_another_machine(monkeypatch, tiny_run, tmp_path, capsys):
    config = tiny_run.config
    asked = unsettled(config, storage=str(tmp_path))
    cpu_with(monkeypatch, "avx512_bf16")
    first = Run(asked)
    first.claim()
    assert "precision auto" in capsys.readouterr().out
    cpu_with(monkeypatch)
    second = Run(asked)
    second.claim()
    assert second.config == first.config
    assert second.config.train.precision == second.config.classifier.direct.precision == "bf16"
    saved = yaml.safe_load((second.folder / "config.yaml").read_text())
    assert saved["train"]["precision"] == "bf16"


def unsettled(config, *, storage):
    recipes = {
        name: replace(getattr(config.classifier, name), precision="auto")
        for name in ("generic", "finetune", "direct")
    }
    return replace(
        config,
        storage=storage,
        classifier=replace(config.classifier, **recipes),
        train=replace(config.train, precision="auto"),
    )


def test_nothing_is_computed_in_an_unsettled_precision():
    assert in_bf16("bf16")
    assert not in_bf16("fp32")
    family = build_family("cnn5k", channels=1, image_size=8)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    lesson = Lesson(
        class_ids=(0, 1), index=torch.arange(4), labels=torch.tensor([0, 1, 0, 1]), seed=0
    )
    with pytest.raises(ConfigError, match="auto"):
        finetune(
            family,
            [initial_theta(family, 2, seed=0)],
            [lesson],
            InputStore(family, Views(images=images)),
            RecipeConfig(steps=1, batch_size=2, precision="auto"),
            stacked=False,
        )
