"""The HTTP calls, over any backend: FastAPI, no torch, no state.

`tina.schemas` is the only source of the OpenAPI document. Every error is a problem document, but
for a static file's range that there is not and a CORS preflight that is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import mimeparse
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from serve.bodies import MAX_HEADER, read_pictures, read_prompt
from serve.ids import Ids, Recipe
from serve.made import Made
from serve.openapi import PREDICTION, PROMPT, WEIGHTS, describe, problems
from serve.plumbing import install
from serve.problems import Problem
from tina.schemas import (
    MEDIA_TYPES,
    Format,
    Info,
    ModelReply,
    ModelRequest,
    Prediction,
    PredictReply,
)

READY_S = 5
VARY = {"Vary": "Accept"}
STATIC = Path(__file__).parent / "static"


class Backend(Protocol):
    """What makes models; raises `Problem` for what a request gets wrong, or where it is full."""

    async def create(self, request: ModelRequest, format: Format) -> Made:
        """A model for a new prompt."""

    async def fetch(self, recipe: Recipe, format: Format) -> Made:
        """The model of a recipe again."""

    async def predict(self, recipe: Recipe, images: Sequence[bytes]) -> list[list[float]]:
        """Class probabilities (N, K)."""

    async def info(self) -> Info:
        """What is served."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call.

    Args:
        token: Bearer token of `/v1`; empty for none.
        origins: Web origins besides the service's own whose scripts may call.
    """

    token: str = ""
    origins: tuple[str, ...] = ()


class Pages(StaticFiles):
    """The playground; a browser asks each time, or a page would run another version's script."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As Starlette has it."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


SCHEME = HTTPBearer(auto_error=False)


class Guard:
    """Lets requests pass that carry the token."""

    def __init__(self, access: Access) -> None:
        self._token = access.token.encode()

    async def __call__(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(SCHEME)]
    ) -> None:
        """As FastAPI's dependencies are called."""
        found = given.credentials.encode() if given else b""
        if self._token and not hmac.compare_digest(found, self._token):
            raise Problem("unauthorised", "the header Authorization: Bearer is missing or wrong")


def negotiate(request: Request, format: Format | None) -> Format:
    """The format of the answer: the query's, else the best that `Accept` allows.

    Raises:
        Problem: None of them is acceptable, or `Accept` is too long to be looked at.
    """
    if format:
        return format
    accept = ", ".join(request.headers.getlist("accept")).lower() or "*/*"
    if len(accept) > MAX_HEADER:
        raise Problem("not-acceptable", f"an Accept header has at most {MAX_HEADER} characters")
    names: dict[str, Format] = {media: name for name, media in MEDIA_TYPES.items()}
    ranges = [media for media in accept.split(",") if _readable(media)]
    # the last of equals is taken
    best = mimeparse.best_match(list(reversed(names)), ",".join(ranges)) if ranges else ""
    if not best:
        raise Problem("not-acceptable", f"to be had: {', '.join(names)}")
    return names[best]


def _readable(media: str) -> bool:
    try:
        mimeparse.parse_media_range(media)
    except mimeparse.MimeTypeParseException:
        return False
    return True


def build_api(
    backend: Backend,
    ids: Ids,
    access: Access,
    *,
    full: Callable[[str], bool] = lambda path: False,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        full: Whether the backend would refuse whatever a path asks of it.
    """
    # the pages of the documentation come from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    pages = Pages(directory=STATIC)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(Guard(access))])

    @v1.post(
        "/models",
        status_code=201,
        response_model=ModelReply,
        responses=problems(400, 401, 406, 408, 413, 415, 422) | {201: {"content": WEIGHTS}},
        openapi_extra=PROMPT,
    )
    async def create_model(request: Request, format: Format | None = None) -> Response:
        """Generate a classifier for a prompt."""
        chosen = negotiate(request, format)
        made = await backend.create(await read_prompt(request), chosen)
        name = ids.short(made.recipe)
        if name is None:
            name = await run_in_threadpool(ids.issue, made.recipe)
        path = _path(request, name)
        response = _answer(made, name, chosen, path)
        response.status_code = 201
        response.headers["Location"] = path
        return response

    @v1.get(
        "/models/{id}",
        response_model=ModelReply,
        responses=problems(401, 404, 406, 410, 422)
        | {200: {"content": WEIGHTS}, 304: {"description": "Not modified"}},
    )
    async def get_model(id: str, request: Request, format: Format | None = None) -> Response:
        """The same classifier again."""
        chosen = negotiate(request, format)
        recipe = await run_in_threadpool(ids.read, id)
        kept = "private" if access.token else "public"
        if chosen == "json":  # warnings and links may be others tomorrow
            found = await backend.fetch(recipe, chosen)
            response = _answer(found, id, chosen, _path(request, id))
            response.headers["Cache-Control"] = f"{kept}, no-cache"
            return response
        tag = entity_tag(id, chosen)
        held = ", ".join(request.headers.getlist("if-none-match"))
        known = tag.removeprefix("W/") in re.findall(r'"[^"]*"', held)
        # no replica need be asked for what the caller has, also where its checkpoint has gone
        made = None if known else await backend.fetch(recipe, chosen)
        if made is None or held.strip() == "*":
            response = Response(status_code=304, headers=VARY)
        else:
            response = _answer(made, id, chosen, _path(request, id))
        response.headers["Cache-Control"] = f"{kept}, max-age=31536000, immutable"
        response.headers["ETag"] = tag
        if access.origins:  # also without one: the same answer may be kept for another caller
            response.headers.add_vary_header("Origin")
        return response

    @v1.post(
        "/models/{id}/predict",
        responses=problems(400, 401, 404, 408, 410, 413, 415, 422),
        openapi_extra=PREDICTION,
    )
    async def predict(id: str, request: Request) -> PredictReply:
        """Classify pictures."""
        recipe = await run_in_threadpool(ids.read, id)
        found = await backend.predict(recipe, await read_pictures(request))
        classes = list(recipe.classes)
        return PredictReply(
            classes=classes,
            predictions=[
                Prediction(label=classes[row.index(max(row))], probabilities=row) for row in found
            ],
        )

    @v1.get("/info", responses=problems(401))
    async def info() -> Info:
        """What is served, and its limits."""
        return await backend.info()

    app.include_router(v1)

    @app.get("/healthz", responses=problems())
    async def healthz() -> dict[str, str]:
        """Whether this process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems())
    async def readyz() -> dict[str, str]:
        """Whether models can be made."""
        try:
            await asyncio.wait_for(backend.info(), READY_S)
        except TimeoutError:
            raise Problem("overloaded", f"no generator answered in {READY_S} s") from None
        return {"status": "ready"}

    @app.get("/", include_in_schema=False)
    async def playground(request: Request) -> Response:
        return await pages.get_response("index.html", request.scope)

    install(app, origins=access.origins, full=full)
    describe(app)
    app.mount("/static", pages)
    return app


def entity_tag(name: str, format: Format) -> str:
    """Weak: replicas that batch differently agree to 1e-5, not to the bit."""
    return f'W/"{hashlib.sha256(f"{format} {name}".encode()).hexdigest()[:32]}"'


def _path(request: Request, name: str) -> str:
    """Of a model, with the prefix that the service is mounted at."""
    return f"{request.scope.get('root_path', '')}/v1/models/{name}"


def _answer(made: Made, name: str, format: Format, path: str) -> Response:
    headers = dict(VARY)
    if format != "json":
        words = "-".join(re.findall(r"[a-z0-9]+", " ".join(made.recipe.classes).lower()))
        file = f"tina-{words[:60] or 'model'}.{format}"
        headers["Content-Disposition"] = f'attachment; filename="{file}"'
        return Response(made.content, media_type=MEDIA_TYPES[format], headers=headers)
    recipe = made.recipe
    reply = ModelReply(
        id=name,
        classes=list(recipe.classes),
        familiarity=list(made.familiarity),
        nearest=list(made.nearest),
        warnings=list(made.warnings),
        seed=recipe.seed,
        steps=recipe.steps,
        guidance=recipe.guidance,
        family=made.family,
        parameters=made.parameters,
        input_shape=list(made.input_shape),
        checkpoint=recipe.checkpoint,
        links={
            "safetensors": f"{path}?format=safetensors",
            "onnx": f"{path}?format=onnx",
            "predict": f"{path}/predict",
        },
    )
    return Response(reply.model_dump_json(), media_type=MEDIA_TYPES[format], headers=headers)
