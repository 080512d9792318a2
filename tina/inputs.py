"""A data set's images as the generated network takes them.

Axes: N images, V views of each, C channels, H W sides in pixels, F features of a trunk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tina.config import PromptConfig
from tina.datasets import Dataset
from tina.errors import DataError
from tina.families import Family
from tina.files import hash_bytes
from tina.tensors import pack_tensors, write_tensors
from tina.views import Views

KEPT = "features-"
"""What can be made again at any time begins so: what a trunk made of all images."""


def features_name(family: Family, dataset: Dataset, prompt: PromptConfig) -> str:
    """Of the file of what a trunk, which must be attached, makes of a data set's views.

    Args:
        prompt: Says which CLIP a family on CLIP has.
    """
    trunk = hash_bytes(pack_tensors(family.trunk_tensors()))
    if family.on_clip:
        trunk = f"{prompt.model} {prompt.weights}"
    key = f"{dataset.fingerprint} {dataset.views.count} {family.name} {trunk}"
    return f"{KEPT}{hash_bytes(key.encode())[:16]}.safetensors"


@torch.no_grad()
def features_of(
    family: Family, images: Views, *, device: torch.device | str, file: Path | None
) -> Tensor:
    """What a family's trunk makes of every view of every image, in their order: (N V, F).

    Args:
        file: Where the first process that asks keeps them for all others.

    Raises:
        DataError: The file is not readable.
    """
    if file and file.exists():
        try:
            return load_file(file, device=str(device))["features"]
        except (SafetensorError, KeyError, OSError) as error:
            raise DataError(f"{file} holds no features: remove it ({error})") from error
    family.trunk.to(device)
    views = images.to(device)
    # CLIP's tower stays where it is
    place = next((value.device for value in family.trunk.parameters()), torch.device("cpu"))
    places = torch.arange(len(views)).split(family.batch)
    bar = tqdm(places, desc="features", unit="batch", delay=2, mininterval=1)
    features = torch.cat([family.embed(views[x].to(place)) for x in bar]).to(device)
    if file:
        write_tensors(file, {"features": features})
    return features


class InputStore:
    """A data set's images as the generated network takes them.

    Without a trunk they stay uint8 until a batch is asked for; with one, every image goes through
    it once, here, and batches are rows of the feature table.

    Args:
        images: With all their views.
        features: File for what a trunk makes of them (`features_of`); default: none is kept.
    """

    def __init__(
        self,
        family: Family,
        images: Views,
        *,
        device: torch.device | str = "cpu",
        features: Path | None = None,
    ):
        self._embed = None if family.has_trunk else family.embed
        self._table: Views | Tensor
        if family.has_trunk:
            self._table = features_of(family, images, device=device, file=features)
        else:
            self._table = images.to(device)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Inputs (..., C, H, W) or (..., F), float32, of the views at places (...)."""
        rows = self._table[index]
        return self._embed(rows) if self._embed else rows
