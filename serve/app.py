"""`build_app`: the application for `serve run`, `serve deploy` and a RayService alike.

    serve run serve.app:build_app checkpoint=$PWD/runs/quickstart/checkpoint

Two deployments: a light ingress that speaks HTTP, and the generator, which alone holds torch.
"""

# Annotations are not put off here: Serve looks at `build_app`'s for what its arguments are,
# and passes a plain dictionary where it finds a string.

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.api import Access, build_api
from serve.gate import Gate
from serve.ids import Ids, Recipe, load_key
from serve.made import Made
from serve.problems import RETRY_AFTER_S, Problem, overloaded
from tina.checks import visible
from tina.config import TextEncoder
from tina.errors import ConfigError
from tina.names import FAMILIAR
from tina.packaged import pretrained
from tina.schemas import Format, Info, ModelRequest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


ATTEMPTS = 3  # on another replica each, where one dies; every call may be repeated
LOOKS = 8  # for a replica of an id's checkpoint: in a rolling update some have another
LATELY_S = 60  # for which it counts that a checkpoint was found, or that it was not
INGRESS_ONGOING, INGRESS_QUEUED = 256, 64

log = logging.getLogger("ray.serve")


class ServeArgs(BaseModel):
    """Arguments of the application; an unknown one is refused.

    Secrets come from the environment: TINA_SERVE_TOKEN, a bearer token that guards `/v1`, and
    TINA_SERVE_KEY, which signs ids; without it a key is made in the storage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(description="Absolute path, URI, packaged name, or hub id.")
    encoder: TextEncoder | None = Field(None, description="Of words that it does not know.")
    storage: str = Field("", description="Folder all nodes share; default: beside the checkpoint.")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target_ongoing: float = Field(16, gt=0, description="Requests per replica before it scales.")
    cpus: float = Field(0.5, gt=0, description="CPUs of a generator replica.")
    gpus: float = Field(0, ge=0, description="GPUs of a generator replica; above 0 it runs there.")
    threads: int = Field(1, ge=1, description="Torch threads of a generator replica.")
    ingress_replicas: int = Field(1, ge=1)
    ingress_cpus: float = Field(0.25, gt=0)
    max_batch: int = Field(32, ge=1, description="Prompts of one denoising step.")
    max_steps: int = Field(100, ge=1, description="Denoising steps that a request may ask for.")
    max_queued: int = Field(64, ge=1, description="Requests that wait for a replica, then 503.")
    in_time_s: float = Field(1, gt=0, description="Seconds; requests that would take longer: 503.")
    cache_mb: float = Field(64, ge=0, description="Generated models kept by a replica.")
    keep_s: float = Field(
        86_400, gt=0, description="Seconds that large prompts are kept, 1 GiB at most."
    )
    familiarity_threshold: float = Field(FAMILIAR, ge=0, le=1)
    cors_origins: list[str] = Field([], description="A list, or text with commas.")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, given: object) -> object:
        """What `serve run` passes is text."""
        if not isinstance(given, str):
            return given
        return [origin for part in given.split(",") if (origin := part.strip())]

    @model_validator(mode="after")
    def _ranges(self) -> "ServeArgs":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas, {self.min_replicas}, is above max_replicas, {self.max_replicas}"
            )
        return self


class Remote:
    """The generator deployment as the backend of the HTTP calls."""

    def __init__(self, handle: DeploymentHandle[Any], *, in_time_s: float, at_once: int) -> None:
        self._handle = handle
        # one may stand in a long queue for the denoising pass, the other in none
        self._making, self._predicting = (Gate(in_time_s, least=at_once) for _ in range(2))
        self._found: dict[str, float] = {}  # when a `Recipe.maker` was, by time.monotonic
        self._missed: dict[str, float] = {}  # when none was

    def full(self, path: str) -> bool:
        """Whether a request to that path would be turned away."""
        return (self._predicting if path.endswith("/predict") else self._making).full()

    def _lately(self, when: dict[str, float], maker: str) -> bool:
        return time.monotonic() - when.get(maker, -math.inf) < LATELY_S

    def _is_here(self, maker: str) -> None:
        self._found[maker] = time.monotonic()
        self._missed.pop(maker, None)

    async def _call(self, method: str, *args: object, maker: str = "") -> Any:
        """What a replica answers.

        Args:
            maker: That it must have. A rolling update may leave few such, and a look that
                finds none is no proof: what was found lately is said to be busy, not gone.
        """
        handle = self._handle.options(
            method_name=method,
            # all that travels is of importable classes: no need of the slower cloudpickle
            request_serialization="pickle",
            response_serialization="pickle",
        )
        died, looks = 0, 1 if self._lately(self._missed, maker) else LOOKS
        for look in range(1, looks + 1):
            try:
                found = await handle.remote(*args)
            except BackPressureError:
                break
            except (RayActorError, OutOfMemoryError, DeploymentUnavailableError):
                died += 1  # the replica, with the request
                if died == ATTEMPTS:
                    break
                continue
            if not isinstance(found, Problem):
                return found
            if found.kind != "checkpoint-gone":
                raise found
            if look == looks and not self._lately(self._found, maker):
                self._missed[maker] = time.monotonic()
                raise found
        raise overloaded()

    async def _make(self, method: str, *args: object, maker: str = "") -> Made:
        with self._making() as answered:
            made: Made = await self._call(method, *args, maker=maker)
            self._is_here(made.recipe.maker)
            if made.anew:  # what was at hand stood in no queue
                answered()
            return made

    async def create(self, request: ModelRequest, format: Format) -> Made:
        """See `serve.api.Backend`."""
        return await self._make("create", request, format)

    async def fetch(self, recipe: Recipe, format: Format) -> Made:
        """See `serve.api.Backend`."""
        return await self._make("fetch", recipe, format, maker=recipe.maker)

    async def predict(self, recipe: Recipe, images: Sequence[bytes]) -> list[list[float]]:
        """See `serve.api.Backend`."""
        with self._predicting() as answered:
            found: list[list[float]] = await self._call(
                "predict", recipe, images, maker=recipe.maker
            )
            self._is_here(recipe.maker)
            answered()
            return found

    async def info(self) -> Info:
        """See `serve.api.Backend`."""
        found: Info = await self._call("info")
        return found


class Ingress:
    """Answers HTTP.

    Args:
        key: Of the ids' HMAC; empty for the storage's.
        at_once: Requests that are let in however long they take.
    """

    def __init__(
        self,
        generator: DeploymentHandle[Any],
        *,
        storage: str,
        key: bytes,
        keep_s: float,
        access: Access,
        in_time_s: float,
        at_once: int,
    ) -> None:
        folder = Path(storage)
        self._ids = Ids(key or load_key(folder), storage=folder, keep_s=keep_s)
        self._access = access
        self._remote = Remote(generator, in_time_s=in_time_s, at_once=at_once)

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return build_api(self._remote, self._ids, self._access, full=self._remote.full)


def storage_of(args: ServeArgs) -> str:
    """The shared folder.

    Raises:
        ConfigError: There is none to be had.
    """
    if args.storage:
        if not Path(args.storage).is_absolute():
            raise ConfigError(f"storage must be absolute on every node, got {args.storage}")
        return args.storage
    folder = Path(args.checkpoint)
    if not folder.is_absolute():
        raise ConfigError(
            f"checkpoint must be an absolute path, got {args.checkpoint}; for any other, such "
            "as a packaged name, storage must be given"
        )
    return str(folder.parent / "serve")


def read_token() -> str:
    """The bearer token of the environment; empty for none.

    Raises:
        ConfigError: It is none that every client's header carries alike.
    """
    token = os.environ.get("TINA_SERVE_TOKEN", "").strip()
    visible("TINA_SERVE_TOKEN", token)
    return token


def build_app(args: ServeArgs) -> "Application":
    """The application.

    Raises:
        ConfigError: A path that is not absolute, a name that is none, or a token; see `read_token`.
    """
    from serve.replica import Replica

    name = args.checkpoint
    # a replica would look for it, again and again; a hub's name has a slash
    if "/" not in name and name not in pretrained():
        raise ConfigError(f"checkpoint {name} is none of {', '.join(pretrained())}, and no path")

    if args.gpus and ray.is_initialized() and not ray.cluster_resources().get("GPU"):
        log.warning("no node has a GPU now: replicas of the generator wait until one joins")
    shared: dict[str, Any] = {
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 60,
        "graceful_shutdown_wait_loop_s": 1,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    }
    generator = serve.deployment(
        name="Generator",
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            initial_replicas=args.min_replicas,
            target_ongoing_requests=args.target_ongoing,
            upscale_delay_s=5,
            downscale_delay_s=120,
        ),
        # as many in the making as wait to join
        max_ongoing_requests=2 * args.max_batch,
        max_queued_requests=args.max_queued,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        **shared,
    )(Replica).bind(
        args.checkpoint,
        encoder=args.encoder,
        device="cuda" if args.gpus else "cpu",
        threads=args.threads,
        max_batch=args.max_batch,
        max_steps=args.max_steps,
        cache_bytes=int(args.cache_mb * 2**20),
        threshold=args.familiarity_threshold,
    )
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=args.ingress_replicas,
        # the generator's queue is the one that fills: it answers with a problem document
        max_ongoing_requests=INGRESS_ONGOING,
        max_queued_requests=INGRESS_QUEUED,
        ray_actor_options={"num_cpus": args.ingress_cpus},
        **shared,
    )(serve.ingress()(Ingress))
    return ingress.bind(
        generator,
        storage=storage_of(args),
        key=os.environ.get("TINA_SERVE_KEY", "").encode(),
        keep_s=args.keep_s,
        access=Access(token=read_token(), origins=tuple(args.cors_origins)),
        in_time_s=args.in_time_s,
        # a batch for each replica that there may be: autoscaling sees no less
        at_once=math.ceil(args.max_batch * args.max_replicas / args.ingress_replicas),
    )
