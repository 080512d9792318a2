"""One directory in and out: what `save_pretrained` writes and `from_pretrained` reads.

    config.json           format version, configuration, family, layout, embedding space, names
    model.safetensors     the denoiser's averaged weights
    codec.safetensors     directions, scales, generic model
    prompts.safetensors   embeddings of the data set's class names and of further words
    trunk.safetensors     where the family has a trained trunk
    tower.safetensors     where an image tower was trained for prompts
    README.md             model card
    manifest.json         sha256 of each file above

Strict both ways: a changed byte, a missing or additional file, an unknown key or another layout is
refused. Nothing is pickled. A directory is written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tina.backbone import IMAGENET
from tina.codec import Codec, codec_shapes
from tina.config import GeneratorConfig, PromptConfig
from tina.configio import config_from_dict, config_to_dict
from tina.encoders import EmbeddingSpace, build_encoder
from tina.errors import CheckpointError, ConfigError, TinaError, one_line
from tina.families import ClipImageTrunk, Family, build_family
from tina.files import hash_file, read_table
from tina.generator import Generator, new_denoiser
from tina.generic import GenericModel
from tina.packaged import PRETRAINED, pretrained
from tina.prompts import Vocabulary
from tina.rounding import in_eight_bits, in_full, in_half
from tina.storage import MANIFEST, at_hand
from tina.stores import is_uri
from tina.tensors import write_tensors
from tina.tower import tower_of

FORMAT_VERSION = 3
HEADER = {"format_version", "config", "dataset", "channels", "image_size", "max_classes"}
HEADER |= {"layout", "space", "class_names"}
BESIDE_CODEC = {"generic_body", "generic_rows"}
BLOCK = 32
"""Values of an embedding that share a scale: a few of CLIP's are ten times as large as the rest."""
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError)


def save_generator(
    generator: Generator, directory: Path, *, card: str, small: bool = False
) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        card: Text of the model card.
        small: Round the denoiser's matrices and the embeddings to eight bits, and its other
            weights, a row's basis, what was trained of a trunk and the image tower to half
            precision: a third of the size. They are read back in full like any others.

    Raises:
        CheckpointError: The directory exists; nothing in it is touched.
    """
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; nothing was overwritten")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write(generator, temporary, card, small)
        temporary.chmod(0o755)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(generator: Generator, folder: Path, card: str, small: bool) -> None:
    family, vocabulary = generator.family, generator.vocabulary
    header = {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(generator.config),
        "dataset": generator.dataset,
        "channels": family.channels,
        "image_size": family.image_size,
        "max_classes": generator.max_classes,
        "layout": family.layout(generator.max_classes).to_json(),
        "space": vars(vocabulary.space),
        "class_names": list(vocabulary.names),
    }
    (folder / "config.json").write_text(json.dumps(header, indent=1))

    def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return in_half(tensors) if small else dict(tensors)

    weights = generator.denoiser.state_dict()
    write_tensors(folder / "model.safetensors", in_eight_bits(weights) if small else weights)
    codec = generator.codec.tensors()
    basis = rounded({"row_right": codec["row_right"]})
    rows = {"generic_body": generator.generic.body, "generic_rows": generator.generic.rows}
    write_tensors(folder / "codec.safetensors", codec | basis | rows)
    embeddings = vocabulary.embeddings
    if small:
        embeddings = embeddings.unflatten(1, (-1, math.gcd(BLOCK, embeddings.shape[1])))
    prompts = {"embeddings": embeddings, "trained": vocabulary.trained}
    if family.on_imagenet:
        prompts["lent"] = torch.tensor(vocabulary.lent, dtype=torch.int32)
    write_tensors(folder / "prompts.safetensors", in_eight_bits(prompts) if small else prompts)
    if generator.tower:
        write_tensors(folder / "tower.safetensors", rounded(generator.tower.tensors()))
    if family.trains_trunk:
        write_tensors(folder / "trunk.safetensors", rounded(family.trunk_tensors()))
    (folder / "README.md").write_text(card)
    hashes = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))


def check_manifest(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: No manifest, or a file missing, additional or changed.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: it has no manifest.json")
    manifest = read_table(file, CheckpointError)
    # a repository has .gitattributes and, cloned, .git, or downloaded, .cache: none is read
    found = {f.name for f in directory.iterdir() if not f.name.startswith((".git", ".cache"))}
    found -= {MANIFEST}
    if found != set(manifest):
        odd = ", ".join(sorted(found ^ set(manifest)))
        raise CheckpointError(f"{directory}: files missing or not in the manifest: {odd}")
    for name, digest in manifest.items():
        if hash_file(directory / name) != digest:
            raise CheckpointError(
                f"{directory / name} was changed: its sha256 is not the manifest's"
            )


def load_generator(directory: Path) -> Generator:
    """Read a checkpoint directory.

    Raises:
        CheckpointError: It is not exactly what its manifest and configuration say.
    """
    check_manifest(directory)
    try:
        header = json.loads((directory / "config.json").read_text())
        if header.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{directory} has format version {header.get('format_version')}; "
                f"this version of Tina reads {FORMAT_VERSION}"
            )
        return _read(directory, header)
    except CheckpointError:
        raise
    except (TinaError, SafetensorError, OSError, *_MALFORMED) as error:
        raise CheckpointError(
            f"{directory} does not fit its configuration: {one_line(error)}"
        ) from error


def _exactly(found: Collection[str], wanted: set[str], *, file: str) -> None:
    if odd := set(found) ^ wanted:
        raise CheckpointError(f"{file}: missing or unknown: {', '.join(sorted(odd))}")


def _read(directory: Path, header: dict[str, Any]) -> Generator:
    _exactly(header, HEADER, file="config.json")
    config = config_from_dict(GeneratorConfig, header["config"])
    family = build_family(
        config.classifier.family, channels=header["channels"], image_size=header["image_size"]
    )
    layout = family.layout(header["max_classes"])
    if layout.to_json() != header["layout"]:
        raise CheckpointError(
            f"{directory} holds another layout of {family.name} than this version of Tina makes"
        )
    codec = in_full(load_file(directory / "codec.safetensors"))
    _exactly(codec, BESIDE_CODEC | codec_shapes(layout).keys(), file="codec.safetensors")
    packed = load_file(directory / "prompts.safetensors")
    prompts = in_full(packed)
    lends = {"lent"} if family.on_imagenet else set()
    _exactly(prompts, {"embeddings", "trained"} | lends, file="prompts.safetensors")
    if packed["embeddings"].dtype == torch.int8:  # in blocks
        prompts["embeddings"] = prompts["embeddings"].flatten(1)
    vocabulary = Vocabulary(
        space=EmbeddingSpace(**header["space"]),
        names=tuple(header["class_names"]),
        embeddings=prompts["embeddings"],
        trained=prompts["trained"],
        lent=tuple(prompts["lent"].tolist()) if lends else (),
    )
    known, lent = torch.nonzero(vocabulary.trained).flatten().tolist(), set(vocabulary.lent)
    if lends and prompts["lent"].dtype != torch.int32:
        raise CheckpointError("prompts.safetensors: classes are lent by their whole numbers")
    if not lent <= set(range(IMAGENET)) or not len(lent) == len(vocabulary.lent) <= len(known):
        raise CheckpointError("prompts.safetensors lends classes that are not there, or one twice")
    own = known[: len(known) - len(vocabulary.lent)]
    shapes = {
        "generic_body": (layout.body_size,),
        "generic_rows": (len(own), layout.row_size),
        "embeddings": (len(vocabulary.names), vocabulary.space.dim),
        "trained": (len(vocabulary.names),),
    }
    for name, shape in shapes.items():
        if (found := tuple((codec | prompts)[name].shape)) != shape:
            raise CheckpointError(f"{name} must have the shape {shape}, has {found}")
    generator_codec = Codec.of(layout, chunk=config.denoiser.chunk, tensors=codec)
    denoiser = new_denoiser(config, generator_codec, dim=vocabulary.space.dim, seed=0)
    denoiser.load_state_dict(in_full(load_file(directory / "model.safetensors")))
    attach_clip(family, config.prompt, space=vocabulary.space)
    if family.trains_trunk:
        family.load_trunk(load_file(directory / "trunk.safetensors"))
    generic = GenericModel(
        class_ids=tuple(own),
        body=codec["generic_body"],
        rows=codec["generic_rows"],
    )
    tower = None
    if config.prompt.tower:
        tower = tower_of(load_file(directory / "tower.safetensors"), generic, family)
    return Generator(
        config=config,
        dataset=header["dataset"],
        family=family,
        codec=generator_codec,
        vocabulary=vocabulary,
        generic=generic,
        denoiser=denoiser.eval().requires_grad_(False),
        max_classes=header["max_classes"],
        tower=tower,
    )


def attach_clip(
    family: Family, config: PromptConfig, *, space: EmbeddingSpace | None = None
) -> None:
    """Give a family on CLIP the image tower of the prompts' encoder; others have no need of it.

    Args:
        space: Of the CLIP that the head was made for; default: whatever is configured.

    Raises:
        CheckpointError: The configured CLIP is another.
        ConfigError: It is of another width.
    """
    if not family.on_clip:
        return
    encoder, features = build_encoder(config), family.layout(1).row_size - 1
    if encoder.space.dim != features:
        raise ConfigError(
            f"{family.name} takes {features} values of CLIP's, {encoder.space.model} "
            f"gives {encoder.space.dim}: prompt.model must be a ViT-B-32"
        )
    if space and encoder.space != space:
        raise CheckpointError(f"its trunk is CLIP of {space}, and here is {encoder.space}")
    family.attach_trunk(ClipImageTrunk(encoder.encode_images))


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint, see `TinaPipeline.from_pretrained`.

    Raises:
        CheckpointError: There is none of that name.
    """
    if is_uri(name):
        return at_hand(name)
    try:
        if (directory := at_hand(name)).is_dir():
            return directory
    except (OSError, RuntimeError) as error:  # too long a name, or nobody's home
        raise CheckpointError(f"no checkpoint at {name[:200]}: {one_line(error)}") from error
    return PRETRAINED / name if name in pretrained() else _download(name)


def _download(name: str) -> Path:
    """A checkpoint of the Hugging Face hub, in its local cache."""
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/")):
        known = ", ".join(pretrained())
        raise CheckpointError(
            f"no checkpoint at {name}: take one that comes with Tina ({known}) or train one"
        )
    try:
        return Path(snapshot_download(name))
    # the hub's client and its HTTP library share no base class of their errors
    except Exception as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a hub repository: {one_line(error)}"
        ) from error
