"""Images and labels of a data set, cut into fit, select and report.

Whatever the source, images are resized once to one side length, kept as uint8 and cached under the
user cache, so that every later load is a read of one safetensors file.

Axes: N images, C channels (1 or 3), H = W side in pixels, K classes of a task.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tina.errors import DataError, one_line
from tina.jobconfig import DataConfig
from tina.listing import Item, Listing, Source
from tina.names import clean, normalise_name
from tina.sources import find_source, root_of
from tina.storage import cached, named, user_cache
from tina.superclasses import CIFAR100_SUPERCLASSES
from tina.views import Views

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Dataset", "load_dataset"]

PARTITIONS = ("fit", "select", "report")
IMAGE_SIZES = {"digits": 8, "cifar100": 32, "mini_imagenet": 32}
LARGEST_DEFAULT_SIZE = 64
CACHE_FORMAT = 4
CHUNK = 512
# Below this Pillow spends its time holding the interpreter lock, and threads only slow it down.
THREADING_PIXELS = 128 * 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled images with the partition that decides who may read which.

    Attributes:
        name: Name of the data set as in `DataConfig.name`.
        images: uint8 (N, C, H, W), values 0 to 255.
        views: The same with the views that training sees; V per image.
        labels: int64 (V N,), class ids of all views.
        class_names: One human name per class id.
        groups: Superclass id per class id, or None where the data set has no superclasses.
        partitions: fit, select and report, each a sorted int64 tensor of places in `views`; fit
            has every view of its images, the others the images as they are.
        fingerprint: Hex digest of images, labels, class names and partitions.
    """

    name: str
    images: Tensor
    views: Views
    labels: Tensor
    class_names: tuple[str, ...]
    groups: tuple[int, ...] | None
    partitions: Mapping[str, Tensor]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole data set."""
        return len(self.class_names)

    def unmoved(self) -> Dataset:
        """The same without the views that move an image: what a frozen trunk is shown."""
        views = replace(self.views, shift=0)
        fit = self.partitions["fit"]  # the first views are the unmoved ones
        return replace(
            self,
            views=views,
            labels=self.labels[: len(views)],
            partitions={**self.partitions, "fit": fit[fit < len(views)]},
        )

    @cached_property
    def _places(self) -> Mapping[str, Sequence[Tensor]]:
        """Per partition each class's sorted places: training asks for a few classes, often."""
        found = {}
        for partition, index in self.partitions.items():
            labels = self.labels[index]
            counts = labels.bincount(minlength=self.num_classes).tolist()
            found[partition] = index[labels.argsort(stable=True)].split(counts)
        return found

    def indices(self, partition: str, class_ids: Sequence[int] | None = None) -> Tensor:
        """Sorted int64 places of a partition's images, of all classes or of `class_ids`."""
        if class_ids is None:
            return self.partitions[partition]
        places = self._places[partition]
        found = torch.cat([places[c] for c in sorted(set(class_ids))]).numpy()
        return torch.from_numpy(np.sort(found, kind="stable"))  # which merges runs that are sorted


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    test: Tensor  # bool (N,): belongs to the data set's own test split
    class_names: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        for tensor in (self.images, self.labels, self.test):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load_dataset(config: DataConfig, *, largest: int = LARGEST_DEFAULT_SIZE) -> Dataset:
    """Read a data set, from its cache where it was read before.

    Args:
        config: Which data set, from where, at what image size, and how it is partitioned. Without
            `root` and the variable TINA_DATA, cifar100 and caltech101 are downloaded if need be.
        largest: Side in pixels beyond which images are made smaller, where nothing is said of it.

    Raises:
        ConfigError: there is no data set of that name.
        DataError: it is missing, corrupt, or a class has too few images for three partitions.
        OSError: the system does not let it be read.
    """
    source = find_source(config)
    sizes = [IMAGE_SIZES[part] for part in config.name.split("+") if part in IMAGE_SIZES]
    size = config.image_size or min(sizes, default=None)
    with named(root_of(config)):
        decoded = _decode_cached(source, size, largest)
    labels = decoded.labels.numpy()
    partitions = {
        key: torch.from_numpy(index)
        for key, index in _partition(labels, decoded.test.numpy(), decoded.class_names, config)
    }
    views = Views(images=decoded.images, mirror=config.mirror, shift=config.shift)
    of_view = torch.arange(views.count) * len(decoded.images)
    partitions["fit"] = (of_view[:, None] + partitions["fit"]).flatten()
    fingerprint = hashlib.sha256(decoded.digest.encode())
    for key in PARTITIONS:
        fingerprint.update(partitions[key].numpy().data)
    return Dataset(
        name=config.name,
        images=decoded.images,
        views=views,
        labels=decoded.labels.repeat(views.count),
        class_names=decoded.class_names,
        groups=_groups(decoded.class_names) if config.name == "cifar100" else None,
        partitions=partitions,
        fingerprint=fingerprint.hexdigest(),
    )


def _groups(class_names: Sequence[str]) -> tuple[int, ...]:
    group_of = {
        name: group for group, names in enumerate(CIFAR100_SUPERCLASSES.values()) for name in names
    }
    for name in class_names:
        if name not in group_of:
            raise DataError(f"cifar100 has no class {name!r}: this is another data set")
    return tuple(group_of[name] for name in class_names)


# --- partition ------------------------------------------------------------------------------------


def _partition(
    labels: np.ndarray, test: np.ndarray, class_names: Sequence[str], config: DataConfig
) -> list[tuple[str, np.ndarray]]:
    """Cut each class by itself; `test` marks the data set's own test images, if it has any."""
    parts: dict[str, list[np.ndarray]] = {key: [] for key in PARTITIONS}
    for class_id, name in enumerate(class_names):
        rng = np.random.default_rng([config.seed, class_id])
        rest = rng.permutation(np.flatnonzero((labels == class_id) & ~test))
        report = np.flatnonzero((labels == class_id) & test)
        if not test.any():
            report, rest = np.split(rest, [max(1, round(config.report_fraction * len(rest)))])
        select, fit = np.split(rest, [max(1, round(config.select_fraction * len(rest)))])
        for key, index in zip(PARTITIONS, (fit, select, report), strict=True):
            if not len(index):
                raise DataError(
                    f"{config.name}: class {name!r} has {np.sum(labels == class_id)} images and "
                    f"{len(index)} of them in {key}; fit, select and report need 1 each"
                )
            parts[key].append(index)
    joined = {key: np.sort(np.concatenate(index)) for key, index in parts.items()}
    _check_partitions(joined, len(labels))
    return list(joined.items())


def _check_partitions(partitions: Mapping[str, np.ndarray], count: int) -> None:
    """Assert that each of `count` images lies in exactly one partition."""
    everything = np.sort(np.concatenate(list(partitions.values())))
    assert np.array_equal(everything, np.arange(count)), "partitions overlap or leave images out"


# --- decoding and its cache -----------------------------------------------------------------------


@contextmanager
def _opened(item: Item) -> Iterator[Image.Image]:
    """One image, not decoded yet."""
    from PIL import Image

    try:
        if isinstance(item.content, np.ndarray):
            yield Image.fromarray(item.content)
        else:
            file = io.BytesIO(item.content) if isinstance(item.content, bytes) else item.content
            with Image.open(file) as image:
                yield image
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"corrupt image {item.where}: {one_line(error)}") from error


def _side(item: Item) -> int:
    """Pixels of the shorter side."""
    with _opened(item) as image:
        return min(image.size)


def _pixels(item: Item, *, size: int) -> np.ndarray:
    """uint8 (1 or 3, size, size): the centre square as `images.square` has it, made small.

    It is L or RGB, as a user's picture is read.
    """
    from PIL.Image import Resampling

    from tina.images import flatten

    with _opened(item) as opened:
        image = flatten(opened)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))  # what is outside must not blur in
        image = image.resize((size, size), Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _decode_all(listing: Listing, size: int | None, largest: int) -> _Decoded:
    """Decode a source; gray only if all of its images are."""
    from tqdm import tqdm

    first = list(itertools.islice(listing.items, CHUNK))
    if not first:
        raise DataError("the data set holds no images")
    side = median_low(map(_side, first))  # one thumbnail must not make all images as small
    size = size or min(largest, side)
    items = itertools.chain(first, listing.items)
    del first  # of photographs a gigabyte, with the chunk that is being decoded
    images = np.empty((listing.count, 3, size, size), dtype=np.uint8)
    labels: list[int] = []
    test: list[bool] = []
    gray = True
    decode = partial(_pixels, size=size)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=listing.count, unit="image", desc="decoding", delay=2, disable=None) as bar,
    ):
        spread = pool.map if side**2 > THREADING_PIXELS else map
        while chunk := list(itertools.islice(items, CHUNK)):
            for item, pixels in zip(chunk, spread(decode, chunk), strict=True):
                images[len(labels)] = pixels
                gray = gray and len(pixels) == 1
                labels.append(item.label)
                test.append(item.test)
            bar.update(len(chunk))
    names = tuple(map(clean, listing.class_names))
    keys = [normalise_name(name) for name in names]
    if twice := [name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1]:
        raise DataError(f"two classes have one name to a prompt: {twice[0]!r} and {twice[1]!r}")
    return _Decoded(
        images=torch.from_numpy(images)[: len(labels), : 1 if gray else 3].contiguous(),
        labels=torch.tensor(labels),
        test=torch.tensor(test),
        class_names=names,
    )


def _cache_path(source: Source, size: int | None, largest: int) -> Path:
    key = hashlib.sha256(repr((CACHE_FORMAT, source.kind, size or f"<={largest}")).encode())
    for file in source.files:
        stat = file.stat()
        name = file.relative_to(source.folder).as_posix()
        key.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    return user_cache() / "images" / f"{key.hexdigest()[:32]}.safetensors"


def _decode_cached(source: Source, size: int | None, largest: int) -> _Decoded:
    return cached(
        _cache_path(source, size, largest),
        read=_read_cache,
        make=lambda: _decode_all(source.read(), size, largest),
        write=_write_cache,
    )


def _read_cache(path: Path) -> _Decoded:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        decoded = _Decoded(
            **{key: file.get_tensor(key) for key in ("images", "labels", "test")},
            class_names=tuple(json.loads(metadata["class_names"])),
        )
    if decoded.digest != metadata["digest"]:
        raise ValueError("its content has changed")
    return decoded


def _write_cache(path: Path, decoded: _Decoded) -> None:
    from safetensors.torch import save_file

    tensors = {"images": decoded.images, "labels": decoded.labels, "test": decoded.test}
    metadata = {"class_names": json.dumps(decoded.class_names), "digest": decoded.digest}
    save_file(tensors, path, metadata)
