"""What a prompt's pictures show, where no CLIP is there to see them.

A classifier of all trained classes names them: a ResNet-20 of its own (`prompt.tower`), trained on
the generic model's images, or else the generic model, which is as small as what is generated.

Axes: N images, C channels, H W sides in pixels, V trained classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tina.errors import CheckpointError
from tina.families import Family, ResNet20Head
from tina.generic import GenericModel, as_tensors, of_tensors
from tina.rounding import in_full


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A classifier of the trained classes, and how it takes images.

    Args:
        lent: How many of them, the last ones, are not the data set's own.
    """

    family: Family
    generic: GenericModel
    lent: int = 0

    def see(self, images: Tensor) -> Tensor:
        """What `posterior` takes, of images (N, C, H, W) of any size, uint8 or float in [0, 1]."""
        return self.family.embed(self.family.look_at(images))

    def posterior(self, inputs: Tensor) -> Tensor:
        """How probable each trained class (V,) is, as all the pictures show one and the same.

        The geometric mean of what each picture says alone: pictures of one class are mistaken
        alike, and their product is too sure of it. Own classes together are as probable before the
        first picture as lent ones, or many of these would stand against each of the few.

        Args:
            inputs: (N, ...), as `see` returned them.
        """
        body, rows = self.generic.body, self.generic.rows
        theta = self.family.layout(len(rows)).join(body, rows)
        evidence = self.family.logits(theta, inputs, num_classes=len(rows)).mean(0)
        if self.lent:
            own = len(rows) - self.lent
            evidence[own:] -= math.log(self.lent / own)
        return evidence.softmax(0)

    def tensors(self) -> dict[str, Tensor]:
        """What `tower_of` takes."""
        return as_tensors(self.generic, self.family)


def tower_family(like: Family) -> ResNet20Head:
    """A tower's family for the same images as another's; its trunk is to be trained or loaded."""
    return ResNet20Head("tower", channels=like.channels, image_size=like.image_size)


def tower_of(tensors: Mapping[str, Tensor], generic: GenericModel, like: Family) -> Tower:
    """A tower from its tensors, of whatever precision.

    Args:
        generic: What must have been trained on the same classes.
        like: The family that takes the same images.

    Raises:
        CheckpointError: It was trained on others, or is of another shape.
    """
    family = tower_family(like)
    found = of_tensors(in_full(tensors), family)
    layout = family.layout(len(generic.class_ids))
    shape = (layout.num_classes, layout.row_size)
    if found.class_ids != generic.class_ids or tuple(found.rows.shape) != shape:
        raise CheckpointError("the image tower was trained on other classes than the generic model")
    return Tower(family=family, generic=found)
