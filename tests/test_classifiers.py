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
    one.trunk.train()(images)  # moves its running statistics
    one.double()
    assert torch.equal(other(images), before)
    assert torch.equal(Classifier(family, theta, tuple("abcde"))(images), before)


def test_what_is_saved_of_a_trained_head_goes_with_the_familys_trunk():
    """Else the statistics of the trunk here would have moved, and those in the file not."""
    family = family_of("resnet20_head")
    images = pictures(4, 1, 8, 8) / 255
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    before = classifier(images)
    classifier.train()(images)
    assert classifier.network.training
    assert torch.equal(classifier.eval()(images), before)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_it_may_be_of_another_precision_than_its_images(family, change):
    images = pictures(2, family.channels, 8, 8)
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    want = classifier(images)
    for same in (images, images / 255, (images / 255).half(), (images / 255).double()):
        torch.testing.assert_close(classifier(same), want, atol=0.02, rtol=0.02)
    if family.on_clip:  # its stand-in here is no module, and stays what it is
        return
    found = getattr(classifier, change)()(images)
    torch.testing.assert_close(found.float(), want, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_other_numbers_are_no_images(family, dtype):
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    with pytest.raises(DataError, match=f"got {str(dtype)[6:]}"):
        classifier(pictures(2, family.channels, 8, 8).to(dtype))


def test_images_of_no_pixels_are_refused(family):
    classifier = Classifier(family, theta_of(family), tuple("abcde"))
    with pytest.raises(DataError, match="images of 0 x 8 pixels"):
        classifier(torch.rand(2, family.channels, 0, 8))


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
