"""A Python client of the endpoint, sync and async; the one file of the library that speaks HTTP.

    with Client("http://localhost:8000") as tina:
        model = tina.create(["otter", "bicycle", "maple tree"], seed=0)
        Path("mine.safetensors").write_bytes(tina.weights(model.id))
        print(tina.predict(model.id, [Path("photo.png")]).predictions[0].label)

Every call may be repeated: an answer of 408 (but for a body that came too slowly), 429, 502, 503
or 504, a time-out and a broken connection are retried, when `Retry-After` says, or after a delay
that doubles. Where it says more than 30 s the error is raised at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Generator, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from tina.checks import visible
from tina.errors import ConfigError, DataError, PromptError, TinaError
from tina.names import read_prompt
from tina.schemas import (
    MEDIA_TYPES,
    Info,
    ModelReply,
    ModelRequest,
    PredictReply,
    ProblemDocument,
)

RETRIED = {408, 429, 502, 503, 504}
PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.ProxyError, httpx.RemoteProtocolError)
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 30.0

Reply = TypeVar("Reply", bound=BaseModel)
T = TypeVar("T")
Weights = Literal["safetensors", "onnx"]
Picture = bytes | str | Path
Answer = httpx.Response | httpx.RequestError | None
Flow = Generator[httpx.Request | float, Answer, T]
"""Yields requests to be sent and seconds to wait; both clients drive the same one."""


class Prompt(TypedDict, total=False):
    """Options of `create`; see `tina.schemas.ModelRequest`."""

    descriptions: Sequence[str | Sequence[str] | None] | None
    images: Sequence[Sequence[Picture]] | None
    examples: Sequence[Sequence[Picture] | None] | None
    seed: int
    steps: int | None
    guidance: float | None
    strict: bool


class ServiceError(TinaError):
    """The service answered with an error, or not at all.

    Args:
        problem: Its problem document, if it sent one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, problem: ProblemDocument | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.problem = status, problem


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; None where it says none, or what cannot be read."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _error(response: httpx.Response) -> ServiceError:
    try:
        problem = ProblemDocument.model_validate_json(response.content)
    except ValidationError:
        return ServiceError(
            f"the service answered {response.status_code}",
            status=response.status_code,
            problem=None,
        )
    message = f"{problem.title}: {problem.detail}" if problem.detail else problem.title
    return ServiceError(message, status=response.status_code, problem=problem)


def _check_shots(
    given: Sequence[Sequence[Picture] | None] | None, *, classes: int, least: int
) -> None:
    """Make sure that pictures, where there are any, are a list for each class.

    Args:
        least: Classes whose list must not be empty.

    Raises:
        PromptError: They are not, or too few classes have some.
    """
    if given is None:
        return
    if isinstance(given, Picture) or any(isinstance(shots, Picture) for shots in given):
        raise PromptError("pictures are a list for each class, also where there is one")
    if len(given) != classes:
        raise PromptError(f"{classes} classes need as many lists of pictures, got {len(given)}")
    if (found := sum(map(bool, given))) < least:
        raise PromptError(f"pictures are needed of at least {least} of the classes, not of {found}")


def _file(picture: object) -> bytes:
    if not isinstance(picture, Picture):
        kind = type(picture).__name__
        raise PromptError(f"a picture is the path of a file, or its content, got a {kind}")
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {picture}: {error.strerror}") from error


def _path(id: str) -> str:
    if not isinstance(id, str) or not id:
        raise PromptError(f"a model's id is text, got {id!r}")
    return f"/v1/models/{quote(id, safe='')}"


class _Calls:
    """What both clients ask for.

    Args:
        base_url: Such as http://localhost:8000.
        token: Bearer token, where the service wants one; white space around it does not count.
        timeout: Seconds for each step of an attempt: to connect, to send and to read a part. An
            answer that comes in many parts may take longer.
        retries: Attempts after the first.

    Raises:
        ConfigError: `base_url` is no URL, `token` none that a header carries, or `retries` below 0.
    """

    def __init__(
        self, base_url: str, *, token: str = "", timeout: float = 65.0, retries: int = 5
    ) -> None:
        if retries < 0:
            raise ConfigError(f"retries must not be negative, got {retries}")
        self._retries = retries
        token = token.strip()
        visible("token", token)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"base_url is no URL: {error}, got {base_url!r}") from None
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": headers,
            "timeout": timeout,
        }
        self._http: Any  # httpx.Client or httpx.AsyncClient: requests are built alike

    def _send(self, method: str, path: str, **options: Any) -> Flow[httpx.Response]:
        delay, wait = FIRST_DELAY_S, 0.0
        for attempt in range(self._retries + 1):
            if attempt:
                yield wait
            answer = yield self._http.build_request(method, path, **options)
            named = None
            if isinstance(answer, httpx.Response):
                if answer.is_success:
                    return answer
                failure = _error(answer)
                problem = failure.problem
                # over a line that is too slow for it, a body would only be sent again
                slow = problem is not None and problem.type.endswith(":too-slow")
                passing = answer.status_code in RETRIED and not slow
                named = _retry_after(answer)
            else:
                reason = str(answer) or type(answer).__name__
                failure = ServiceError(f"the service cannot be reached: {reason}")
                passing = isinstance(answer, PASSING)
            wait = delay if named is None else named
            if not passing or wait > LONGEST_DELAY_S:
                raise failure
            delay = min(2 * delay, LONGEST_DELAY_S)
        raise failure

    def _read(self, schema: type[Reply], method: str, path: str, **options: Any) -> Flow[Reply]:
        response = yield from self._send(method, path, **options)
        try:
            return schema.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceError(
                f"the service answered what is no {schema.__name__}: {error.errors()[0]['msg']}",
                status=response.status_code,
            ) from error

    def _info(self) -> Flow[Info]:
        return self._read(Info, "GET", "/v1/info")

    def _model(self, id: str) -> Flow[ModelReply]:
        return self._read(ModelReply, "GET", _path(id))

    def _create(self, classes: str | Sequence[str], **options: Unpack[Prompt]) -> Flow[ModelReply]:
        if isinstance(classes, str):
            classes, options["descriptions"] = read_prompt(classes, options.get("descriptions"))
        pictures = {
            "images": options.pop("images", None),
            "examples": options.pop("examples", None),
        }
        for field, given in pictures.items():
            least = len(classes) if field == "images" else 2
            _check_shots(given, classes=len(classes), least=least)
        if isinstance(texts := options.get("descriptions"), (list, tuple)):
            options["descriptions"] = [list(x) if isinstance(x, tuple) else x for x in texts]
        try:
            request = ModelRequest.model_validate({"classes": list(classes), **options})
        except ValidationError as error:
            first = error.errors()[0]
            raise PromptError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        text = request.model_dump_json(exclude_defaults=True)
        parts: dict[str, Any] = {"content": text, "headers": {"content-type": MEDIA_TYPES["json"]}}
        files = [
            (f"{field}[{i}]", ("image", _file(shot)))
            for field, given in pictures.items()
            for i, shots in enumerate(given or ())
            for shot in shots or ()
        ]
        if files:
            parts = {"data": {"prompt": text}, "files": files}
        return (yield from self._read(ModelReply, "POST", "/v1/models", **parts))

    def _weights(self, id: str, format: str) -> Flow[bytes]:
        response = yield from self._send("GET", _path(id), params={"format": format})
        return response.content

    def _predict(self, id: str, images: Sequence[Picture]) -> Flow[PredictReply]:
        if isinstance(images, Picture):
            raise PromptError("pictures are a list, also where there is one")
        if not images:
            raise PromptError("there is no picture to classify")
        files = [("images", ("image", _file(image))) for image in images]
        path = f"{_path(id)}/predict"
        return (yield from self._read(PredictReply, "POST", path, files=files))


class Client(_Calls):
    """Blocking client; a context manager."""

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections; of a client that is used without `with`."""
        self._http.close()

    def _run(self, flow: Flow[T]) -> T:
        answer: Answer = None
        try:
            while True:
                step = flow.send(answer)
                answer = None
                if isinstance(step, float):
                    time.sleep(step)
                    continue
                try:
                    answer = self._http.send(step)
                except httpx.RequestError as error:
                    answer = error
        except StopIteration as end:
            found: T = end.value
            return found

    def info(self) -> Info:
        """What is served, and its limits."""
        return self._run(self._info())

    def create(self, classes: str | Sequence[str], **options: Unpack[Prompt]) -> ModelReply:
        """Generate a classifier.

        Args:
            classes: Their names, or a sentence, see `tina.names.read_sentence`.

        Raises:
            PromptError: The prompt is refused before it is sent.
            ServiceError: The service refuses it, or cannot be reached.
        """
        return self._run(self._create(classes, **options))

    def model(self, id: str) -> ModelReply:
        """A classifier that was generated before."""
        return self._run(self._model(id))

    def weights(self, id: str, format: Weights = "safetensors") -> bytes:
        """A classifier's weights, as a file's content."""
        return self._run(self._weights(id, format))

    def predict(self, id: str, images: Sequence[Picture]) -> PredictReply:
        """Classify pictures: files, or their contents."""
        return self._run(self._predict(id, images))


class AsyncClient(_Calls):
    """The same calls for asyncio; an asynchronous context manager."""

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`."""
        await self._http.aclose()

    async def _run(self, flow: Flow[T]) -> T:
        answer: Answer = None
        try:
            while True:
                step = flow.send(answer)
                answer = None
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                try:
                    answer = await self._http.send(step)
                except httpx.RequestError as error:
                    answer = error
        except StopIteration as end:
            found: T = end.value
            return found

    async def info(self) -> Info:
        """See `Client.info`."""
        return await self._run(self._info())

    async def create(self, classes: str | Sequence[str], **options: Unpack[Prompt]) -> ModelReply:
        """See `Client.create`."""
        return await self._run(self._create(classes, **options))

    async def model(self, id: str) -> ModelReply:
        """See `Client.model`."""
        return await self._run(self._model(id))

    async def weights(self, id: str, format: Weights = "safetensors") -> bytes:
        """See `Client.weights`."""
        return await self._run(self._weights(id, format))

    async def predict(self, id: str, images: Sequence[Picture]) -> PredictReply:
        """See `Client.predict`."""
        return await self._run(self._predict(id, images))
