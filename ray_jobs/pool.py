"""An autoscaling pool of actors on Ray Data, through which a job's items stream."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_jobs.resources import capacity, require
from tina.jobconfig import ClusterConfig

CPU, GPU = {"CPU": 1.0}, {"GPU": 1.0}
MANY = 8
"""Items per actor from which on the next one already waits at it: else an actor stands still until
the driver has seen its last item done (benchmarks/zoo_scaling.py). Of few it might be the one that
another is free for."""


def stream(
    actor: type,
    arguments: tuple[Any, ...],
    items: Sequence[Mapping[str, Any]],
    *,
    each: Mapping[str, float],
    cluster: ClusterConfig,
) -> Iterator[pa.Table]:
    """What actors make of each item, in the order in which they are done.

    The pool grows as far as the cluster holds it and shrinks with it: an actor of a lost node
    starts again elsewhere and its item is done again.

    Args:
        actor: Called with a table of one item; it returns a table.
        arguments: Of the actor's constructor.
        each: Resources of an actor, `CPU` or `GPU`.

    Raises:
        ConfigError: The cluster has no place for an actor.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    require(1, each, key="cluster.zoo_workers", wait_s=cluster.wait_s)
    # the job's last line says what these would say with a page of Ray's own code around it
    for noisy in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Ray 2.60 names no parameter for restarts yet, and warns of those that it does not name
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    DataContext.get_current().enable_progress_bars = False  # one bar, in the job's unit, is ours
    most = min(cluster.zoo_workers, len(items))
    todo = ray.data.from_items(list(items), override_num_blocks=len(items))
    # the pool grows while all are busy
    todo.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    done: Any = todo.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=most,
            initial_size=max(1, min(most, capacity(each))),
            max_tasks_in_flight_per_actor=2 if len(items) >= MANY * most else 1,
        ),
        num_cpus=each.get("CPU", 0),
        num_gpus=each.get("GPU", 0),
        # an actor outlives lost nodes, but not for ever an item too large for its memory
        max_restarts=cluster.max_failures,
    )
    # what is done is taken at once: nothing to fetch ahead, and no thread that would look for it
    return iter(done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
