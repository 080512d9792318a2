"""What every request passes: an id, security headers, CORS, and errors as problem documents."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.bodies import faults_of
from serve.problems import MEDIA_TYPE, RETRY_AFTER_S, Problem, kind_of, overloaded

log = logging.getLogger("ray.serve")
HEADER = "X-Request-ID"
LARGE_BYTES = 2**16
MAX_HELD_BYTES = 2**28
MAX_AWAITED = 128  # bodies: half of the requests that an ingress takes at once (`serve.app`)
CROWDED_S = 1  # for the next part of a body beyond those
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class RequestId:
    """Names each request, adds its name and the security headers to the answer.

    Ray Serve logs a request under the header's value, which it makes up where there is none, and
    adds it to the answer itself: a name is made here only where Ray Serve is not in front.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        name = secrets.token_hex(16) if given is None else given
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if given is None:
                    headers[HEADER] = name
                for key, value in SECURITY.items():
                    headers[key] = value
            await send(message)

        await self.app(scope, receive, named)


class Mistakes:
    """Answers what nobody else has: as a handler it would stand outside all that is added here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            return  # in the middle of its upload: nobody is there to be answered
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            request = Request(scope)
            log.error("%s failed", request.state.request_id, exc_info=error)
            problem = Problem("internal", "see the server's log for this request")
            await respond(request, problem)(scope, receive, send)


class Head:
    """Answers HEAD as GET of the whole, without the body (RFC 9110, 9.3.2 and 14.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        await self.app({**scope, "method": "GET", "headers": headers}, receive, bodiless)


class TurnAway:
    """Refuses, before it is read, what would be refused anyway: in a flood that is what counts.

    Every POST asks something of a generator. Of large bodies only so much is in memory at once, and
    only so many may be slow: they would leave no place for anybody else.
    """

    def __init__(self, app: ASGIApp, full: Callable[[str], bool]) -> None:
        self.app, self.full = app, full
        self.held = 0  # bytes of bodies
        self.awaited = 0  # bodies that are not here yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.full(scope["path"]):
            await respond(Request(scope), overloaded())(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            patience = None if self.awaited < MAX_AWAITED else CROWDED_S
            self.awaited += 1
            try:
                async with asyncio.timeout(patience):
                    message = await receive()
            except TimeoutError:
                raise overloaded() from None
            finally:
                self.awaited -= 1
            size = len(message.get("body", b""))
            taken, self.held = taken + size, self.held + size
            if taken > LARGE_BYTES and self.held > MAX_HELD_BYTES:
                raise overloaded()
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.held -= taken


def respond(request: Request, problem: Problem) -> Response:
    """A problem as an answer."""
    name = request.state.request_id
    headers = {"Cache-Control": "no-store"}
    if problem.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if problem.status == 406:
        headers["Vary"] = "Accept"
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = problem.document(name).model_dump_json()
    return Response(body, problem.status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI, *, origins: Sequence[str], full: Callable[[str], bool]) -> None:
    """Add all of this to an application."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return respond(request, problem)

    @app.exception_handler(RequestValidationError)
    async def on_parameters(request: Request, error: RequestValidationError) -> Response:
        return respond(request, faults_of(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_framework(request: Request, error: HTTPException) -> Response:
        response = respond(request, Problem(kind_of(error.status_code), str(error.detail)))
        response.headers.update(error.headers or {})
        if response.headers.get("Allow") == "GET":
            response.headers["Allow"] = "GET, HEAD"  # see Head
        return response

    app.add_middleware(TurnAway, full=full)
    app.add_middleware(Head)
    app.add_middleware(Mistakes)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["Authorization", "Content-Type", HEADER],
        expose_headers=["Content-Disposition", "ETag", "Location", "Retry-After", HEADER],
    )
    app.add_middleware(RequestId)
