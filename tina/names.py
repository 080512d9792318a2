"""How names are written and compared, in data sets, tables of vectors and prompts alike."""

from __future__ import annotations

import unicodedata


def clean(text: str) -> str:
    """Letters composed with their accents; underscores and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())


def normalise_name(name: str) -> str:
    """`clean`, in lower case: names that are equal so are one prompt."""
    return clean(name).lower()
