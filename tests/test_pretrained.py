"""The checkpoints that come with the package: whole, small, and what their cards say."""

import json
from pathlib import Path

import pytest
import torch

from tina import TinaPipeline
from tina.checkpoint import PRETRAINED
from tina.errors import CheckpointError, ConfigError, PromptError
from tina.pipeline import pretrained
from tina.report import markdown

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_they_are_small():
    assert pretrained()
    size = sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file())
    assert size <= 20e6


@pytest.mark.parametrize("name", pretrained())
def test_one_is_loaded_by_its_name_and_generates(name):
    pipe = TinaPipeline.from_pretrained(name)
    words = [
        word
        for word, trained in zip(
            pipe.generator.vocabulary.names, pipe.generator.vocabulary.trained, strict=True
        )
        if trained
    ]
    model = pipe(words[:3], seed=0)
    assert model.familiarity == pytest.approx((1, 1, 1), abs=1e-5)
    family = pipe.generator.family
    images = torch.rand(4, family.channels, family.image_size, family.image_size)
    assert model.classifier(images).shape == (4, 3)


def test_it_knows_words_that_its_data_set_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("TINA_DATA", str(tmp_path))  # the table is not needed
    pipe = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
    laptop, tiger, otter = pipe(["Laptop", "tiger cat", "otter"], seed=0).familiarity
    assert laptop < tiger < otter == pytest.approx(1)
    with pytest.raises(PromptError, match=r"does not know 'lap top'; the closest .* are laptop; "):
        pipe(["otter", "lap top"])
    with pytest.raises(PromptError, match="does not know 'zzzzzz'; free text needs"):
        pipe(["otter", "zzzzzz"])


@pytest.mark.parametrize("name", pretrained())
def test_guidance_that_nothing_has_trained_is_refused(name):
    pipe = TinaPipeline.from_pretrained(name)
    with pytest.raises(ConfigError, match="guidance"):
        pipe(list(pipe.generator.vocabulary.trained_names[:3]), guidance_scale=2.0)


@pytest.mark.parametrize("name", pretrained())
def test_the_card_has_the_published_reports_numbers(name):
    published = RESULTS / name.removeprefix("tina-").replace("-", "_") / "report.json"
    report = json.loads(published.read_text())
    assert markdown(report) in (PRETRAINED / name / "README.md").read_text()
    assert report["generator"]["parameters"] == sum(
        p.numel() for p in TinaPipeline.from_pretrained(name).generator.denoiser.parameters()
    )


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=f"no checkpoint at tina-dogs: .*{pretrained()[0]}"):
        TinaPipeline.from_pretrained("tina-dogs")
