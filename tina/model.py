"""What is generated: a classifier with its origin, and its files.

Axes: K classes, N images, C channels, H W sides in pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tina.classifiers import Classifier
from tina.errors import CheckpointError, NonFiniteError, TinaError, one_line
from tina.export import OnnxGraph, export_graph
from tina.families import Family, build_family
from tina.files import check_suffix, write_bytes
from tina.names import FAMILIAR
from tina.tensors import pack_tensors

LARGEST = 2048
"""Side in pixels, at most, that a classifier's file asks images to be resized to: it may be
anyone's."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GeneratedModel:
    """A generated classifier.

    Args:
        theta: (n,), laid out for K classes.
        familiarity: Per class, 0..1: how well the prompt is covered by the training classes; of
            several words the strangest's, of pictures in a name's place, what they were taken for.
        nearest: Per class, the training class that is nearest to the prompt.
        checkpoint: sha256 of the checkpoint's manifest.
    """

    theta: Tensor
    family: Family
    class_names: tuple[str, ...]
    familiarity: tuple[float, ...]
    nearest: tuple[str, ...]
    seed: int
    steps: int
    checkpoint: str

    def __repr__(self) -> str:
        names = ", ".join(self.class_names)
        return f"GeneratedModel({names}; {self.family.name} of {len(self.theta):,} parameters)"

    def unfamiliar(self, threshold: float = FAMILIAR) -> dict[int, str]:
        """Index and warning of each class whose familiarity is below a threshold."""
        far = "is not close to anything the generator was trained on; nearest is"
        return {
            i: f"{self.class_names[i]!r} {far} {self.nearest[i]!r}"
            for i, share in enumerate(self.familiarity)
            if share < threshold
        }

    @cached_property
    def classifier(self) -> Classifier:
        """A module from images (N, C, H, W) of any size to logits (N, K), see `Classifier`."""
        return Classifier(self.family, self.theta, self.class_names)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The classifier's tensors under the layout's names; its own where it was trained on."""
        if made := self.__dict__.get("classifier"):
            return dict(made.network.state_dict())
        return self.family.layout(len(self.class_names)).unflatten(self.theta)

    def to_safetensors(self) -> bytes:
        """A safetensors file's content; what else is needed to rebuild it is in the metadata."""
        metadata = {
            "format": "tina-classifier-1",
            "family": self.family.name,
            "class_names": json.dumps(list(self.class_names)),
            "input_shape": json.dumps([self.family.channels, self.family.side, self.family.side]),
            "checkpoint_sha256": self.checkpoint,
            "seed": str(self.seed),
            "steps": str(self.steps),
        }
        return pack_tensors(self.family.with_trunk(self.tensors), metadata)

    def save(self, file: str | Path) -> None:
        """Write weights as safetensors.

        Raises:
            DataError: The file's name says that it is something else.
        """
        check_suffix(Path(file), ".safetensors")
        write_bytes(Path(file), self.to_safetensors())

    def export_onnx(self, file: str | Path) -> None:
        """Write an ONNX graph with the resizing and normalising inside, any N, H and W.

        Raises:
            DataError: The file's name says that it is something else.
        """
        export_onnx(self.classifier, Path(file))


def export_onnx(classifier: Classifier, file: Path) -> None:
    """Write a classifier as ONNX; see `tina.export`."""
    check_suffix(file, ".onnx")
    tensors, family = dict(classifier.network.named_parameters()), classifier.family
    write_bytes(file, OnnxGraph(family, export_graph(family)).fill(tensors, classifier.class_names))


def load_classifier(file: str | Path) -> Classifier:
    """Read what `GeneratedModel.save` wrote.

    Raises:
        CheckpointError: Unreadable, not made by Tina, or of another layout.
        ConfigError: It stands on ImageNet's features, and the extra `imagenet` is not installed.
        NonFiniteError: A weight is NaN or infinite.
    """
    try:
        with safe_open(str(file), "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {file}") from error
    except (SafetensorError, OSError) as error:
        if Path(file).is_dir():
            raise CheckpointError(f"{file} is a folder, not a classifier's file") from error
        onnx = "; ONNX is written for others, not read" if str(file).endswith(".onnx") else ""
        reason = f"{file} is not a readable safetensors file: {error}{onnx}"
        raise CheckpointError(reason) from error
    if metadata.get("format") != "tina-classifier-1":
        raise CheckpointError(f"{file} is not a classifier that Tina wrote")
    try:
        return _rebuild(metadata, tensors)
    except TinaError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not a whole classifier: {one_line(error)}") from error


def _rebuild(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Classifier:
    names, shape = (json.loads(metadata[key]) for key in ("class_names", "input_shape"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names are a list of text, got {names!r}")
    if len(shape) != 3 or not all(type(number) is int and number > 0 for number in shape):
        raise ValueError(f"input_shape is three whole numbers above 0, got {shape!r}")
    if shape[1] != shape[2] or shape[1] > LARGEST:
        raise ValueError(f"images are square, of {LARGEST} pixels at most, got {shape!r}")
    family = build_family(metadata["family"], channels=shape[0], image_size=shape[1])
    if family.on_clip:
        raise CheckpointError(f"a {family.name} classifier needs CLIP's image tower beside it")
    if odd := [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]:
        raise NonFiniteError(f"{odd[0]} holds NaN or infinity; no classifier is made of it")
    theta = family.layout(len(names)).flatten(family.take_trunk(tensors))
    return Classifier(family, theta, tuple(names))
