"""What a data set is before it is decoded: a source that was found, and what it lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLUTTER = "BACKGROUND_Google"  # Caltech-101's folder of random pictures is no class


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image before decoding.

    Attributes:
        content: Encoded bytes, an image file, or uint8 pixels (H, W) or (H, W, 3).
        label: Class id, a position in `Listing.class_names`.
        test: Whether it belongs to the data set's own test split.
        where: Names the image in an error message.
    """

    content: bytes | Path | np.ndarray
    label: int
    test: bool
    where: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds; `items` yields at most `count` images."""

    class_names: Sequence[str]
    count: int
    items: Iterator[Item]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that was found.

    Attributes:
        kind: Name of the way it is read.
        folder: What the names of `files` are relative to.
        files: All files that its content depends on.
        read: Lists the images; raises DataError where a file is corrupt.
    """

    kind: str
    folder: Path
    files: Sequence[Path]
    read: Callable[[], Listing]
