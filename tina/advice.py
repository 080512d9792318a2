"""What to say of words that a checkpoint does not know, or knows nothing near of."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import cache
from textwrap import shorten

from safetensors import safe_open

from tina.errors import PromptError
from tina.model import GeneratedModel
from tina.names import normalise_name, readings
from tina.packaged import PRETRAINED, pretrained

MANY = 5  # names of which more would hide what is said of them


def unknown(names: Sequence[str], known: Sequence[str]) -> PromptError:
    """The error of names that nothing can embed.

    Args:
        known: All that the checkpoint knows.
    """
    said = []
    for name in names[:MANY]:
        close = ", ".join(difflib.get_close_matches(normalise_name(name), known))
        said.append(f"{shorten(name, 60)!r}" + (f" (closest: {close})" if close else ""))
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    others = f"; {found}" if (found := trained_elsewhere(names)) else ""
    if any(":" in name for name in names):
        others += "; colons say several words of a class in a sentence, not in a list of names"
    return PromptError(
        f"the checkpoint does not know {', '.join(said)}{more}",
        advice=f"{others}; `tina info --words CHECKPOINT` lists what it knows, and for any other "
        'text take --encoder sentence or open_clip (encoder="sentence"), or a checkpoint trained '
        "with one of them",
    )


def unfamiliar(model: GeneratedModel, asked: Sequence[Sequence[str]] | None) -> list[str]:
    """Warnings of a model's classes that are far from all that its generator was trained on.

    Args:
        asked: The texts that each class was asked for by; None for pictures.
    """
    warnings = model.unfamiliar()
    # of several texts it is not said which one is strange
    alone = [asked[i][0] for i in warnings if len(asked[i]) == 1] if asked else []
    others = trained_elsewhere(alone)
    return [*warnings.values(), *([others] if others else [])]


def placed(texts: Sequence[str]) -> str:
    """What to say of texts that MiniLM placed among the known words."""
    said = ", ".join(repr(shorten(text, 60)) for text in texts)
    return f"MiniLM placed among the words that the checkpoint knows: {said}"


def trained_elsewhere(names: Sequence[str]) -> str:
    """Which checkpoints that come with Tina were trained on the most of these names, or ""."""
    if not names:
        return ""
    found = {
        checkpoint: [name for name in names if words.intersection(readings(name))]
        for checkpoint, words in _trained().items()
    }
    most = max(found.values(), key=len)
    if not most:
        return ""
    *others, last = [checkpoint for checkpoint, its in found.items() if its == most]
    which = f"{', '.join(others)} and {last} were" if others else f"{last} was"
    return f"{which} trained on {', '.join(repr(shorten(name, 60)) for name in most[:MANY])}"


@cache
def _trained() -> dict[str, set[str]]:
    """By checkpoint that comes with Tina: the names of the classes that it was trained on."""
    found = {}
    for checkpoint in pretrained():
        folder = PRETRAINED / checkpoint
        names = json.loads((folder / "config.json").read_text())["class_names"]
        with safe_open(folder / "prompts.safetensors", "np") as file:
            trained = file.get_tensor("trained")
        found[checkpoint] = {name for name, seen in zip(names, trained, strict=True) if seen}
    return found
