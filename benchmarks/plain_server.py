"""How does the endpoint compare with a plain server around the same pipeline?

    python -m benchmarks.plain_server --checkpoint runs/cifar100_cnn5k/checkpoint

The plain server is one process of FastAPI and uvicorn with the endpoint's own calls and its own
replica inside: it batches what comes in together as well, and has Ray in no request's way. It runs
with one torch thread and with all, the endpoint with as many replicas as asked for; each under 1,
8, 32 and 128 clients that ask again as soon as they are answered, from a process on the same cores.
Appends a row to results/plain_server.jsonl.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from benchmarks.record import append, as_command, checkpoint_folder, load, percentiles
from benchmarks.serve_load import PORT, closed_loop, elsewhere, rate_of, service
from tina.checkpoint import load_generator

CLIENTS = (1, 8, 32, 128)


def run_plain(checkpoint: str, threads: int, storage: str) -> None:
    """The plain server's process."""
    import uvicorn

    from serve.api import Access, build_api
    from serve.ids import Ids, load_key
    from serve.problems import Problem
    from serve.replica import Replica

    replica = Replica(
        checkpoint,
        device="cpu",
        threads=threads,
        max_batch=64,
        max_steps=100,
        cache_bytes=0,
        threshold=0.5,
    )

    class Here:
        """The replica without Ray between: its problems are raised."""

        def __getattr__(self, name: str) -> object:
            async def call(*args: object) -> object:
                found = await getattr(replica, name)(*args)
                if isinstance(found, Problem):
                    raise found
                return found

            return call

    folder = Path(storage)
    api = build_api(Here(), Ids(load_key(folder), storage=folder, keep_s=3600), Access())  # type: ignore[arg-type]
    uvicorn.run(api, host="127.0.0.1", port=PORT, log_level="error")


@contextmanager
def plain(checkpoint: Path, threads: int) -> Iterator[None]:
    """The plain server, ready."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = (str(checkpoint), threads, storage)
        process = multiprocessing.get_context("spawn").Process(target=run_plain, args=arguments)
        process.start()
        try:
            for _ in range(300):
                time.sleep(0.2)
                try:
                    if httpx.get(f"http://127.0.0.1:{PORT}/readyz").status_code == 200:
                        break
                except httpx.ConnectError:
                    continue
            else:
                raise RuntimeError("the plain server is not ready after a minute")
            yield
        finally:
            process.terminate()
            process.join()


def under_load(classes: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """By number of clients: models per second and latency."""
    elsewhere(closed_loop, classes, 32, 5)  # warm
    rows = {}
    for clients in CLIENTS:
        answers = elsewhere(closed_loop, classes, clients, seconds)
        times = percentiles([answer.latency for answer in answers if answer.status == 201])
        refused = sum(answer.status != 201 for answer in answers)
        rate = round(rate_of(answers, seconds), 1)
        rows[str(clients)] = times | {"models_per_s": rate, "refused": refused}
    return rows


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "runs/quickstart/checkpoint"
    parser.add_argument("--checkpoint", type=checkpoint_folder, default=default)
    parser.add_argument("--seconds", type=float, default=12, help="of each load")
    parser.add_argument("--replicas", type=int, default=2, help="of the endpoint, a thread each")
    args, before = parser.parse_args(), load()
    checkpoint = args.checkpoint
    generator = load_generator(checkpoint)
    classes = generator.vocabulary.trained_names[: min(10, generator.max_classes)]
    found = {}
    for threads in (1, torch.get_num_threads()):
        with plain(checkpoint, threads):
            found[f"plain, {threads} threads"] = under_load(classes, args.seconds)
    options = {"threads": 1, "cpus": 1.5 / args.replicas, "cache_mb": 0}
    options |= {"min_replicas": args.replicas, "max_replicas": args.replicas}
    with service(checkpoint, **options):
        ours = under_load(classes, args.seconds)
    best = {
        clients: max(rows[clients]["models_per_s"] for rows in found.values()) for clients in ours
    }
    figures = {
        "dataset": generator.dataset,
        "steps": generator.config.diffusion.sampling_steps,
        "replicas": args.replicas,
        "ha_proxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0"),
        "throughput_optimized": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0"),
        **found,
        "endpoint": ours,
        "endpoint_over_best_plain": {
            clients: round(rows["models_per_s"] / best[clients], 2)
            for clients, rows in ours.items()
        },
    }
    append("plain_server", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
