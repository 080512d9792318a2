"""How names are written, split and compared, and from where on one is strange to a generator."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import TypeVar

from tina.errors import PromptError

Descriptions = TypeVar("Descriptions")

FAMILIAR = 0.5
"""Familiarity below which a class is called far from all that the generator was trained on."""
PLURALS = (
    *(("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")),
    # the others that people say of what the packaged checkpoints know
    *(("men", "man"), ("people", "person"), ("mice", "mouse"), ("feet", "foot")),
    *(("geese", "goose"), ("oxen", "ox")),
)
"""Endings of English plurals and of their singulars. The least change comes first: "tapes" are of
"tape" where "tap" is known too."""

SEPARATOR = re.compile(
    r"[,;\n]"
    r"|(?<![\w-])(?:vs\.|(?:and/or|and|or|vs|versus)(?![\w-]))"
    r"|(?<!\S)[&/](?!\S)",  # not in "cabinet/shelf", "AT&T"
    flags=re.IGNORECASE,
)


def clean(text: str) -> str:
    """Letters composed with their accents; underscores and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())


def normalise_name(name: str) -> str:
    """`clean`, in lower case: names that are equal so are one prompt."""
    return clean(name).lower()


def readings(name: str) -> Iterator[str]:
    """What a name may be known as, the likeliest first; by rules of English alone.

    As it is written, without its article, with hyphens as spaces, and each of these in the singular
    of its last word: "the Maple-Trees" is a maple tree.
    """
    exact = normalise_name(name)
    spellings = [exact, re.sub(r"^(?:an?|the) ", "", exact)]
    spellings += [clean(spelling.replace("-", " ")) for spelling in spellings]
    yield from spellings
    for spelling in spellings:
        for plural, singular in PLURALS:
            if spelling.endswith(plural) and not spelling.endswith("ss"):
                yield spelling.removesuffix(plural) + singular


def split_sentence(prompt: str) -> list[str]:
    """The class names in a sentence: split at commas, semicolons, "and", "or" and "versus".

    At "&" and "/" too, where white space stands around them. Underscores hold a name together:
    "bow_and_arrow".
    """
    parts = SEPARATOR.split(prompt.strip().rstrip(".?!"))
    return [part.strip() for part in parts if part.strip()]


def read_sentence(prompt: str) -> tuple[list[str], list[tuple[str, ...] | None] | None]:
    """The class names in a sentence, and the words of those that are any of several.

    These stand behind a colon, and semicolons or lines between such classes: "vehicle: bus, train;
    otter". Without a colon as `split_sentence` has it.
    """
    names: list[str] = []
    words: list[tuple[str, ...] | None] = []
    for part in re.split(r"[;\n]", prompt) if ":" in prompt else [prompt]:
        before, colon, several = part.partition(":")
        own = split_sentence(before) or [""] * len(colon)  # which is refused, not lost
        names += own
        words += [None] * len(own)
        if colon:
            words[-1] = tuple(split_sentence(several)) or None
    return names, words if any(words) else None


def read_prompt(
    sentence: str, descriptions: Descriptions
) -> tuple[list[str], Descriptions | list[tuple[str, ...] | None]]:
    """What `read_sentence` finds, with descriptions that are given beside the sentence, or None.

    Raises:
        PromptError: Both say words of classes.
    """
    names, words = read_sentence(sentence)
    if words and descriptions is not None:
        raise PromptError("the sentence describes classes itself", field="descriptions")
    return names, words or descriptions
