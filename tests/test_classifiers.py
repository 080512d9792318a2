"""Families as pure functions of theta, classifiers that take photographs, stores of inputs."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tina.baselines import clip_zero_shot
from tina.checkpoint import attach_trunk
from tina.classifiers import (
    FAMILIES,
    Classifier,
    ClipImageTrunk,
    InputStore,
    build_family,
    predict,
)
from tina.config import ClassifierConfig, GeneratorConfig, PromptConfig
from tina.encoders import EmbeddingSpace
from tina.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from tina.export import export_graph
from tina.views import Views

CNNS = ("cnn5k", "cnn15k", "cnn33k", "cnn70k")
CLASSES = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def family_of(name, *, channels=1, image_size=8):
    """A family that is ready to use; its trunk, if it needs one, is random."""
    family = build_family(name, channels=channels, image_size=image_size)
    if name == "resnet20_head":
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
    if name == "vitb32_head":
        matrix = random(channels * image_size**2, 512)
        family.attach_trunk(ClipImageTrunk(lambda x: x.flatten(1) @ matrix))
    return family


def theta_of(family, *, classes=CLASSES, seed=0):
    return random(family.layout(classes).size, seed=seed) * 0.2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return family_of(request.param)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cnn5k", 5_370),
        ("cnn15k", 14_586),
        ("cnn33k", 33_338),
        ("cnn70k", 70_202),
        ("resnet20_head", 650),
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


def test_predict_in_batches_equals_one_pass():
    family = family_of("cnn5k")
    theta, store = theta_of(family), InputStore(family, Views(images=pictures(1100, 1, 8, 8)))
    index = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    expected = family.logits(theta, store[index], num_classes=CLASSES)
    found = predict(family, theta, store, index, num_classes=CLASSES)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# --- trunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20_head", "vitb32_head"])
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
            "image_size": 16,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
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
    settings = GeneratorConfig(classifier=ClassifierConfig(family="vitb32_head"), prompt=prompt)

    family = build_family("vitb32_head", channels=1, image_size=16)
    attach_trunk(family, settings, tmp_path)
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
    with torch.no_grad():
        own = clip.encode_image((images.expand(-1, 3, -1, -1) / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(features, own * 512**0.5, atol=1e-4, rtol=1e-3)

    theta = theta_of(family)
    classifier = Classifier(family, theta, tuple("abcde"))
    expected = family.logits(theta, features, num_classes=CLASSES)
    torch.testing.assert_close(classifier(images / 255), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(CheckpointError, match="cannot be exported"):
        export_graph(family)
    other = EmbeddingSpace(model="another CLIP", dim=512, template="{}")
    with pytest.raises(CheckpointError, match=r"trunk is CLIP of .*another CLIP"):
        attach_trunk(family, settings, tmp_path, space=other)

    family.features = 768
    with pytest.raises(ConfigError, match=r"768 values of CLIP's, .* gives 512: "):
        attach_trunk(family, settings, tmp_path)


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


# --- classifiers ----------------------------------------------------------------------------------


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


# --- inputs ---------------------------------------------------------------------------------------


def test_bytes_and_fractions_are_the_same_image(family):
    images = pictures(4, 1, 8, 8)
    torch.testing.assert_close(family.embed(images / 255), family.embed(images))


def test_pixels_are_scaled_to_plus_and_minus_one():
    family = family_of("cnn5k")
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    torch.testing.assert_close(family.embed(images).flatten(), torch.tensor([-1.0, -0.6, 1.0]))


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
