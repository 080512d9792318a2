"""A checkpoint directory: whole or not at all, strict both ways, the same generator again."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import edit_header, rehash
from safetensors.torch import load, load_file, save_file

import tina.checkpoint
from tina.checkpoint import load_generator, save_generator
from tina.codec import Codec, codec_shapes
from tina.config import ClassifierConfig, DenoiserConfig, DiffusionConfig, GeneratorConfig
from tina.encoders import HashEncoder
from tina.errors import CheckpointError
from tina.families import build_family
from tina.files import hash_file
from tina.generator import Generator, new_denoiser
from tina.generic import GenericModel
from tina.prompts import Vocabulary
from tina.rounding import in_eight_bits, in_full
from tina.run import Run
from tina.storage import MANIFEST
from tina.tensors import DTYPES, pack_tensors, write_tensors

FILES = (
    "README.md",
    "codec.safetensors",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "prompts.safetensors",
)
NAMES = ("ant", "bee", "cat", "dog", "eel")


def tensors(generator):
    """Every tensor of a generator, by name."""
    found = dict(generator.denoiser.state_dict())
    found |= generator.codec.tensors()
    found |= {"generic_body": generator.generic.body, "generic_rows": generator.generic.rows}
    found |= {"embeddings": generator.vocabulary.embeddings}
    found |= {"trained": generator.vocabulary.trained}
    if generator.family.has_trunk:
        found |= {f"trunk.{k}": v for k, v in generator.family.trunk.state_dict().items()}
    return found


def assert_same(one, other):
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    for key in ("config", "dataset", "max_classes"):
        assert getattr(one, key) == getattr(other, key)
    assert one.generic.class_ids == other.generic.class_ids
    assert one.vocabulary.names == other.vocabulary.names
    assert one.vocabulary.space == other.vocabulary.space
    assert one.codec.layout == other.codec.layout
    assert one.family.name == other.family.name


def theta(generator, class_ids=(2, 0, 3), seed=7):
    embeddings, mask = generator.vocabulary.of([class_ids])
    body, rows = generator.generate(embeddings, mask, seeds=[seed], steps=3)
    return generator.theta(body[0], rows[0])


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A checkpoint that may be spoilt."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def head_generator(name="resnet20_head"):
    """A generator of heads, what is trained of their trunk random; class 3 is kept out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family = build_family(name, channels=3, image_size=16)
        trunk = family.new_trunk()
        for key, buffer in trunk.named_buffers():
            if "running" in key:
                buffer.uniform_(0.5, 2)
        family.attach_trunk(trunk)
        layout = family.layout(3)
        encoder = HashEncoder()
        vocabulary = Vocabulary(
            space=encoder.space,
            names=NAMES,
            embeddings=encoder.encode_text(NAMES),
            trained=torch.tensor([True, True, True, False, True]),
        )
        shapes = codec_shapes(layout)
        parts = {key: torch.rand(shape) + 0.5 for key, shape in shapes.items()}
        parts["row_right"] = torch.linalg.qr(parts["row_right"]).Q.contiguous()
        codec = Codec.of(layout, chunk=64, tensors=parts)
        config = GeneratorConfig(
            classifier=ClassifierConfig(family=name),
            denoiser=DenoiserConfig(width=16, depth=1, heads=2, chunk=64),
            diffusion=DiffusionConfig(timesteps=50, sampling_steps=3),
        )
        denoiser = new_denoiser(config, codec, dim=encoder.space.dim, seed=0)
        for parameter in denoiser.parameters():  # a trained one predicts something
            torch.nn.init.normal_(parameter, std=0.1)
        return Generator(
            config=config,
            dataset="made up",
            family=family,
            codec=codec,
            vocabulary=vocabulary,
            generic=GenericModel(
                class_ids=(0, 1, 2, 4), body=torch.zeros(0), rows=torch.randn(4, layout.row_size)
            ),
            denoiser=denoiser.eval().requires_grad_(False),
            max_classes=3,
        )


# --- round trip -----------------------------------------------------------------------------------


def test_round_trip(tiny_generator, tiny_checkpoint):
    again = load_generator(tiny_checkpoint)
    assert_same(again, tiny_generator)
    assert not again.denoiser.training
    assert not any(p.requires_grad for p in again.denoiser.parameters())
    assert torch.equal(theta(again), theta(tiny_generator))
    assert not torch.equal(theta(again), theta(again, seed=8))


@pytest.mark.parametrize("name", ["resnet20_head", "efficientnet_lite0_head"])
def test_round_trip_with_a_trunk(tmp_path, name):
    generator, directory = head_generator(name), tmp_path / "head"
    save_generator(generator, directory, card="card")
    assert {f.name for f in directory.iterdir()} == {*FILES, "trunk.safetensors"}
    again = load_generator(directory)
    assert_same(again, generator)
    assert torch.equal(theta(again), theta(generator))
    images = torch.rand(2, 3, 16, 16)
    inputs = again.family.embed(images)
    assert torch.equal(inputs, generator.family.embed(images))
    assert torch.equal(again.embed_shots(images), generator.embed_shots(images))


def test_the_shrinkage_of_a_run_reaches_its_checkpoint(tiny_run, tmp_path):
    prompt = replace(tiny_run.config.prompt, shrinkage=0.5)
    generator = Run(replace(tiny_run.config, prompt=prompt)).new_generator()
    save_generator(generator, tmp_path / "drawn", card="card")
    again = load_generator(tmp_path / "drawn")
    names = again.vocabulary.embeddings
    blends = torch.nn.functional.normalize(names + names.roll(1, 0), dim=1)
    assert torch.equal(again.condition(blends), generator.condition(blends))
    plain = tiny_run.new_generator()
    assert not torch.isclose(again.condition(blends), plain.condition(blends)).all(1).any()


def test_saving_again_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    card = (tiny_checkpoint / "README.md").read_text()
    save_generator(load_generator(tiny_checkpoint), tmp_path / "again", card=card)
    assert hash_file(tmp_path / "again" / MANIFEST) == hash_file(tiny_checkpoint / MANIFEST)


def test_a_small_one_is_a_third_of_the_size_and_nearly_the_same(tiny_generator, tmp_path):
    for folder, small in (("full", False), ("small", True)):
        save_generator(tiny_generator, tmp_path / folder, card="card", small=small)
    full, small = (tmp_path / f / "model.safetensors" for f in ("full", "small"))
    assert small.stat().st_size < full.stat().st_size / 3
    prompts = load_file(tmp_path / "small" / "prompts.safetensors")
    assert prompts["embeddings"].dtype == torch.int8
    again = load_generator(tmp_path / "small")
    rounded = in_full(in_eight_bits(tiny_generator.denoiser.state_dict()))
    for name, value in again.denoiser.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rounded[name]), name
    full, short = (x.vocabulary.embeddings for x in (tiny_generator, again))
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, full, atol=float(full.abs().max()) / 250, rtol=0)
    torch.testing.assert_close(theta(again), theta(tiny_generator), atol=1e-3, rtol=1e-2)
    # read and written, it is the same file
    save_generator(again, tmp_path / "again", card="card", small=True)
    assert hash_file(tmp_path / "again" / MANIFEST) == hash_file(tmp_path / "small" / MANIFEST)


def test_files_are_json_safetensors_and_prose_only(tiny_checkpoint):
    assert sorted(f.name for f in tiny_checkpoint.iterdir()) == sorted(FILES)
    for file in tiny_checkpoint.iterdir():
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), f"{file.name} looks like a pickle"
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            assert json.loads(content)
        else:
            assert content.decode().startswith("A tiny checkpoint")


def test_loading_unpickles_nothing(tiny_checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("torch.load", refuse)
    load_generator(tiny_checkpoint)


def test_modes_let_others_read(tiny_checkpoint):
    assert tiny_checkpoint.stat().st_mode & 0o777 == 0o755


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [True, False])
def test_existing_directory_is_left_alone(tiny_generator, tmp_path, filled):
    directory = tmp_path / "there"
    directory.mkdir()
    if filled:
        (directory / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        save_generator(tiny_generator, directory, card="card")
    assert [f.name for f in tmp_path.rglob("*")] == ["there", "mine.txt"][: 1 + filled]
    assert not filled or (directory / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_write_that_fails_leaves_nothing(tiny_generator, tmp_path, monkeypatch, fails_at):
    calls = []

    def failing(file, *args):
        calls.append(file)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        write_tensors(file, *args)

    monkeypatch.setattr(tina.checkpoint, "write_tensors", failing)
    with pytest.raises(OSError, match="no space left"):
        save_generator(tiny_generator, tmp_path / "new", card="card")
    assert len(calls) == fails_at
    assert list(tmp_path.iterdir()) == []


# --- refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_changed_byte(copied, name, share):
    file = copied / name
    content = bytearray(file.read_bytes())
    content[round(share * (len(content) - 1))] ^= 0x11
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest|sha256") as refused:
        load_generator(copied)
    assert name == "manifest.json" or name in str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copied, name):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_generator(copied)


@pytest.mark.parametrize("name", ["pickle.bin", ".hidden", "trunk.safetensors"])
def test_an_additional_file(copied, name):
    (copied / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"not in the manifest: {re.escape(name)}"):
        load_generator(copied)


def test_an_additional_folder(copied):
    (copied / "more").mkdir()
    with pytest.raises(CheckpointError, match="more"):
        load_generator(copied)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", "{", ""])
def test_a_manifest_of_another_kind(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        load_generator(copied)


def test_an_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_generator(tmp_path)


@pytest.mark.parametrize("found", [0, 2, 99, None, "3"])
def test_another_format_version(copied, found):
    edit_header(copied, format_version=found)
    with pytest.raises(CheckpointError, match=f"format version {found}; .* reads 3"):
        load_generator(copied)


def test_another_layout(copied):
    layout = json.loads((copied / "config.json").read_text())["layout"]
    layout[0][1][0] += 1
    edit_header(copied, layout=layout)
    with pytest.raises(CheckpointError, match="another layout of cnn5k"):
        load_generator(copied)


@pytest.mark.parametrize("section", ["", "denoiser"])
def test_an_unknown_key_in_the_configuration(copied, section):
    config = json.loads((copied / "config.json").read_text())["config"]
    (config[section] if section else config)["colour"] = 1
    edit_header(copied, config=config)
    with pytest.raises(CheckpointError, match=r"does not fit .*colour"):
        load_generator(copied)


@pytest.mark.parametrize("key", ["config", "dataset", "channels", "layout", "space", "class_names"])
def test_a_missing_key_in_the_header(copied, key):
    file = copied / "config.json"
    header = json.loads(file.read_text())
    del header[key]
    file.write_text(json.dumps(header))
    rehash(copied)
    with pytest.raises(CheckpointError, match=key):
        load_generator(copied)


@pytest.mark.parametrize(
    "change",
    [
        ("model.safetensors", "norm.extra", torch.zeros(1)),
        ("model.safetensors", "position", None),
        ("model.safetensors", "position", torch.zeros(1, 1)),
        ("codec.safetensors", "row_scale", None),
        ("codec.safetensors", "row_scale", torch.ones(2)),
        ("codec.safetensors", "body_scale", torch.ones(2)),
        ("codec.safetensors", "left.0", torch.eye(3)),
        ("codec.safetensors", "right.9", torch.eye(3)),
        ("prompts.safetensors", "embeddings", None),
        ("prompts.safetensors", "embeddings", torch.zeros(10)),
        ("prompts.safetensors", "embeddings", torch.zeros(10, 32, 2)),
    ],
    ids=lambda change: f"{change[1]} {'gone' if change[2] is None else tuple(change[2].shape)}",
)
def test_tensors_of_another_model(copied, change):
    name, key, value = change
    held = load_file(copied / name)
    held.pop(key, None)
    save_file(held if value is None else held | {key: value}, copied / name)
    rehash(copied)
    with pytest.raises(
        CheckpointError, match=r"does not fit its config|missing or unknown|have the shape"
    ):
        load_generator(copied)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_file_that_is_no_safetensors(copied, damage):
    file = copied / "model.safetensors"
    file.write_bytes(b"no safetensors at all" if damage == "text" else file.read_bytes()[:1000])
    rehash(copied)
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_generator(copied)


def test_a_trunk_that_the_manifest_does_not_know(tmp_path):
    save_generator(head_generator(), tmp_path / "resnet", card="card")
    (tmp_path / "resnet" / "trunk.safetensors").unlink()
    rehash(tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_generator(tmp_path / "resnet")


def test_class_names_are_part_of_the_checkpoint(tiny_generator, tiny_checkpoint, tmp_path):
    vocabulary = replace(tiny_generator.vocabulary, names=tuple("abcdefghij"))
    save_generator(replace(tiny_generator, vocabulary=vocabulary), tmp_path / "x", card="card")
    assert load_generator(tmp_path / "x").vocabulary.names == tuple("abcdefghij")
    assert hash_file(tmp_path / "x" / MANIFEST) != hash_file(tiny_checkpoint / MANIFEST)


def test_a_header_of_another_kind(copied):
    (copied / "config.json").write_text("[1]")
    rehash(copied)
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_generator(copied)


def test_an_additional_key_in_the_header(copied):
    edit_header(copied, surprise=1)
    with pytest.raises(CheckpointError, match=r"config\.json.*surprise"):
        load_generator(copied)


def test_tensors_of_every_kind_are_what_the_library_reads():
    values = torch.arange(6).view(2, 3)
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors |= {"odd": torch.tensor([True]), "turned": values.T, "one": torch.tensor(2.5)}
    tensors |= {"none": torch.empty(0, 3)}
    content = pack_tensors(tensors, {"b": "é", "a": "1"})
    assert content == pack_tensors(dict(reversed(tensors.items())), {"a": "1", "b": "é"})
    found = load(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("name", ["codec.safetensors", "prompts.safetensors"])
def test_an_additional_tensor(copied, name):
    found = load_file(copied / name) | {"surprise": torch.zeros(1)}
    write_tensors(copied / name, found)
    rehash(copied)
    with pytest.raises(CheckpointError, match="surprise"):
        load_generator(copied)
