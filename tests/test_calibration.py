"""What generation does to new classes is fitted by a proper score, to classes kept out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tina.calibration import Answers, answer, brier, calibrate, fit
from tina.generic import save_generic, train_generic
from tina.jobconfig import TaskConfig
from tina.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two digits kept out of all training, and its untrained generator."""
    tasks = TaskConfig(
        min_classes=2, max_classes=4, train=8, val=2, held_out=4, excluded_fraction=0.2
    )
    run = Run(tiny_config(tmp_path_factory.mktemp("runs"), tasks=tasks))
    run.claim()
    recipe = run.config.classifier.generic
    generic = train_generic(run.family, run.dataset, run.space.seen, recipe, seed=0)
    save_generic(run.generic_file, generic, run.family, run.dataset)
    return run


@pytest.fixture(scope="module")
def generator(run):
    return run.new_generator()


@pytest.mark.parametrize("k", [2, 5])
def test_the_score_is_briers(k):
    labels = torch.arange(k)
    sure = 100.0 * torch.eye(k)
    assert brier(sure, labels).item() == pytest.approx(0)
    assert brier(sure, labels.roll(1)).item() == pytest.approx(2)
    assert brier(torch.zeros(k, k), labels).item() == pytest.approx(1 - 1 / k)


@pytest.mark.parametrize(("favour", "doubt"), [(0.0, 0.0), (0.0, 3.0), (2.5, 0.0), (4.0, 2.0)])
def test_it_finds_what_the_answers_were_made_with(favour, doubt):
    """Labels drawn from probabilities that favour and doubt make right."""
    draw = torch.Generator().manual_seed(0)
    answers = []
    for _ in range(40):
        newness = torch.rand(6, generator=draw).double() * (torch.rand(6, generator=draw) < 0.5)
        logits = 4 * torch.randn(1000, 6, generator=draw, dtype=torch.double)
        right = (logits + favour * newness) / (1 + doubt * newness.mean())
        labels = torch.multinomial(right.softmax(1), 1, generator=draw).squeeze(1)
        answers.append(Answers(logits=logits, labels=labels, newness=newness))
    assert fit(answers) == pytest.approx((favour, doubt), abs=0.2)


def test_a_score_is_that_of_a_generator_with_such_a_prompt(run, generator):
    tasks = run.space.sample_unseen(np.random.default_rng(0), 3, 2)
    plain = answer(generator, run.dataset, run.store, tasks)
    mended = answer(generator.with_prompt(favour=2.0, doubt=1.5), run.dataset, run.store, tasks)
    for before, after in zip(plain, mended, strict=True):
        found = before.score(torch.tensor(2.0), torch.tensor(1.5))
        assert brier(after.logits, after.labels).item() == pytest.approx(found.item(), abs=1e-6)
        assert found != brier(before.logits, before.labels)


def test_fitted_is_better_than_none_and_does_not_depend_on_what_was(run, generator):
    fitted = calibrate(generator, run.dataset, run.store, run.space)
    prompt = fitted.config.prompt
    assert prompt.favour + prompt.doubt > 0
    other = generator.with_prompt(favour=9.0, doubt=9.0)
    assert calibrate(other, run.dataset, run.store, run.space).config == fitted.config
    tasks = run.space.sample_unseen(np.random.default_rng(1), 40, 1)
    before, after = (
        torch.stack(
            [brier(a.logits, a.labels) for a in answer(g, run.dataset, run.store, tasks)]
        ).mean()
        for g in (generator, fitted)
    )
    assert after < before
    assert fitted.denoiser is generator.denoiser


def test_without_excluded_classes_nothing_is_fitted(tiny_run, tiny_generator):
    found = calibrate(tiny_generator, tiny_run.dataset, tiny_run.store, tiny_run.space)
    assert (found.config.prompt.favour, found.config.prompt.doubt) == (0.0, 0.0)


def test_a_configuration_may_name_one_and_leave_the_other(run):
    fitted = replace(run.config.prompt, favour=1.0, doubt=2.0)
    assert run.config.prompt.settled(fitted) == fitted
    named = replace(run.config.prompt, doubt=0.0)
    assert named.settled(fitted) == replace(fitted, doubt=0.0)
    assert fitted.settled(named) == fitted
