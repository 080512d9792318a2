"""Views of images: each is where it should be, and each is the image moved or mirrored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tina.config import RecipeConfig
from tina.datasets import load_dataset
from tina.errors import ConfigError
from tina.families import build_family
from tina.finetune import Lesson, finetune, initial_theta
from tina.generic import train_generic
from tina.inputs import InputStore
from tina.jobconfig import DataConfig
from tina.views import SMALL, Views

IMAGES = torch.randint(256, (3, 2, 5, 6), dtype=torch.uint8, generator=torch.manual_seed(0))


def reflected(i, size):
    """Where a row or column beyond the edge is read from."""
    return abs(i) if i < size else 2 * (size - 1) - i


def moved(image, down, right):
    """An image (C, H, W) moved, pixel by pixel, its edge mirrored."""
    out = torch.empty_like(image)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            out[:, y, x] = image[:, reflected(y - down, height), reflected(x - right, width)]
    return out


@given(mirror=st.booleans(), shift=st.integers(0, 2))
def test_the_views_of_an_image_are_all_its_shifts_and_their_mirror_images(mirror, shift):
    views = Views(images=IMAGES, mirror=mirror, shift=shift)
    assert len(views) == views.count * len(IMAGES)
    around = range(-shift, shift + 1)
    for i, image in enumerate(IMAGES):
        expected = {moved(image, down, right) for down in around for right in around}
        if mirror:
            expected |= {x.flip(-1) for x in expected}
        found = views[i + len(IMAGES) * torch.arange(views.count)]
        assert {x.numpy().tobytes() for x in found} == {x.numpy().tobytes() for x in expected}
        assert len({x.numpy().tobytes() for x in expected}) == views.count


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_first_view_is_the_image(mirror, shift):
    views = Views(images=IMAGES, mirror=mirror, shift=shift)
    assert torch.equal(views[torch.arange(3)], IMAGES)


def test_places_may_have_any_shape_and_batches_suit_convolutions():
    views = Views(images=IMAGES, mirror=True, shift=1)
    places = torch.arange(len(views)).view(2, 3, 9)
    found = views[places]
    assert found.shape == (2, 3, 9, *IMAGES.shape[1:])
    flat = views[places.flatten()]
    assert torch.equal(found.flatten(0, 2), flat)
    assert flat.is_contiguous(memory_format=torch.channels_last)
    before = IMAGES.clone()
    flat.zero_()
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("side", [SMALL, SMALL + 1])
def test_large_images_are_not_copied_as_a_whole(side):
    images = torch.arange(3 * side * side).remainder(251).byte().view(1, 3, side, side)
    views = Views(images=images, mirror=True)
    assert torch.equal(views[torch.arange(2)], torch.cat([images, images.flip(-1)]))
    assert (views._windows.data_ptr() == images.data_ptr()) == (side > SMALL)


def test_training_gets_every_view_and_nothing_else_does():
    plain, more = load_dataset(DataConfig()), load_dataset(DataConfig(shift=1))
    for key in ("select", "report"):
        assert torch.equal(more.indices(key), plain.indices(key))
    fit, n = more.indices("fit"), len(plain.images)
    assert len(fit) == 9 * len(plain.indices("fit"))
    assert set((fit % n).tolist()) == set(plain.indices("fit").tolist())
    assert torch.equal(more.labels[fit], plain.labels[fit % n])
    assert more.fingerprint != plain.fingerprint


@pytest.mark.parametrize("mirror", [False, True])
def test_without_its_moved_views_a_data_set_is_as_if_none_had_been_asked_for(mirror):
    plain = load_dataset(DataConfig(mirror=mirror))
    found = load_dataset(DataConfig(mirror=mirror, shift=1)).unmoved()
    assert torch.equal(found.labels, plain.labels)
    for key in ("fit", "select", "report"):
        index = plain.indices(key)
        assert torch.equal(found.indices(key), index)
        assert torch.equal(found.views[index], plain.views[index])


def test_a_trunk_is_trained_on_moved_images_and_what_follows_it_is_not():
    data = load_dataset(DataConfig(shift=1))
    family, still = (build_family("resnet20_head", channels=1, image_size=8) for _ in range(2))
    recipe = RecipeConfig(steps=2, batch_size=8)
    found = train_generic(family, data, range(3), recipe, seed=0)
    other = train_generic(still, data.unmoved(), range(3), recipe, seed=0)
    shown = InputStore(family, data.unmoved().views)
    lesson = Lesson.of(data.unmoved(), range(3), seed=0)
    theta = initial_theta(family, 3, seed=0)
    (theta,) = finetune(family, [theta], [lesson], shown, recipe, stacked=False)
    assert torch.equal(found.rows, family.layout(3).split(theta)[1])
    assert not torch.equal(found.rows, other.rows)  # the trunk saw other images


def test_a_negative_shift_is_refused():
    with pytest.raises(ConfigError, match=r"data\.shift must not be negative, got -1"):
        DataConfig(shift=-1)
