"""Families as pure functions of theta, and their trunks."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.conftest import tiny_config
from tests.families import CLASSES, family_of, pictures, random, theta_of
from tina.baselines import clip_zero_shot
from tina.checkpoint import attach_clip, save_generator
from tina.classifiers import Classifier
from tina.config import ClassifierConfig, PromptConfig, RecipeConfig
from tina.encoders import EmbeddingSpace
from tina.errors import CheckpointError, ConfigError
from tina.export import export_graph
from tina.families import FAMILIES, ClipImageTrunk, Family, Head, VitB32Head, build_family
from tina.generic import save_generic, train_generic
from tina.images import resize
from tina.jobconfig import DataConfig
from tina.model import load_classifier
from tina.pipeline import TinaPipeline
from tina.run import Run

CNNS = ("cnn5k", "cnn15k", "cnn33k", "cnn70k")

# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cnn5k", 5_370),
        ("cnn15k", 14_586),
        ("cnn33k", 33_338),
        ("cnn70k", 70_202),
        ("resnet20_head", 650),
        ("efficientnet_lite0_head", 2_570),
        ("vitb32_head", 5_130),
    ],
)
def test_parameter_counts(name, count):
    family = build_family(name, channels=3, image_size=32)
    assert family.layout(10).size == count
    module = family.module(10)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


def test_resnet20_has_272474_parameters_in_all():
    family = build_family("resnet20_head", channels=3, image_size=32)
    trunk = sum(parameter.numel() for parameter in family.new_trunk().parameters())
    assert trunk + family.layout(10).size == 272_474
    assert family.layout(10).body == ()


@pytest.mark.parametrize(
    ("name", "body"), [("cnn5k", 4_752), ("cnn15k", 13_968), ("cnn33k", 32_400)]
)
def test_a_gray_image_has_fewer_parameters(name, body):
    assert build_family(name, channels=1, image_size=8).layout(2).body_size == body


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ConfigError, match=f"'cnn6k'; known: {', '.join(FAMILIES)}"):
        build_family("cnn6k", channels=3, image_size=32)


# --- functions of theta ---------------------------------------------------------------------------


def test_logits_equal_the_module_with_the_same_weights(family):
    theta, inputs = theta_of(family), family.embed(pictures(6, 1, 8, 8))
    module = family.module(CLASSES)
    module.load_state_dict(family.layout(CLASSES).unflatten(theta))
    with torch.no_grad():
        assert torch.equal(family.logits(theta, inputs, num_classes=CLASSES), module(inputs))


def test_permuting_the_heads_rows_permutes_the_logits(family):
    theta, inputs = theta_of(family), family.embed(pictures(6, 1, 8, 8))
    layout, order = family.layout(CLASSES), torch.tensor([3, 0, 4, 1, 2])
    body, rows = layout.split(theta)
    logits = family.logits(theta, inputs, num_classes=CLASSES)
    assert logits.std(1).min() > 0
    permuted = family.logits(layout.join(body, rows[order]), inputs, num_classes=CLASSES)
    torch.testing.assert_close(permuted, logits[:, order])


def test_scaling_the_heads_rows_scales_the_logits(family):
    """What `Generator.temperature` relies on."""
    theta, inputs = theta_of(family), family.embed(pictures(6, 1, 8, 8))
    layout = family.layout(CLASSES)
    body, rows = layout.split(theta)
    logits = family.logits(theta, inputs, num_classes=CLASSES)
    scaled = family.logits(layout.join(body, rows / 3), inputs, num_classes=CLASSES)
    torch.testing.assert_close(3 * scaled, logits)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CNNS), st.data())
def test_permuting_hidden_units_leaves_the_logits_unchanged(name, data):
    family = family_of(name)
    tensors = dict(family.layout(CLASSES).unflatten(theta_of(family)))
    depth = len(family.widths)
    layer = data.draw(st.integers(0, depth - 1))
    order = torch.tensor(data.draw(st.permutations(range(family.widths[layer]))))
    reader = "fc.weight" if layer == depth - 1 else f"convs.{layer + 1}.weight"
    changed = tensors | {
        f"convs.{layer}.weight": tensors[f"convs.{layer}.weight"][order],
        reader: tensors[reader][:, order],
    }
    inputs = family.embed(pictures(4, 1, 8, 8))
    before, after = (
        family.logits(family.layout(CLASSES).flatten(named), inputs, num_classes=CLASSES)
        for named in (tensors, changed)
    )
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_logits_are_differentiable_in_every_value_of_theta(family):
    theta = theta_of(family).requires_grad_()
    inputs = family.embed(pictures(32, 1, 8, 8))
    loss = F.cross_entropy(
        family.logits(theta, inputs, num_classes=CLASSES), torch.arange(32) % CLASSES
    )
    loss.backward()
    for slot in family.layout(CLASSES).slots:
        assert theta.grad[slot.offset : slot.offset + slot.numel].abs().max() > 0, slot.name


def test_threads_do_not_compute_with_each_others_theta():
    family, images = family_of("cnn5k"), pictures(64, 1, 8, 8) / 255
    thetas = [theta_of(family, seed=seed) for seed in range(4)]
    want = [family.logits(theta, images, num_classes=CLASSES) for theta in thetas]
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(family.logits, thetas[i % 4], images, num_classes=CLASSES)
            for i in range(200)
        ]
        for i, found in enumerate(asked):
            assert torch.equal(found.result(), want[i % 4])


# --- what goes in ---------------------------------------------------------------------------------


def test_bytes_and_fractions_are_the_same_image(family):
    images = pictures(4, 1, 8, 8)
    torch.testing.assert_close(family.embed(images / 255), family.embed(images))


def test_pixels_are_scaled_to_plus_and_minus_one():
    family = family_of("cnn5k")
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    torch.testing.assert_close(family.embed(images).flatten(), torch.tensor([-1.0, -0.6, 1.0]))


# --- trunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20_head", "efficientnet_lite0_head", "vitb32_head"])
def test_without_its_trunk_a_family_says_so(name):
    family = build_family(name, channels=3, image_size=32)
    with pytest.raises(CheckpointError, match=f"{name} has no trunk yet"):
        family.embed(pictures(1, 3, 32, 32))


def test_an_attached_trunk_is_frozen_and_treats_images_one_by_one():
    family = family_of("resnet20_head")
    assert not family.trunk.training
    assert not any(parameter.requires_grad for parameter in family.trunk.parameters())
    images = pictures(5, 1, 8, 8)
    alone = torch.cat([family.embed(image[None]) for image in images])
    assert alone.std(0).max() > 0
    torch.testing.assert_close(family.embed(images), alone, atol=1e-5, rtol=1e-4)


def test_clip_features_have_values_of_about_one():
    seen = []
    matrix = random(3 * 16, 40)

    def encode(x):
        seen.append(x)
        return x.flatten(1) @ matrix

    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    features = ClipImageTrunk(encode)(images * 2 - 1)
    torch.testing.assert_close(seen[0], images)  # an encoder takes images in [0, 1]
    torch.testing.assert_close(features.norm(dim=1), torch.full((7,), math.sqrt(40)))
    expected = F.normalize(images.flatten(1) @ matrix, dim=1) * math.sqrt(40)
    torch.testing.assert_close(features, expected)


def test_vitb32_reads_an_open_clip_image_tower(tmp_path, monkeypatch):
    import open_clip

    config = {
        "embed_dim": 512,
        "vision_cfg": {
            "image_size": 224,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 32,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-512.json").write_text(json.dumps(config))
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    open_clip.add_model_config(tmp_path / "tiny-512.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(open_clip.create_model("tiny-512").state_dict(), tmp_path / "tiny.safetensors")
    prompt = PromptConfig(
        encoder="open_clip", model="tiny-512", weights=str(tmp_path / "tiny.safetensors")
    )
    family = build_family("vitb32_head", channels=1, image_size=16)
    attach_clip(family, prompt)
    images = pictures(3, 1, 16, 16)
    features = family.embed(images)
    assert features.shape == (3, 512)
    torch.testing.assert_close(features.square().mean(1), torch.ones(3))
    assert (features[0] - features[1]).abs().max() > 0.01

    clip = open_clip.create_model("tiny-512", pretrained=str(tmp_path / "tiny.safetensors")).eval()
    mean, std = (
        torch.tensor(x).view(3, 1, 1)
        for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    large = resize(images.expand(-1, 3, -1, -1) / 255, 224, mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        own = clip.encode_image((large - mean) / std, normalize=True)
    torch.testing.assert_close(features, own * 512**0.5, atol=1e-4, rtol=1e-3)

    theta = theta_of(family)
    classifier = Classifier(family, theta, tuple("abcde"))
    expected = family.logits(theta, features, num_classes=CLASSES)
    torch.testing.assert_close(classifier(images / 255), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(CheckpointError, match="cannot be exported"):
        export_graph(family)
    other = EmbeddingSpace(model="another CLIP", dim=512, template="{}")
    with pytest.raises(CheckpointError, match=r"trunk is CLIP of .*another CLIP"):
        attach_clip(family, prompt, space=other)

    class Wider(VitB32Head):
        def module(self, num_classes):
            return Head(768, num_classes)

    with pytest.raises(ConfigError, match=r"wider takes 768 values of CLIP's, .* gives 512: "):
        attach_clip(Wider("wider", channels=1, image_size=16), prompt)


class Pooled(Family):
    """All that a second family with a trained trunk needs, beside its entry."""

    trains_trunk = True

    def module(self, num_classes):
        return Head(4, num_classes)

    def new_trunk(self):
        convolution = nn.Conv2d(self.channels, 4, 3, stride=2)
        return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_another_family_that_trains_a_trunk_is_one_class_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "pooled", Pooled)
    run = Run(tiny_config(tmp_path, classifier=ClassifierConfig(family="pooled")))
    trained = train_generic(run.family, run.dataset, run.space.seen, RecipeConfig(steps=2), seed=0)
    save_generic(run.generic_file, trained, run.family, run.dataset)
    generator = Run(run.config).new_generator()
    save_generator(generator, tmp_path / "checkpoint", card="card")
    model = TinaPipeline.from_pretrained(tmp_path / "checkpoint")(["one", "two"])
    model.save(tmp_path / "model.safetensors")

    images = pictures(3, 1, 8, 8)
    want = run.family.embed(images)
    assert want.std() > 0
    for family in (generator.family, model.family):
        assert torch.equal(family.embed(images), want)
    found = load_classifier(tmp_path / "model.safetensors")(images)
    assert torch.equal(found, family.logits(model.theta, want, num_classes=2))


@pytest.mark.parametrize(
    ("family", "side"), [("cnn5k", 64), ("resnet20_head", 64), ("efficientnet_lite0_head", 90)]
)
def test_photographs_are_kept_as_large_as_a_runs_family_sees_them(tmp_path, family, side):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (120, 90)).save(tmp_path / name / f"{i}.png")
    data = DataConfig(name="folder", root=str(tmp_path))
    config = replace(tiny_config(tmp_path), data=data, classifier=ClassifierConfig(family=family))
    assert Run(config).all_views.images.shape[2:] == (side, side)


def test_clip_zero_shot_is_a_hundred_times_the_cosine():
    family = family_of("vitb32_head")
    names = F.normalize(random(9, 512), dim=1)
    generator = SimpleNamespace(
        vocabulary=SimpleNamespace(embeddings=names), generic=SimpleNamespace(body=torch.empty(0))
    )
    ids, images = (4, 0, 7), pictures(6, 1, 8, 8)
    body, rows = clip_zero_shot(generator)(SimpleNamespace(class_ids=ids))
    logits = family.logits(family.layout(3).join(body, rows), family.embed(images), num_classes=3)
    cosines = F.normalize(family.embed(images), dim=1) @ names[list(ids)].T
    torch.testing.assert_close(logits, 100 * cosines, rtol=1e-4, atol=1e-3)
