"""What a request asks for, as far as it can be refused before anything is made."""

from __future__ import annotations

from serve.problems import Problem
from tina.errors import PromptError
from tina.generator import Generator
from tina.prompts import check_apart, check_prompt, described
from tina.schemas import ModelRequest


def check_request(
    request: ModelRequest, generator: Generator, *, most_steps: int
) -> tuple[tuple[str, ...], tuple[str | tuple[str, ...], ...]]:
    """The class names of a request, and a text or several for each where any is described.

    Raises:
        Problem: They are none, or do not fit what goes with them; or the generator takes no such
            guidance, or so many steps.
    """
    try:
        names = check_prompt(
            request.classes,
            descriptions=request.descriptions,
            images=request.images,
            examples=request.examples,
            max_classes=generator.max_classes,
        )
        for field in ("images", "examples"):
            check_apart(names, getattr(request, field) or [()] * len(names), field=field)
    except PromptError as error:
        raise Problem.of_field(error.field, f"are refused: {error}") from None
    if request.guidance not in (None, 1) and not generator.takes_guidance:
        raise Problem.of_field("guidance", "must be 1: this generator takes no other")
    if request.steps is not None and request.steps > most_steps:
        raise Problem.of_field("steps", f"must be at most {most_steps}")
    if not any(request.descriptions or ()):
        return names, ()
    words = described(names, request.descriptions)
    # one alone is no list, or equal recipes would not have equal ids
    return names, tuple(texts[0] if len(texts) == 1 else texts for texts in words)
