"""How names are written and compared, and which are strange to a generator."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

FAMILIAR = 0.5
"""Familiarity below which a class is called far from all that the generator was trained on."""


def clean(text: str) -> str:
    """Letters composed with their accents; underscores and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())


def normalise_name(name: str) -> str:
    """`clean`, in lower case: names that are equal so are one prompt."""
    return clean(name).lower()


def unfamiliar(
    names: Sequence[str], familiarity: Sequence[float], threshold: float = FAMILIAR
) -> dict[int, str]:
    """Index and warning of each class whose familiarity is below a threshold."""
    far = "is not close to anything the generator was trained on"
    return {i: f"{names[i]!r} {far}" for i, x in enumerate(familiarity) if x < threshold}
