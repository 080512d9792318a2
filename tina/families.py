"""The classifier families whose weights are generated, each a pure function of theta.

Axes: N images, C channels, H W sides in pixels, K classes, F features before the head, n values of
theta.

A family is one class: it says how the generated network is built for K classes, and, if that takes
a frozen trunk's features, which trunk. Its last layer is a `Linear` named `fc`, the *head*: row k
belongs to class k. All that comes before `fc` is the *body*. To add a family, write such a class
with a `module` method (and, if it trains a trunk or a part of one, `new_trunk` and `trained_part`)
and enter it in `FAMILIES`; layouts, zoo, codec, files and export derive from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from threading import get_ident
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tina.backbone import FEATURES, SIDE, ImageNetTrunk
from tina.datasets import LARGEST_DEFAULT_SIZE
from tina.errors import CheckpointError, ConfigError
from tina.images import fit, resize, square
from tina.layout import ParamLayout

TRUNK = "trunk."
"""Where a file holds other tensors too, the names of a trained trunk's begin with this."""


class Family(ABC):
    """One classifier architecture over images of one shape.

    Args:
        channels: C of the images, 1 or 3.
        image_size: H and W of the data set's images.
    """

    trains_trunk = False
    """Whether it has a trunk of its own, trained in whole or in part before the generic model's
    head; what was trained lies in files beside what is generated."""
    on_imagenet = False
    """Whether that part is a neck alone, on a backbone that was trained elsewhere and lies in no
    file."""
    on_clip = False
    """Whether its trunk is CLIP's image tower, which is not trained, and in no file."""

    batch = 256
    """Most images that a trunk is shown at once, so that its activations stay in cache."""

    def __init__(self, name: str, *, channels: int, image_size: int) -> None:
        self.name, self.channels, self.image_size = name, channels, image_size
        self._trunk: nn.Module | None = None

    @abstractmethod
    def module(self, num_classes: int) -> nn.Module:
        """A freshly initialised network for K classes; with a trunk, only what follows it."""

    def layout(self, num_classes: int) -> ParamLayout:
        """Where each generated tensor of a K-class classifier lies."""
        template = self._template(num_classes)  # here: under vmap `logits` could make none
        if num_classes not in self._layouts:
            self._layouts[num_classes] = ParamLayout.of(template)
        return self._layouts[num_classes]

    def _template(self, num_classes: int) -> nn.Module:
        """A network for `functional_call`, which puts theta into it: one for each thread."""
        key = num_classes, get_ident()
        if key not in self._templates:
            with torch.device("meta"):
                self._templates[key] = self.module(num_classes)
        return self._templates[key]

    @cached_property
    def _layouts(self) -> dict[int, ParamLayout]:
        return {}

    @cached_property
    def _templates(self) -> dict[tuple[int, int], nn.Module]:
        return {}

    @property
    def has_trunk(self) -> bool:
        """Whether the generated network takes features, not images."""
        return self.trains_trunk or self.on_clip

    def new_trunk(self) -> nn.Module:
        """A trunk whose own part is not trained: (N, C, H, W) -> (N, F)."""
        raise NotImplementedError

    @property
    def trunk(self) -> nn.Module:
        """The frozen trunk."""
        if self._trunk is None:
            raise CheckpointError(f"{self.name} has no trunk yet: train or load one first")
        return self._trunk

    def attach_trunk(self, trunk: nn.Module) -> None:
        """Freeze a trained trunk and use it from here on."""
        self._trunk = trunk.eval().requires_grad_(False)

    def trained_part(self, trunk: nn.Module) -> nn.Module:
        """What of a trunk of its own was trained here, and lies in files."""
        return trunk

    def load_trunk(self, tensors: Mapping[str, Tensor]) -> None:
        """Attach a trained trunk, of whose trained part these are the tensors.

        Raises:
            RuntimeError: They are another's.
        """
        trunk = self.new_trunk()
        self.trained_part(trunk).load_state_dict(tensors)
        self.attach_trunk(trunk)

    def trunk_tensors(self) -> dict[str, Tensor]:
        """What `load_trunk` takes; none, where no trunk is trained."""
        return self.trained_part(self.trunk).state_dict() if self.trains_trunk else {}

    def with_trunk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, and a trained trunk's among them."""
        trunk = {TRUNK + name: value for name, value in self.trunk_tensors().items()}
        return {**tensors, **trunk}

    def take_trunk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `with_trunk`: attach a trained trunk, and return the other tensors.

        Raises:
            RuntimeError: The trunk is missing, or another.
        """
        if not self.trains_trunk:
            return dict(tensors)
        names = [name for name in tensors if name.startswith(TRUNK)]
        self.load_trunk({name.removeprefix(TRUNK): tensors[name] for name in names})
        return {name: value for name, value in tensors.items() if name not in names}

    @property
    def side(self) -> int:
        """H and W that photographs are resized to."""
        return self.image_size

    def look_at(self, photographs: Tensor) -> Tensor:
        """What `embed` takes (N, C, side, side) of photographs, their centre squares resized.

        Args:
            photographs: uint8 (N, C, H, W), or float32 in [0, 1], of any H and W.
        """
        return fit(photographs, self.side)

    def embed(self, images: Tensor) -> Tensor:
        """What the generated network takes, from a data set's images or from `look_at`.

        Args:
            images: uint8 (N, C, H, W), or float32 of the same shape in [0, 1].

        Returns:
            float32: images scaled to [-1, 1] (mean .5, std .5), or trunk features (N, F).
        """
        x = self.scale(images)
        if not self.has_trunk:
            return x
        return torch.cat([self.trunk(part) for part in x.split(self.batch)])

    @staticmethod
    def scale(images: Tensor) -> Tensor:
        """Images, uint8 or float in [0, 1], with mean .5 and standard deviation .5 taken out."""
        x = images.float().div_(255) if images.dtype == torch.uint8 else images
        return (x - 0.5).div_(0.5)

    def logits(self, theta: Tensor, inputs: Tensor, *, num_classes: int) -> Tensor:
        """Logits (N, K) of the classifier theta (n,) on what `embed` returned; differentiable."""
        parameters = self.layout(num_classes).unflatten(theta)
        return cast(Tensor, functional_call(self._template(num_classes), parameters, (inputs,)))


class ConvNet(nn.Module):
    """3x3 convolutions without bias, ReLU, global average pool, one Linear.

    Args:
        strides: One per convolution; with 16, 32 channels and strides 2, 1 this is CNN-5K.
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...], strides: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        ins = (channels, *widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False)
            for i, o, s in zip(ins, widths, strides, strict=True)
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K)
        """Logits."""
        for conv in self.convs:
            x = F.relu(conv(x))
        # not mean(): its gradient is laid out anew for every pixel, half of a training step on CPU
        return cast(Tensor, self.fc(x.sum((2, 3)) / (x.shape[2] * x.shape[3])))


class ConvFamily(Family):
    """Small CNNs, all of whose parameters are generated (PAPER: CNN-5K and its larger sizes)."""

    def __init__(
        self,
        name: str,
        *,
        channels: int,
        image_size: int,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        super().__init__(name, channels=channels, image_size=image_size)
        self.widths, self.strides = widths, strides

    def module(self, num_classes: int) -> nn.Module:
        """The whole network."""
        return ConvNet(self.channels, self.widths, self.strides, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a projection where the shape changes."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(ins, outs, 1, stride=stride, bias=False), nn.BatchNorm2d(outs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20Trunk(nn.Module):
    """ResNet-20 (widths 16, 32, 64) up to its pooled features (N, 64)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        blocks = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
        blocks += [(32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*[BasicBlock(*block) for block in blocks])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 64)."""
        return cast(Tensor, self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Head(nn.Module):
    """One Linear on frozen features."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, K)."""
        return cast(Tensor, self.fc(x))


class ResNet20Head(Family):
    """A frozen ResNet-20 trunk, trained with the generic model; the head is generated."""

    trains_trunk = True

    def module(self, num_classes: int) -> nn.Module:
        """The head."""
        return Head(64, num_classes)

    def new_trunk(self) -> nn.Module:
        """An untrained trunk."""
        return ResNet20Trunk(self.channels)


class OnLargerImages(Family):
    """A head on a trunk that was trained elsewhere, on larger images than most data sets have.

    The trunk resizes whatever it is given, so a photograph keeps all that it can see there: made as
    small as the data set's images first, it would be told less well (docs/log.md).
    """

    @property
    def side(self) -> int:
        """What trunks resize to: EfficientNet-Lite0 and ViT-B/32 were trained at the same."""
        return SIDE

    def look_at(self, photographs: Tensor) -> Tensor:
        """See `Family.look_at`; as the trunk resizes a data set's images, floats that overshoot."""
        cut = square(photographs)
        cut = cut.float().div_(255) if cut.dtype == torch.uint8 else cut
        return resize(cut, self.side, mode="bicubic")


class EfficientNetLite0Head(OnLargerImages):
    """EfficientNet-Lite0 as it was trained on ImageNet, frozen; the head is generated."""

    trains_trunk = True
    on_imagenet = True
    batch = 16

    def module(self, num_classes: int) -> nn.Module:
        """The head."""
        return Head(FEATURES, num_classes)

    def new_trunk(self) -> ImageNetTrunk:
        """A trunk whose neck is not fitted yet."""
        return ImageNetTrunk()

    def trained_part(self, trunk: nn.Module) -> nn.Module:
        """The neck."""
        return cast(nn.Module, trunk.neck)


class ClipImageTrunk(nn.Module):
    """A CLIP image tower; features have unit norm times sqrt(F), so that a value is about 1."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._encode = encode

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, F)."""
        features = F.normalize(self._encode(x * 0.5 + 0.5), dim=-1)
        return features * features.shape[-1] ** 0.5

    def __deepcopy__(self, memo: dict[int, object]) -> ClipImageTrunk:
        """Itself: it holds nothing that could be changed."""
        return self


class VitB32Head(OnLargerImages):
    """CLIP's own image tower, frozen; the head on its 512 features is generated."""

    on_clip = True

    def module(self, num_classes: int) -> nn.Module:
        """The head."""
        return Head(512, num_classes)


# Widths as in PAPER.md: 5,370, 14,586 and 33,338 parameters for ten classes at 32x32; 70,202 is
# one more convolution. A convolution that widens beyond 32 channels halves the side.
FAMILIES: Mapping[str, Callable[..., Family]] = {
    "cnn5k": partial(ConvFamily, widths=(16, 32), strides=(2, 1)),
    "cnn15k": partial(ConvFamily, widths=(16, 32, 32), strides=(2, 1, 1)),
    "cnn33k": partial(ConvFamily, widths=(16, 32, 32, 64), strides=(2, 1, 1, 2)),
    "cnn70k": partial(ConvFamily, widths=(16, 32, 32, 64, 64), strides=(2, 1, 1, 2, 1)),
    "resnet20_head": ResNet20Head,
    "efficientnet_lite0_head": EfficientNetLite0Head,
    "vitb32_head": VitB32Head,
}


def build_family(name: str, *, channels: int, image_size: int) -> Family:
    """The family of that name for images (N, C, H, W).

    Raises:
        ConfigError: No such family; the message lists them.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name](name, channels=channels, image_size=image_size)


def useful_side(name: str) -> int:
    """H and W beyond which a family of that name has images made smaller, if nothing else is said.

    Raises:
        ConfigError: No such family.
    """
    return build_family(name, channels=3, image_size=LARGEST_DEFAULT_SIZE).side
