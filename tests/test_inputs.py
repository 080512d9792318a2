"""Stores of inputs: what a family embeds, once."""

import torch

from tests.families import pictures
from tina.families import ClipImageTrunk, build_family
from tina.inputs import InputStore
from tina.views import Views


def test_a_store_gives_what_embed_gives(family):
    images = pictures(300, 1, 8, 8)  # more than one batch of the trunk
    store, index = (
        InputStore(family, Views(images=images)),
        torch.tensor([[299, 0, 7], [7, 255, 256]]),
    )
    expected = family.embed(images[index.flatten()]).unflatten(0, (2, 3))
    torch.testing.assert_close(store[index], expected, atol=1e-5, rtol=1e-4)
    assert store[index].dtype == torch.float32


def test_a_trunk_sees_every_image_once_and_never_again():
    calls = []

    def encode(x):
        calls.append(len(x))
        return x.flatten(1).repeat(1, 8)

    family = build_family("vitb32_head", channels=1, image_size=8)
    family.attach_trunk(ClipImageTrunk(encode))
    store = InputStore(family, Views(images=pictures(300, 1, 8, 8)))
    assert sum(calls) == 300
    assert store[torch.arange(20)].shape == (20, 512)
    assert sum(calls) == 300
