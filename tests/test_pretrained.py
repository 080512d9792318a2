"""The checkpoints that come with the package: whole, small, and what their cards say."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_encoders import TINY

from tina import TinaPipeline, load_classifier
from tina.cli import main
from tina.encoders import EmbeddingSpace, OpenClipEncoder
from tina.errors import CheckpointError, ConfigError, NonFiniteError, PromptError
from tina.names import split_sentence
from tina.packaged import PRETRAINED, pretrained
from tina.report import markdown

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_they_are_small():
    assert pretrained()
    size = sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file())
    assert size <= 20e6


@pytest.mark.parametrize("name", pretrained())
def test_one_is_loaded_by_its_name_and_generates(name):
    pipe = TinaPipeline.from_pretrained(name)
    words = [
        word
        for word, trained in zip(
            pipe.generator.vocabulary.names, pipe.generator.vocabulary.trained, strict=True
        )
        if trained
    ]
    model = pipe(words[:3], seed=0)
    assert model.familiarity == pytest.approx((1, 1, 1), abs=1e-5)
    family = pipe.generator.family
    images = torch.rand(4, family.channels, family.image_size, family.image_size)
    assert model.classifier(images).shape == (4, 3)


def test_examples_of_any_contrast_are_learnt_from(tmp_path, monkeypatch, capsys):
    """At the command line; where a trunk enlarges them, black and white overshoot."""
    monkeypatch.chdir(tmp_path)
    words = ["generate", "ferry", "stapler", "--checkpoint", "tina-cifar100-efficientnet-head"]
    shots = []
    for name, colour in (("ferry", 0), ("stapler", 255)):
        image = Image.new("RGB", (60, 40), (colour,) * 3)
        image.paste((255 - colour,) * 3, (20, 10, 40, 30))
        image.save(f"{name}.png")
        shots += ["--example", f"{name}={name}.png"]
    assert main([*words, *shots, "--out", "shown.safetensors"]) == 0
    assert main([*words, "--out", "plain.safetensors"]) == 0
    shown, plain = (load_classifier(f"{name}.safetensors") for name in ("shown", "plain"))
    assert not torch.equal(shown.network.fc.weight, plain.network.fc.weight)
    assert "error" not in capsys.readouterr().err


def test_it_knows_words_that_its_data_set_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("TINA_DATA", str(tmp_path))  # the table is not needed
    pipe = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
    laptop, tiger, otter = pipe(["Laptop", "tiger cat", "otter"], seed=0).familiarity
    assert laptop < tiger < otter == pytest.approx(1)
    with pytest.raises(
        PromptError, match=r"know 'lap top' \(closest: laptop\), 'zzzzzz'; .tina info"
    ):
        pipe(["otter", "lap top", "zzzzzz"])
    strangers = [c * 6 for c in "qwxyzjv"]
    with pytest.raises(PromptError, match=r"'yyyyyy', 'zzzzzz' and 2 more; .tina info"):
        pipe(["otter", *strangers])


@pytest.mark.parametrize("name", pretrained())
def test_every_word_is_itself_and_its_plural(name):
    vocabulary = TinaPipeline.from_pretrained(name).generator.vocabulary

    def found(text):
        vector = vocabulary.lookup(text)
        return None if vector is None else int((vocabulary.embeddings == vector).all(1).nonzero())

    for place, word in enumerate(vocabulary.names):
        assert found(word) == found(f"The {word}") == place, word
        plural = re.sub(r"([^aeiou])y$", r"\1ie", re.sub(r"(s|x|z|ch|sh)$", r"\1e", word)) + "s"
        if plural not in vocabulary.names and not word.endswith(")"):  # "sandals", "bat (animal)"
            assert found(plural) == place, plural
        if not re.search(" (and|or|&) ", word):
            assert split_sentence(f"{word}, otter") == [word, "otter"]


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("otters and bicycles", ["otter", "bicycle"]),
        ("an otter, a bicycle and the maple tree", ["otter", "bicycle", "maple tree"]),
        ("Wolves vs. Lawn-mowers", ["wolf", "lawn mower"]),
        ("women & men / mice", ["woman", "man", "mouse"]),
        ("people, shelves", ["person", "shelf"]),
    ],
)
def test_everyday_sentences_are_understood(sentence, words):
    pipe = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
    model = pipe(sentence)
    assert model.class_names == tuple(split_sentence(sentence))  # as they were typed
    assert torch.equal(model.theta, pipe(words).theta)


@pytest.mark.parametrize("sentence", ["otter, otters", "lawn mower, lawn-mower"])
def test_two_ways_to_write_a_name_are_one_class(sentence):
    with pytest.raises(PromptError, match="are the same to the prompt encoder"):
        TinaPipeline.from_pretrained("tina-cifar100-cnn5k")(sentence)


@pytest.fixture
def clip_at_hand(tmp_path, monkeypatch):
    """open_clip, whose ViT-B-32 of OpenAI is a small random one from a file."""
    import open_clip

    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY | {"embed_dim": 512})
        tags = {"openai": {"file": str(tmp_path / "clip.safetensors"), "quick_gelu": True}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.create_model("ViT-B-32").state_dict()
    save_file(state, tmp_path / "clip.safetensors")


@pytest.mark.parametrize("name", pretrained())
def test_open_clip_encodes_what_they_do_not_know(name, clip_at_hand):
    alone = TinaPipeline.from_pretrained(name)
    both = TinaPipeline.from_pretrained(name, encoder="open_clip")
    space = alone.generator.vocabulary.space
    assert (alone.reads_text, both.reads_text) == (False, True)
    first, second = alone.generator.vocabulary.trained_names[:2]
    both([first, second])
    assert "encoder" not in vars(both)  # no word has needed it yet
    assert both.encoder.space == space
    # a known name keeps its own vector, and an unknown one has open_clip's in the same sentence
    found = both.embed_names([first, "zzzzzz"])
    assert torch.equal(found[0], alone.embed_names([first])[0])
    clip, tokens = both.encoder._clip, both.encoder._tokenizer
    sentence = space.template.replace("{}", "zzzzzz")
    with torch.no_grad():
        assert torch.equal(found[1], clip.encode_text(tokens([sentence]), normalize=True)[0])
    assert torch.equal(both([first, second], seed=1).theta, alone([first, second], seed=1).theta)
    assert both([first, "zzzzzz"]).class_names == (first, "zzzzzz")
    # pictures go by the names that the generic model takes them for, as the reports have it
    shots = [torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    assert torch.equal(both.embed_images(shots), alone.embed_images(shots))


def test_open_clip_stands_beside_them_on_the_command_line(clip_at_hand, tmp_path, capsys):
    words = ["generate", "otter", "zzzzzz", "--checkpoint", "tina-cifar100-cnn5k"]
    words += ["--out", str(tmp_path / "m.safetensors")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "does not know 'zzzzzz'; `tina info --words CHECKPOINT` lists what it knows" in said
    assert "for any other text take --encoder sentence or open_clip" in said
    assert main([*words, "--encoder", "open_clip"]) == 0
    assert "zzzzzz" in capsys.readouterr().out


def test_a_known_description_needs_no_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINA_DATA", str(tmp_path))  # there is no table
    words = ["generate", "otter, bicycle", "--description", "otter=beaver"]
    words += ["--checkpoint", "tina-cifar100-cnn5k", "--out", str(tmp_path / "m.safetensors")]
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_open_clip_has_no_model_of_every_space():
    space = EmbeddingSpace(model="hash-ngram-v1", dim=256, template="{}")
    with pytest.raises(ConfigError, match="no pretrained model of the space hash-ngram-v1"):
        OpenClipEncoder.of(space)


@pytest.mark.parametrize("name", pretrained())
def test_guidance_that_nothing_has_trained_is_refused(name):
    pipe = TinaPipeline.from_pretrained(name)
    with pytest.raises(ConfigError, match="guidance"):
        pipe(list(pipe.generator.vocabulary.trained_names[:3]), guidance_scale=2.0)


def test_a_head_whose_trunk_is_spoilt_is_refused(tmp_path):
    model = TinaPipeline.from_pretrained("tina-cifar100-resnet20-head")(["otter", "rose"])
    model.save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        metadata = stream.metadata()
    name = next(name for name in tensors if name.startswith("trunk") and name.endswith("bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(NonFiniteError, match=re.escape(name)):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", 300 * "y"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        TinaPipeline.from_pretrained(name)


@pytest.mark.parametrize("name", pretrained())
def test_the_card_has_the_published_reports_numbers(name):
    published = RESULTS / name.removeprefix("tina-").replace("-", "_") / "report.json"
    report = json.loads(published.read_text())
    assert markdown(report) in (PRETRAINED / name / "README.md").read_text()
    assert report["generator"]["parameters"] == sum(
        p.numel() for p in TinaPipeline.from_pretrained(name).generator.denoiser.parameters()
    )


def test_whatever_stops_a_download_is_one_line(monkeypatch):
    def broken(name):
        raise RuntimeError("403 Forbidden\nby the proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(CheckpointError, match=r"^a/b is neither .*: 403 Forbidden by the proxy$"):
        TinaPipeline.from_pretrained("a/b")


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=f"no checkpoint at tina-dogs: .*{pretrained()[0]}"):
        TinaPipeline.from_pretrained("tina-dogs")
