"""Request bodies: read with a limit, by their media type; JSON or multipart."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.types import Message

from serve.problems import Problem, brief
from tina.schemas import (
    MAX_BODY_BYTES,
    MAX_CHARACTERS,
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    Fault,
    ModelRequest,
    PredictRequest,
)

JSON, MULTIPART = "application/json", "multipart/form-data"
SHOTS = ("images", "examples")  # fields of a prompt with pictures for each class
MAX_FAULTS = 20  # of one answer
MAX_ERRORS = 1000  # to choose those from
# What has no more commas has hardly more values, of which each takes a hundred times its bytes.
MAX_COMMAS = 2 * MAX_CLASSES * (MAX_CHARACTERS + MAX_IMAGES)
PIECE = 2**14  # bytes of a form that are parsed at once: thousands of small parts take long
MAX_HEADER = 1000  # characters of one whose parameters are parsed, in quadratic time
CHARSETS = {"utf-8", "utf8", "us-ascii"}  # another's codec may be slow, its name is kept for ever
READ_S = 50  # less than a request may take in cluster/, where Ray would answer

Schema = TypeVar("Schema", bound=BaseModel)


def parse(schema: type[Schema], body: bytes) -> Schema:
    """A JSON body as its schema has it.

    Raises:
        Problem: It is not JSON, or not as the schema has it.
    """
    if body.count(b",") > MAX_COMMAS:
        raise Problem("too-large", f"a body holds at most {MAX_COMMAS} commas")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise Problem("invalid", f"the body has {error.error_count()} faults") from None
        found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise Problem("malformed", found[0]["msg"]) from None
        raise faults_of(found) from None


def faults_of(errors: Sequence[Any]) -> Problem:
    """What pydantic found wrong, as a problem."""
    faults = []
    for error in errors[:MAX_FAULTS]:
        loc = error["loc"]
        parts = (f"[{part}]" if isinstance(part, int) else f".{brief(part)}" for part in loc)
        faults.append(Fault(field="".join(parts).lstrip("."), detail=error["msg"]))
    # what is wrong with the whole body is in no field
    detail = "; ".join(": ".join(filter(None, [x.field, x.detail])) for x in faults[:3])
    return Problem("invalid", detail, faults)


def media_type(request: Request) -> str:
    """JSON or multipart.

    Raises:
        Problem: Another one, or none.
    """
    given = request.headers.get("content-type", "")
    if len(given) > MAX_HEADER:
        most = f"at most {MAX_HEADER} characters"
        raise Problem("unsupported-media-type", f"a Content-Type header has {most}")
    kind = given.split(";")[0].strip().lower()
    if kind not in (JSON, MULTIPART):
        raise Problem("unsupported-media-type", f"a body is {JSON} or {MULTIPART}, not {kind!r}")
    return kind


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        Problem: It is too large, or does not come in time; the rest is not read.
    """
    too_large = Problem("too-large", f"a body holds at most {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(READ_S):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Problem("too-slow", f"a body is sent within {READ_S} s") from None
    return b"".join(parts)


async def read_form(
    request: Request, files: re.Pattern[str], *, known: str, most: int
) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """A multipart body: its prompt and text parts by name, and its other files in their order.

    Args:
        files: What the names of file parts look like.
        known: The same in words.
        most: File parts; the rest is not read.

    Raises:
        Problem: It is too large, not multipart, of an odd charset, or has more file parts or one of
            another name.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    charset = options.get(b"charset", b"utf-8").decode("latin-1").lower()
    if charset not in CHARSETS:
        raise Problem("unsupported-media-type", f"a form is utf-8, not {brief(charset)!r}")
    body = await read_body(request)
    if (boundary := options.get(b"boundary")) and b"--" + boundary + b"--" not in body:
        raise Problem("malformed", "the form is cut off: it has no closing boundary")
    starts = iter(range(0, len(body), PIECE))

    async def receive() -> Message:
        await asyncio.sleep(0)  # other requests have their turn
        end = next(starts, len(body)) + PIECE
        return {
            "type": "http.request",
            "body": body[end - PIECE : end],
            "more_body": end < len(body),
        }

    texts, found = {}, []
    limits = {"max_files": most, "max_fields": 8, "max_part_size": MAX_BODY_BYTES}
    try:
        async with Request(request.scope, receive).form(**limits) as form:
            for name, value in form.multi_items():
                if name in texts:
                    raise Problem.of_field(name, "is there twice")
                if isinstance(value, str):
                    texts[name] = value.encode()
                elif name == "prompt":  # to browsers whatever has a content type is a file
                    texts[name] = await value.read()
                elif not files.fullmatch(name):
                    raise Problem.of_field(name, f"is a file part; known are {known}")
                else:
                    content = await value.read()
                    check_image(name, content)
                    found.append((name, content))
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise Problem.of_field(known, f"are more than {most} file parts") from None
        raise Problem("malformed", error.detail) from None
    return texts, found


def check_image(field: str, content: bytes) -> None:
    """Refuse a picture file that is empty or too large.

    Raises:
        Problem: It is.
    """
    if not content:
        raise Problem.of_field(field, "is empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise Problem.of_field(field, f"has more than {MAX_IMAGE_BYTES} bytes", "too-large")


async def read_prompt(request: Request) -> ModelRequest:
    """The prompt of `POST /v1/models`.

    As multipart: a part `prompt` with the JSON, and file parts `images[0]`, `images[1]`, ..., or
    `examples[0]`, ..., any number for each class, of the latter also none.

    Raises:
        Problem: See `parse`, `read_form`.
    """
    if media_type(request) == JSON:
        prompt = parse(ModelRequest, await read_body(request))
        for field in SHOTS:
            for i, of_class in enumerate(getattr(prompt, field) or []):
                for j, content in enumerate(of_class):
                    check_image(f"{field}[{i}][{j}]", content)
        return prompt
    most = MAX_CLASSES * MAX_IMAGES
    names = re.compile(rf"({'|'.join(SHOTS)})\[(\d{{1,3}})\]")
    known = "prompt, images[0], ..., examples[0], ..."
    texts, files = await read_form(request, names, known=known, most=most)
    if "prompt" not in texts:
        raise Problem.of_field("prompt", "is missing: a part with the request's JSON")
    if odd := texts.keys() - {"prompt"}:
        raise Problem.of_field(min(odd), "is no part: what goes with the prompt is in its JSON")
    prompt = parse(ModelRequest, texts["prompt"])
    shots: dict[str, list[list[bytes]]] = {field: [[] for _ in prompt.classes] for field in SHOTS}
    for field in SHOTS:
        if getattr(prompt, field) is not None:
            raise Problem.of_field(f"prompt.{field}", "come as file parts in multipart")
    for name, content in files:
        field, index = name.rstrip("]").split("[")
        if int(index) >= len(prompt.classes):
            raise Problem.of_field(name, f"has no class: there are {len(prompt.classes)}")
        of_class = shots[field][int(index)]
        if len(of_class) == MAX_IMAGES:
            raise Problem.of_field(name, f"are more than {MAX_IMAGES}")
        of_class.append(content)
    given = {field: each for field, each in shots.items() if any(each)}
    if [] in given.get("images", []):
        first = shots["images"].index([])
        raise Problem.of_field(f"images[{first}]", "is missing: a picture for every class")
    return prompt.model_copy(update=given)


async def read_pictures(request: Request) -> list[bytes]:
    """The picture files of a prediction; as multipart in file parts `images`, beside no others.

    Raises:
        Problem: See `parse`, `read_form`.
    """
    if media_type(request) == JSON:
        images = parse(PredictRequest, await read_body(request)).images
        for i, image in enumerate(images):
            check_image(f"images[{i}]", image)
        return list(images)
    names = re.compile("images")
    texts, files = await read_form(request, names, known="images", most=MAX_IMAGES)
    if texts:  # often `-F images=a.png`, without the @ that makes curl send the file
        raise Problem.of_field(min(texts), "is refused: a form holds files called images alone")
    if not files:
        raise Problem.of_field("images", "are missing: a file part for each")
    return [content for _, content in files]
