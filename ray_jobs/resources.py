"""What the cluster can hold, and that it holds enough."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from tina.errors import ConfigError

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for the entrypoint of `ray job submit`
SUPERVISOR = "_ray_internal_job_actor_{}"  # Ray's name of the actor that holds the job's process


def on_gpu() -> bool:
    """Whether the cluster has a GPU: the machine that the job was started on need not."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


@cache
def own_share() -> dict[str, Mapping[str, float]]:
    """By node, what this job's process holds to its end (`--entrypoint-num-cpus`), if anything.

    Not known, and none, where the dashboard listens on its own node alone and the job is elsewhere.
    """
    if SUBMITTED not in os.environ:
        return {}
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    job = json.loads(os.environ[SUBMITTED])["metadata"]["job_submission_id"]
    supervisor: list[Any] = [("name", "=", SUPERVISOR.format(job)), ("state", "=", "ALIVE")]
    try:
        found = list_actors(filters=supervisor, detail=True)
    except RayStateApiException:
        return {}
    return {str(actor.node_id): held for actor in found if (held := actor.required_resources)}


def capacity(each: Mapping[str, float]) -> int:
    """How many workers of these resources the cluster could hold beside this job's process."""
    import ray

    own, room = own_share(), 0
    for node in ray.nodes():
        if node["Alive"]:
            taken = own.get(node["NodeID"], {})
            free = {k: total - taken.get(k, 0) for k, total in node["Resources"].items()}
            room += min(int(free.get(name, 0) / need + 1e-6) for name, need in each.items())
    return room


def _said(name: str, need: float) -> str:
    return f"{need / 2**30:g} GiB of memory" if name == "memory" else f"{need:g} {name}"


def require(workers: int, each: Mapping[str, float], *, key: str, wait_s: float) -> None:
    """Make sure that the cluster can hold some workers; one that can grow is asked and awaited.

    Args:
        each: Resources of a worker, all above 0.
        key: The configuration key to lower.
        wait_s: Seconds to wait at most.

    Raises:
        ConfigError: It cannot hold them.
    """
    from ray.autoscaler.sdk import request_resources

    if capacity(each) >= workers:
        return
    limit = time.monotonic() + wait_s
    # the autoscaler counts what is held already as part of what is asked for
    wanted = [dict(each)] * workers + [*map(dict, own_share().values())]
    try:
        while (room := capacity(each)) < workers:
            # again and again: Ray Data's own requests take the place of it
            request_resources(bundles=wanted)
            if time.monotonic() >= limit:
                what = " and ".join(_said(name, need) for name, need in each.items())
                lower = f"lower {key}, " if workers > 1 else ""
                raise ConfigError(
                    f"{key} needs {workers} x {what}, and the cluster holds {room} of them"
                    f"{' beside the job itself' if own_share() else ''} after {wait_s:g} s: "
                    f"{lower}add nodes or raise cluster.wait_s"
                )
            time.sleep(0.5)
    finally:
        request_resources(bundles=[])  # else it would stand after the job, and hold nodes
