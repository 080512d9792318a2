"""Images as training sees them: as they are, mirrored, or moved by a few pixels.

Axes: N images, C channels, H W sides in pixels, V views of an image, B images of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

SMALL = 64
"""Pixels of a side up to which all images are copied into the layout of convolutions, once. Of
larger ones that would be gigabytes; there each batch is, by the first convolution."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """View v of image i is at place i + v N; view 0 is the image as it is.

    A list of places is all that a recipe needs to train on every view: no draw is hidden in the
    reading of an image.

    Args:
        images: uint8 (N, C, H, W).
        mirror: Whether left and right are exchanged too.
        shift: Most pixels that an image is moved by, in both directions; what it leaves empty shows
            the image mirrored at its edge.
    """

    images: Tensor
    mirror: bool = False
    shift: int = 0

    @property
    def count(self) -> int:
        """V."""
        return (1 + self.mirror) * self._side**2

    def __len__(self) -> int:
        return len(self.images) * self.count

    def __getitem__(self, places: Tensor) -> Tensor:
        """Views uint8 (..., C, H, W) at places int64 (...)."""
        places = places.to(self.images.device)
        n, side = len(self.images), self._side
        image, view = places % n, places // n
        if self.mirror:
            view, mirrored = view // 2, view % 2 == 1
        centre = side**2 // 2  # moved by nothing: the first view
        window = (view + centre) % side**2
        found = self._windows[image, window // side, window % side]
        if self.mirror:
            found[mirrored] = found[mirrored].flip(-1)
        return found

    def to(self, device: torch.device | str) -> Views:
        """The same on a device; this one, with its table of shifts, where it lies there already."""
        images = self.images.to(device)
        return self if images is self.images else replace(self, images=images)

    @property
    def _side(self) -> int:
        return 2 * self.shift + 1

    @cached_property
    def _windows(self) -> Tensor:
        """All shifts of all images, none of them copied: (N, 2 shift + 1, 2 shift + 1, C, H, W)."""
        s, (height, width) = self.shift, self.images.shape[2:]
        table = self.images
        if s:
            edges = ((0, 0), (0, 0), (s, s), (s, s))
            padded = np.pad(self.images.cpu().numpy(), edges, mode="reflect")
            table = torch.from_numpy(padded).to(self.images.device)
        if max(height, width) <= SMALL:
            # batches inherit the layout, and convolutions on CPU are up to twice as fast so
            table = table.contiguous(memory_format=torch.channels_last)
        return table.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
