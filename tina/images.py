"""Picture files -> tensors.

Axes: N images, C channels, H W sides in pixels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tina.errors import DataError

LONGEST = 512  # pixels of a side; no encoder of pictures looks at more
FAR = 2.0  # above it values are not of [0, 1], however somebody has resized or disturbed them
WRITTEN_ANEW = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""What Pillow takes the orientation out of once it is followed: a second for each 65,000 values."""


def read_image(
    file: str | Path | IO[bytes] | Image.Image,
    *,
    channels: int,
    max_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Tensor:
    """A picture as float32 (1, C, H, W) in [0, 1], gray or RGB as C says; see `flatten`.

    Args:
        file: Or Pillow's picture, which stays as it is.
        max_pixels: Refuse larger ones before they are decompressed.
        formats: Pillow's names of those to be read; default: all.

    Raises:
        DataError: Missing, corrupt, too large, or of 16-bit or floating gray; or C is not 1 or 3.
    """
    if channels not in (1, 3):
        raise DataError(f"a picture is read with 1 channel or 3, not {channels}")
    name = f"image {file}" if isinstance(file, (str, Path)) else "the image"
    try:
        opened = file.copy() if isinstance(file, Image.Image) else Image.open(file, formats=formats)
        with opened as image:
            if max_pixels and math.prod(image.size) > max_pixels:
                width, height = image.size
                raise ValueError(f"{width} x {height} pixels are more than {max_pixels}")
            wanted = flatten(image, "L" if channels == 1 else "RGB")
            pixels = np.atleast_3d(np.array(wanted, dtype=np.float32))
    except UnidentifiedImageError as error:
        raise DataError(f"cannot read {name}: it is in no known format") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise DataError(f"cannot read {name}: {error}") from error
    pixels /= 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


def flatten(image: Image.Image, mode: str | None = None) -> Image.Image:
    """An opened picture upright and, where it is transparent, on white.

    Args:
        mode: L or RGB; default: L where it is gray without an alpha channel.

    Raises:
        ValueError: It is of 16-bit or floating gray.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
    image.load()  # what lies behind the pixels, too
    image.getexif()
    for key in WRITTEN_ANEW:
        image.info.pop(key, None)
    ImageOps.exif_transpose(image, in_place=True)
    mode = mode or ("L" if image.mode in ("L", "1") else "RGB")
    # no copy that is not needed: 24 million pixels are 96 MB in Pillow, 288 as floats
    if image.has_transparency_data:
        inked = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new(mode, image.size, "white")
        image.paste(inked, mask=inked)
    elif image.mode != mode:
        image = image.convert(mode)
    image.load()  # its file may be closed before it is looked at
    return image


def checked(images: Tensor, *, channels: int) -> Tensor:
    """Images (N, C, H, W), uint8 ones as they are, floats as float32.

    Raises:
        DataError: They are none, or of other channels or numbers; or floats far above 1, if their
            values can be looked at.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"a classifier takes tensors (N, {channels}, H, W), as tina.images.read_image makes "
            f"them of pictures, got {got}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise DataError(f"a classifier takes floats in [0, 1] or uint8 up to 255, got {kind}")
    if not torch.compiler.is_exporting() and 0 in images.shape[-2:]:
        raise DataError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels show nothing")
    if images.is_floating_point() and (high := _highest(images)) > FAR:
        raise DataError(
            f"a classifier takes floats in [0, 1] or uint8 up to 255, got floats up to {high:g}"
        )
    return images.float() if images.is_floating_point() else images


def _highest(images: Tensor) -> float:
    """Their highest value; 0 where there is none to look at, or only once a GPU has come so far."""
    if torch.compiler.is_compiling() or not images.is_cpu or not images.numel():
        return 0.0
    try:
        return images.detach().max().item()
    except RuntimeError:  # as under vmap
        return 0.0


def resize(images: Tensor, side: int, *, mode: str = "bilinear") -> Tensor:
    """Images (N, C, H, W) as (N, C, side, side), with antialiasing.

    Args:
        mode: Or bicubic, whose values overshoot.
    """
    size = (side, side)
    return torch.nn.functional.interpolate(images, size=size, mode=mode, antialias=True)


def square(images: Tensor) -> Tensor:
    """The centre squares of images (N, C, H, W), as data sets are cut."""
    height, width = images.shape[-2:]
    if not torch.compiler.is_exporting():
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return images[..., top : top + side, left : left + side]
    # a graph of any H and W would not know the size of a slice
    places = torch.arange(torch.sym_min(height, width))
    side = places.shape[0]
    rows, columns = places + (height - side) // 2, places + (width - side) // 2
    return images.index_select(-2, rows).index_select(-1, columns)


def fit(images: Tensor, side: int) -> Tensor:
    """The centre squares of images at `side` pixels: what a classifier sees of a photograph."""
    return resize(square(images), side)


def shrink(image: Tensor) -> Tensor:
    """The centre square of an image (N, C, H, W), its side `LONGEST` where it was more."""
    cut = square(image)
    # a copy, for the cut alone would keep the whole picture in memory
    if cut.shape[-1] <= LONGEST:
        return cut.clone()
    return resize(cut, LONGEST).clamp_(0, 1)  # antialiasing overshoots by a rounding
