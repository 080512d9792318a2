"""What every job shares: configuration from the command line, a Ray cluster, exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from errno import EMFILE, ENFILE
from functools import cache
from textwrap import shorten
from typing import Any

import torch
import yaml
from tqdm import tqdm

from ray_jobs.process import settle_in
from tina.configio import config_to_dict, parse_config
from tina.errors import ConfigError, TinaError
from tina.jobconfig import JobConfig
from tina.provenance import commit, cores
from tina.run import Run
from tina.stores import is_uri

MOST_CHARACTERS = 500  # of a last line; the traceback above it has them all
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for the entrypoint of `ray job submit`
SUPERVISOR = "_ray_internal_job_actor_{}"  # Ray's name of the actor that holds the job's process
TRACKERS = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"),
)
"""Where curves go, which are logged on rank 0's node."""
LESS_MEMORY = {
    "a pool worker": "lower cluster.zoo_block or cluster.zoo_workers",
    "training rank": "raise train.accumulation or cluster.zero_stage, set cluster.offload or "
    "cluster.activation_checkpointing, or lower cluster.train_workers",
    "the job's own process": "run it on a machine with more memory",
}


def run_job(
    work: Callable[[Run], None], argv: Sequence[str], *, name: str, about: str, needs: str = ""
) -> int:
    """Parse, run, and turn every error into a last line on stderr.

    Args:
        needs: Flags that the example in its help cannot do without.

    Returns:
        0 when the work is done, 2 for what the user can mend, 1 for any other failure, 130 when
        interrupted.
    """
    argv = list(argv)
    dry = "--dry-run" in argv
    try:
        config = parse_config(
            JobConfig,
            [word for word in argv if word != "--dry-run"],
            prog=f"python -m ray_jobs.{name}",
            description=f"{about} Example: python -m ray_jobs.{name} "
            f"{needs}--config configs/quickstart.yaml --storage $PWD/runs --name mine "
            "--train.lr 3e-4 "
            "(--dry-run prints the resolved configuration)",
        )
        if dry:
            print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
            return 0
        # the code that started the run is the one to name, whatever is checked out at its end
        os.environ.setdefault("TINA_COMMIT", commit())
        run = Run(config)
        with run.place.named():
            run.claim()
        settle_in()
        try:
            with run.place.named():
                work(run)
        except Exception:
            run.give_up()
            raise
    except KeyboardInterrupt:
        _leave(f"{name}: interrupted; the same command goes on from what there is")
        return 130
    except Exception as error:
        return _fail(error, name)
    return 0


def _fail(error: Exception, job: str) -> int:
    """Say what went wrong; the exit code."""
    wrapped = list(layers(error))
    cause = wrapped[-1]
    words, *_ = str(cause).split("\nFailed to apply UDF transform")  # Ray Data adds how often
    lines = words.strip().splitlines() or [""]
    if getattr(cause, "actor_init_failed", False):
        lines = lines[-1:]  # all that Ray keeps of it is a traceback, and that ends in the error
    message = " ".join(" ".join(lines).split())
    code = 1
    who, cure = _who(wrapped)
    if _out_of_memory(cause):
        # Ray's own account goes on for a page, with a list of the node's processes
        fact = re.search(r"Memory on the node .*? limit", message)
        message = fact[0] if fact else shorten(message, MOST_CHARACTERS)
        message = f"{job}: {who} ran out of memory ({message}): {cure}"
    elif isinstance(cause, (TinaError, OSError)) and not (_is_rays(cause) or _is_broken(cause)):
        code = 2
    else:
        traceback.print_exception(error)
        message = shorten(f"{type(cause).__name__}: {message}", MOST_CHARACTERS)
        if "SIGKILL" in words:  # as the kernel does, which leaves no word of it
            message += f" If memory ran out: {cure}"
    _leave(f"error: {message}")
    return code


def _leave(words: str) -> None:
    """The last line."""
    if "ray" in sys.modules:
        leave_ray()
    sys.stdout.flush()  # into a file it would come after it
    print(words, file=sys.stderr, flush=True)


def _who(wrapped: Sequence[BaseException]) -> tuple[str, str]:
    """Which process failed, and how it would need less memory."""
    for layer in wrapped:
        if ranks := getattr(layer, "worker_failures", None):
            return f"training rank {_culprit(ranks)}", LESS_MEMORY["training rank"]
    who = "a pool worker" if any(map(_is_rays, wrapped)) else "the job's own process"
    return who, LESS_MEMORY[who]


def _is_broken(error: BaseException) -> bool:
    """Whether an OSError is of a connection or of too many open files, which no user can mend."""
    lost = isinstance(error, (ConnectionError, TimeoutError))
    return lost or getattr(error, "errno", None) in (EMFILE, ENFILE)


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "ray"


def _out_of_memory(error: BaseException) -> bool:
    """Killed by Ray for it, refused by Python, by CUDA or by torch's CPU allocator."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("low on memory", "allocate memory"))
    )


def _culprit(failures: Mapping[int, BaseException]) -> int:
    """The rank to blame: it died or says what was wrong; the others only lost their peer."""

    def vague(rank: int) -> bool:
        root = list(layers(failures[rank]))[-1]
        return not (_out_of_memory(root) or _is_rays(root) or isinstance(root, TinaError))

    return min(failures, key=vague)


def layers(error: BaseException) -> Iterator[BaseException]:
    """An error and what it wraps, down to what was raised in the worker."""
    yield error
    ranks = getattr(error, "worker_failures", None)
    inner = (
        getattr(error, "cause", None)  # a task's or an actor's
        or getattr(error, "controller_failure", None)  # Ray Train's
        or getattr(error, "health_check_failure", None)  # its, of a rank that is gone
        or (ranks and ranks[_culprit(ranks)])
    )
    if isinstance(inner, BaseException):
        yield from layers(inner)


def variables() -> dict[str, str]:
    """Environment variables that travel with a job, for those of its workers and for `submit`.

    Caches do not: another machine has its own. Nor do secrets: Ray shows these to everybody.
    """
    found = {"TINA_COMMIT": commit()}
    found |= {name: os.environ[name] for name in TRACKERS if name in os.environ}
    if place := os.environ.get("TINA_DATA"):  # a job runs in another working directory than yours
        found["TINA_DATA"] = place if is_uri(place) else os.path.abspath(os.path.expanduser(place))
    return found


def start_ray() -> None:
    """Join the cluster that the environment names, or start a local one."""
    import ray

    if ray.is_initialized():
        return
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    # an error in a Ray Data worker comes back as it was raised
    os.environ.setdefault("RAY_DATA_RAISE_ORIGINAL_MAP_EXCEPTION", "1")
    ray.init(
        log_to_driver=True,
        logging_level=logging.WARNING,
        # a submitted job's own environment reaches its workers, and must not be given twice
        runtime_env=None if SUBMITTED in os.environ else {"env_vars": variables() | path},
    )
    if SUBMITTED in os.environ and os.environ.get("OMP_NUM_THREADS") == "1" and not own_share():
        # what Ray gives to a job's process that asks for no CPUs, however many its node has
        torch.set_num_threads(cores())


def leave_ray() -> None:
    """Leave the cluster: what is printed from here on stays below its workers' last words."""
    import ray

    ray.shutdown()
    # The bars of workers that are gone would be drawn once more at exit.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


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
                what = " and ".join(f"{need:g} {name}" for name, need in each.items())
                lower = f"lower {key}, " if workers > 1 else ""
                raise ConfigError(
                    f"{key} needs {workers} x {what}, and the cluster holds {room} of them"
                    f"{' beside the job itself' if own_share() else ''} after {wait_s:g} s: "
                    f"{lower}add nodes or raise cluster.wait_s"
                )
            time.sleep(0.5)
    finally:
        request_resources(bundles=[])  # else it would stand after the job, and hold nodes


if __name__ == "__main__":
    # for --runtime-env-json of `ray job submit`: there is no git where the job runs
    print(json.dumps({"env_vars": variables()}))
