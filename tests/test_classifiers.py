"""Classifiers that take photographs, and the logits of given weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import CLASSES, family_of, pictures, theta_of
from tina.classifiers import Classifier, narrow, predict, widen
from tina.errors import CheckpointError, DataError, NonFiniteError
from tina.inputs import InputStore
from tina.views import Views


def test_predict_in_batches_equals_one_pass():
    family = family_of("cnn5k")
    theta, store = theta_of(family), InputStore(family, Views(images=pictures(1100, 1, 8, 8)))
    index = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    expected = family.logits(theta, store[index], num_classes=CLASSES)
    found = predict(family, theta, store, index, num_classes=CLASSES)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(3, 9, 9), torch.zeros(1, 1, 9, 9), [0.5]])
def test_what_a_classifier_does_not_take_is_said(images):
    family = family_of("cnn5k", channels=3)
    with pytest.raises(DataError, match=r"takes tensors \(N, 3, H, W\), as tina\.images"):
        Classifier(family, theta_of(family), tuple("abcde"))(images)


def test_classifiers_take_bytes_and_numpys_doubles():
    family = family_of("cnn5k", channels=3)
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    images = pictures(2, 3, 9, 7)
    expected = classifier(images / 255)
    torch.testing.assert_close(classifier(images.double() / 255), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(classifier(images), expected, atol=0.05, rtol=0.05)  # rounded


def test_resnet20_head_end_to_end():
    family = family_of("resnet20_head", channels=3, image_size=16)
    images, theta = pictures(4, 3, 16, 16), theta_of(family)
    weight, bias = theta[: 64 * CLASSES].view(CLASSES, 64), theta[64 * CLASSES :]
    with torch.no_grad():
        expected = family.trunk((images / 255 - 0.5) / 0.5) @ weight.T + bias
    assert expected.std() > 0.01
    classifier = Classifier(family, theta, tuple("abcde"))
    torch.testing.assert_close(classifier(images / 255), expected, atol=1e-5, rtol=1e-4)
    found = predict(
        family,
        theta,
        InputStore(family, Views(images=images)),
        torch.arange(4),
        num_classes=CLASSES,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_at_its_own_size_a_classifier_is_the_familys_function(family):
    theta, images = theta_of(family), pictures(6, 1, 8, 8)
    classifier = Classifier(family, theta, tuple("abcde"))
    expected = family.logits(theta, family.embed(images), num_classes=CLASSES)
    torch.testing.assert_close(classifier(images / 255), expected, atol=1e-5, rtol=1e-4)
    assert not classifier(images / 255).requires_grad


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.25, 1.0]))
def test_a_picture_of_one_colour_has_the_same_logits_at_any_size(height, width, level):
    family = family_of("cnn5k")
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    found = classifier(torch.full((2, 1, height, width), level))
    expected = classifier(torch.full((2, 1, 8, 8), level))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_every_pixel_of_a_larger_pictures_centre_square_counts():
    family = family_of("cnn5k")
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    images = (pictures(1, 1, 64, 48) / 255).requires_grad_()
    classifier(images)[0, 0].backward()
    assert images.grad[..., 8:56, :].ne(0).all()  # antialiased: none falls between two samples
    assert images.grad.ne(0).sum() == 48 * 48


def test_a_classifier_keeps_its_own_copy_of_theta():
    family = family_of("cnn5k")
    theta, images = theta_of(family), pictures(2, 1, 8, 8) / 255
    classifier = Classifier(family, theta, tuple("abcde"))
    before = classifier(images)
    theta.zero_()
    assert torch.equal(classifier(images), before)
    assert classifier.class_names == tuple("abcde")


def test_what_is_done_to_one_classifier_does_not_reach_another():
    family = family_of("resnet20_head")
    theta, images = theta_of(family), pictures(4, 1, 8, 8) / 255
    one, other = (Classifier(family, theta, tuple("abcde")) for _ in range(2))
    before = other(images)
    one.train()(images)  # moves the trunk's running statistics
    one.double()
    assert torch.equal(other(images), before)
    assert torch.equal(Classifier(family, theta, tuple("abcde"))(images), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_theta_that_is_not_finite_is_refused(value):
    family = family_of("cnn5k")
    theta = theta_of(family)
    theta[7] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Classifier(family, theta, tuple("abcde"))


def test_theta_for_another_number_of_classes_is_refused():
    family = family_of("cnn5k")
    with pytest.raises(CheckpointError, match="theta must have shape"):
        Classifier(family, theta_of(family), tuple("abcd"))


def test_to_widen_is_to_add_rows_of_zeros_and_to_narrow_undoes_it(family):
    theta, inputs = theta_of(family, classes=2), family.embed(pictures(4, 1, 8, 8))
    wide = widen(family, theta, 2, CLASSES)
    logits = family.logits(wide, inputs, num_classes=CLASSES)
    torch.testing.assert_close(logits[:, :2], family.logits(theta, inputs, num_classes=2))
    assert not logits[:, 2:].any()
    assert not family.layout(CLASSES).split(wide)[1][2:].any()
    assert torch.equal(narrow(family, wide, 2, CLASSES), theta)
    assert torch.equal(widen(family, theta, 2, 2), theta)
