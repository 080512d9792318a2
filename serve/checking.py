"""What a request asks for, as far as it can be refused before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.problems import Problem
from tina.errors import PromptError
from tina.generator import Generator
from tina.prompts import check_apart, check_examples, check_task
from tina.schemas import ModelRequest


def check_request(
    request: ModelRequest, generator: Generator, *, most_steps: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of a request, and its descriptions, if any.

    Raises:
        Problem: They are none, or do not fit what goes with them; or the generator takes no such
            guidance, or so many steps.
    """
    most = generator.max_classes
    with _refused("classes"):
        names = check_task(request.classes, max_classes=most)
    if request.guidance not in (None, 1) and not generator.takes_guidance:
        raise Problem.of_field("guidance", "must be 1: this generator takes no other")
    if request.steps is not None and request.steps > most_steps:
        raise Problem.of_field("steps", f"must be at most {most_steps}")
    if request.images is not None:
        for field in ("descriptions", "examples"):
            if getattr(request, field) is not None:
                raise Problem.of_field("images", f"and {field} exclude each other")
    for field in ("images", "descriptions", "examples"):
        given = getattr(request, field)
        if given is not None and len(given) != len(names):
            raise Problem.of_field(field, f"must be {len(names)}, one per class")
    if request.examples is not None:
        with _refused("examples"):
            check_examples([bool(shots) for shots in request.examples])
    for field in ("images", "examples"):
        with _refused(field):
            check_apart(names, getattr(request, field) or [()] * len(names))
    if request.descriptions is None:
        return names, ()
    with _refused("descriptions"):
        check_task(request.descriptions, max_classes=most)
    return names, tuple(request.descriptions)


@contextmanager
def _refused(field: str) -> Iterator[None]:
    """What the library refuses names a field."""
    try:
        yield
    except PromptError as error:
        raise Problem.of_field(field, f"are refused: {error}") from None
