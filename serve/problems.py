"""Errors as problem details (RFC 9457). `type` is stable; `KINDS` has them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from tina.schemas import Fault, ProblemDocument

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
MAX_NAME = 60  # characters of a name that the caller chose
KINDS = {
    "malformed": (400, "The body cannot be read"),
    "unauthorised": (401, "A bearer token is needed"),
    "unknown-path": (404, "There is nothing here"),
    "unknown-model": (404, "No model has this id"),
    "wrong-method": (405, "The path has other methods"),
    "not-acceptable": (406, "None of the accepted media types can be had"),
    "too-slow": (408, "The request did not come in time"),
    "checkpoint-gone": (410, "The model's checkpoint is no longer served"),
    "prompt-gone": (410, "The model's prompt is no longer stored"),
    "too-large": (413, "The request is too large"),
    "unsupported-media-type": (415, "The body has an unknown media type"),
    "invalid": (422, "The request cannot be served as it is"),
    "unfamiliar": (422, "The prompt is far from all that the generator was trained on"),
    "internal": (500, "The server made a mistake"),
    "overloaded": (503, "The server has more to do than it can hold"),
}


class Problem(Exception):
    """An answer that is an error; travels between replicas as a value.

    Args:
        kind: One of `KINDS`.
        detail: What is wrong, in one line.
        faults: The parts of the request at fault.
    """

    def __init__(self, kind: str, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(kind, detail, faults)
        self.kind, self.detail, self.faults = kind, detail, list(faults)
        self.status, self.title = KINDS[kind]

    @classmethod
    def of_field(cls, field: str, detail: str, kind: str = "invalid") -> Problem:
        """One part of the request is at fault."""
        field = brief(field)
        return cls(kind, f"{field} {detail}", [Fault(field=field, detail=detail)])

    def document(self, request_id: str) -> ProblemDocument:
        """The body of the answer."""
        return ProblemDocument(
            type=f"urn:tina:problem:{self.kind}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            instance=f"urn:tina:request:{quote(request_id)}",
            errors=self.faults,
        )


def brief(name: str) -> str:
    """A name as an answer repeats it: it may be as long as the body that it came in."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"


def overloaded() -> Problem:
    """There is more to do than can be done in time."""
    return Problem("overloaded", f"try again in {RETRY_AFTER_S} s")


def kind_of(status: int) -> str:
    """The kind for a status that the web framework raised."""
    found = {404: "unknown-path", 405: "wrong-method", 413: "too-large", 503: "overloaded"}
    return found.get(status, "malformed" if status < 500 else "internal")
