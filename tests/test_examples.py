"""Examples beside a prompt's words: the rows of new classes, and theirs alone, learn from them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import kept_out
from tina.errors import NonFiniteError, PromptError
from tina.examples import covariance_factor, features, learn_from, posterior_mode
from tina.families import build_family
from tina.pipeline import TinaPipeline

TASK = ["zero", "seven", "four"]


@pytest.fixture(scope="module")
def generator(tiny_generator):
    """Of which "seven", "eight" and "nine" were kept out of all training."""
    return kept_out(tiny_generator, ["seven", "eight", "nine"])


@pytest.fixture(scope="module")
def pipe(generator):
    return TinaPipeline(generator, checkpoint="x")


@pytest.fixture(scope="module")
def pictures(tiny_run):
    """Pictures of the classes of TASK, (N, 1, 8, 8) in [0, 1] each."""

    def of(partition, count):
        data = tiny_run.dataset
        found = [data.indices(partition, (c,))[:count] for c in (0, 7, 4)]
        return [data.images[index].float() / 255 for index in found]

    return of


def embedded(pipe, pictures):
    return [pipe.generator.family.embed(images) for images in pictures]


def rows_of(generator, theta, count=3):
    return generator.family.layout(count).split(theta)[1]


@pytest.mark.parametrize("name", ["cnn5k", "cnn33k", "resnet20_head"])
def test_features_are_what_a_row_is_multiplied_by(name):
    family = build_family(name, channels=3, image_size=16)
    if family.has_trunk:
        family.attach_trunk(family.new_trunk())
    layout = family.layout(4)
    theta = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)) / 8
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    body, rows = layout.split(theta)
    expected = family.logits(theta, family.embed(images), num_classes=4)
    torch.testing.assert_close(features(family, body, family.embed(images)) @ rows.T, expected)


def test_the_spread_is_what_left_out_classes_miss(generator, monkeypatch):
    monkeypatch.setattr("tina.examples.EVEN", 1e-4)
    vocabulary, rows = generator.vocabulary, generator.generic.rows
    names = vocabulary.embeddings[vocabulary.trained]
    total, missing = torch.zeros(rows.shape[1], rows.shape[1]), 0.0
    for i in range(len(rows)):
        rest = torch.arange(len(rows)) != i
        hidden = ~rest
        mixture = vocabulary.attention(names[i], hidden)
        assert mixture[i] == 0
        miss = rows[i] - mixture[rest] @ rows[rest]
        total += torch.outer(miss, miss)
        missing += 1 - float(vocabulary.familiarity(names[i], hidden))
    factor = covariance_factor(generator)
    torch.testing.assert_close(factor @ factor.T, total / missing, rtol=1e-2, atol=1e-3)


def posterior(seen, labels, rows, newness, factor, found, *, prior):
    """Of the rows found, its negative logarithm but for a constant; by the prior's covariance."""
    precision = torch.linalg.inv((factor @ factor.T).double())
    moved = (found - rows).double()
    penalty = ((moved @ precision) * moved).sum(1)[newness > 0] / newness[newness > 0]
    misfit = F.cross_entropy(seen.double() @ found.double().T, labels, reduction="sum")
    return misfit + prior / 2 * penalty.sum()


@pytest.mark.parametrize("prior", [0.3, 2.0])
def test_rows_settle_where_the_posterior_is_highest(prior):
    draw = torch.Generator().manual_seed(0)
    seen = F.pad(torch.randn(12, 4, generator=draw), (0, 1), value=1.0)
    labels, rows = torch.arange(12) % 3, torch.randn(3, 5, generator=draw)
    newness = torch.tensor([0.0, 0.4, 0.9])
    factor = torch.linalg.cholesky(torch.cov(torch.randn(5, 40, generator=draw)))
    known = (seen, labels, rows, newness, factor)
    found = posterior_mode(*known, prior=prior)
    assert torch.equal(found[0], rows[0])
    at = found.double().requires_grad_(True)
    (slope,) = torch.autograd.grad(posterior(*known, at, prior=prior), at)
    start = rows.double().requires_grad_(True)
    (steep,) = torch.autograd.grad(posterior(*known, start, prior=prior), start)
    assert slope[1:].norm() < 1e-4 * steep[1:].norm()


def familiarity(pipe, names):
    return pipe.generator.vocabulary.familiarity(pipe.embed_names(names))


def test_only_new_classes_learn_and_the_order_of_pictures_does_not_matter(pipe, pictures):
    generator, shown = pipe.generator, pictures("fit", 4)
    before = pipe(TASK)
    after = pipe(TASK, examples=shown)
    old, new = (rows_of(generator, model.theta) for model in (before, after))
    assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert (old[1] - new[1]).norm() > 1e-2 * old[1].norm()
    again = pipe(TASK, examples=[images.flip(0) for images in shown])
    torch.testing.assert_close(again.theta, after.theta, rtol=0, atol=1e-3)
    known = ["zero", "five", "four"]
    assert torch.equal(pipe(known, examples=shown).theta, pipe(known).theta)


def test_a_class_of_several_words_learns_where_one_is_new(pipe, pictures):
    words, shown = [None, [TASK[1], "nine"], ["four", "six"]], pictures("fit", 4)
    before = pipe(TASK, descriptions=words)
    after = pipe(TASK, descriptions=words, examples=shown)
    old, new = (rows_of(pipe.generator, model.theta) for model in (before, after))
    assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert (old[1] - new[1]).norm() > 1e-2 * old[1].norm()


def test_a_configured_prior_holds_what_the_names_give(pipe, pictures):
    """The heavier it is, the less pictures move."""
    plain, task = pipe.generator, pipe(TASK).theta
    moved = []
    for prior in (0.1, plain.config.prompt.prior, 10.0):
        generator = plain.with_prompt(prior=prior)
        after = learn_from(
            generator, task, familiarity(pipe, TASK), embedded(pipe, pictures("fit", 4))
        )
        moved.append(float((after - task).norm()))
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2] > 0


def test_a_class_without_examples_is_no_answer(pipe, pictures):
    """What the others learn is what they learn where it is not in the task."""
    shown = pictures("fit", 4)
    before, after = pipe(TASK).theta, pipe(TASK, examples=[None, *shown[1:]]).theta
    body, rows = pipe.generator.family.layout(3).split(before)
    learnt = rows_of(pipe.generator, after)
    assert torch.equal(learnt[0], rows[0])
    alone = learn_from(
        pipe.generator,
        pipe.generator.theta(body, rows[1:]),
        familiarity(pipe, TASK[1:]),
        embedded(pipe, shown[1:]),
    )
    torch.testing.assert_close(learnt[1:], rows_of(pipe.generator, alone, 2), atol=1e-5, rtol=0)
    assert (learnt[1] - rows[1]).norm() > 1e-2 * rows[1].norm()
    assert torch.equal(pipe(TASK, examples=[[], *shown[1:]]).theta, after)
    of_known = [shown[0], None, shown[2]]
    assert torch.equal(pipe(TASK, examples=of_known).theta, before)


def test_a_class_that_is_new_is_recognised_better(pipe, pictures):
    held = pictures("select", 100)
    labels = torch.arange(3).repeat_interleave(torch.tensor([len(images) for images in held]))
    images = torch.cat(held)

    def loss(model):
        with torch.no_grad():
            return float(F.cross_entropy(model.classifier(images), labels))

    assert loss(pipe(TASK, examples=pictures("fit", 8))) < loss(pipe(TASK)) - 0.05


def test_a_word_that_resembles_nothing_learns_too(pipe, pictures):
    draw = torch.Generator().manual_seed(0)
    width = pipe.generator.vocabulary.embeddings.shape[1]
    word = F.normalize(torch.randn(1, width, generator=draw), dim=1)
    vocabulary = pipe.generator.vocabulary.with_words(["thing"], word)
    asked = torch.stack([vocabulary.lookup(n) for n in ("zero", "thing", "four")])
    theta = pipe(TASK).theta
    generator = replace(pipe.generator, vocabulary=vocabulary)
    shown = embedded(pipe, pictures("fit", 4))
    found = learn_from(generator, theta, vocabulary.familiarity(asked), shown)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, theta)


def test_pictures_may_be_bytes_of_some_classes_and_numbers_of_others(pipe, pictures):
    generator, shown = pipe.generator, pictures("fit", 4)
    known, theta = familiarity(pipe, TASK), pipe(TASK).theta
    mixed = [(255 * images).round().byte() if i else images for i, images in enumerate(shown)]
    found = learn_from(generator, theta, known, embedded(pipe, mixed))
    expected = learn_from(generator, theta, known, embedded(pipe, shown))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_what_changes_nothing_is_not_looked_at(pipe, pictures, monkeypatch):
    """Where no class that has examples is new, a large trunk would see them for nothing."""
    shown = pictures("fit", 4)
    monkeypatch.setattr(type(pipe.generator.family), "embed", None)
    pipe(TASK, examples=[shown[0], None, shown[2]])
    with pytest.raises(TypeError, match="NoneType"):
        pipe(TASK, examples=shown)


def test_examples_are_learnt_from_in_inference_mode(pipe, pictures):
    expected = pipe(TASK, examples=pictures("fit", 4))
    with torch.inference_mode():
        found = pipe(TASK, examples=pictures("fit", 4))
    torch.testing.assert_close(found.theta, expected.theta, atol=1e-4, rtol=0)


def test_rows_that_are_no_numbers_are_not_returned(pipe, pictures):
    body, rows = pipe.generator.family.layout(3).split(pipe(TASK).theta)
    theta = pipe.generator.theta(body, torch.full_like(rows, torch.nan))
    with pytest.raises(NonFiniteError, match="examples led to NaN"):
        learn_from(
            pipe.generator, theta, familiarity(pipe, TASK), embedded(pipe, pictures("fit", 2))
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"examples": [torch.rand(1, 1, 8, 8)] * 2}, "3 classes need as many examples, got 2"),
        ({"examples": [torch.rand(1, 1, 8, 8), [], None]}, "of two classes at least"),
        ({"examples": [None] * 3}, "of two classes at least"),
        ({"examples": [torch.rand(1, 3, 8, 8)] * 3}, "must have C = 1"),
        ({"examples": dict.fromkeys(TASK)}, "examples are a list, in the order of the classes"),
        (
            {"examples": [torch.rand(1, 1, 8, 8)] * 3, "images": [torch.rand(1, 1, 8, 8)] * 3},
            "images stand alone",
        ),
    ],
)
def test_examples_that_are_none(pipe, options, reason):
    with pytest.raises(PromptError, match=reason):
        pipe(TASK, **options)


def test_examples_go_with_one_task(pipe):
    with pytest.raises(PromptError, match="not with a batch"):
        pipe([TASK, TASK], examples=[torch.rand(1, 1, 8, 8)] * 3)
