"""What a trunk that was trained elsewhere lends: the classes that it was trained to tell apart.

EfficientNet-Lite0 comes with ImageNet's own classifier. Through the neck its rows are rows like
those that are trained here, so a generator of heads on it knows ImageNet's names beside its data
set's, and inherits of either, without a picture.

Axes: V trained names, W names that are lent, E embedding width, R values of a head row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tina.backbone import ImageNetTrunk
from tina.encoders import PromptEncoder, TableEncoder
from tina.names import normalise_name
from tina.prompts import SHARPNESS, Vocabulary

LENGTH = 0.7
"""Of rows that are lent, in lengths of those that were trained here: so neither outbid the others
where a task has both. Chosen on `select` images (docs/log.md)."""
APART = 1 - 1.01 / SHARPNESS
"""Names with a larger centred cosine would make mixtures of all names sharper, so that each is told
from the others: one of two such is lent."""


def borrow(vocabulary: Vocabulary, encoder: PromptEncoder, *, classes: int) -> Vocabulary:
    """A vocabulary in which ImageNet's names are trained ones too.

    But for those that the encoder does not know, and the data set's own: what was trained here
    comes first, and what was kept out of it stays new.

    Args:
        classes: So many first names are the data set's.
    """
    from torchvision.models import EfficientNet_B0_Weights  # two seconds

    names = [normalise_name(n) for n in EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]]
    if not isinstance(encoder, TableEncoder):  # of which all words are here
        vocabulary = vocabulary.with_words(names, encoder.encode_text(names))
    places = {name: place for place, name in reversed(list(enumerate(vocabulary.names)))}
    offered = {places[n]: i for i, n in reversed(list(enumerate(names))) if n in places}
    own = torch.nonzero(vocabulary.trained).flatten().tolist()
    asked = own + sorted(place for place in offered if place >= classes)
    units = vocabulary.embeddings[asked]
    units = F.normalize(units - units.mean(0), dim=1)
    near = units @ units.T > APART
    kept = torch.zeros(len(asked), dtype=torch.bool)
    for i in range(len(asked)):
        kept[i] = i < len(own) or not bool((near[i] & kept).any())
    found = [place for place, keep in zip(asked, kept.tolist(), strict=True) if keep]
    trained = vocabulary.trained.clone()
    trained[found] = True
    lent = tuple(offered[place] for place in found[len(own) :])
    return replace(vocabulary, trained=trained, lent=lent)


def lent_rows(trunk: ImageNetTrunk, classes: tuple[int, ...], own: Tensor) -> Tensor:
    """Head rows (W, R) of ImageNet's classes, in proportion to those (V, R) trained here."""
    rows = trunk.classifier()[list(classes)]
    lengths = [part[:, :-1].norm(dim=1).mean() for part in (own, rows)]
    return rows * (LENGTH * lengths[0] / lengths[1])
