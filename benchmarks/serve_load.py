"""What does the endpoint cost over the bare pipeline, and how does it bear load?

    python -m benchmarks.serve_load --checkpoint runs/cifar100_cnn5k/checkpoint

One run on one machine: the pipeline alone at several batch sizes, then the service under one client
at a time, under 32, and at five times its capacity over 1,000 connections, which are kept open and
ask again after their answer: where that takes long, less is asked, and the row says how much. The
load comes from a process of its own, on the same cores; the last from h2load (`apt install
nghttp2-client`), for one in Python would take them from the service. Appends a row to
results/serve_load.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import aiohttp
import psutil

from benchmarks.record import append, as_command, checkpoint_folder, load, percentiles

CLIENTS, OVERLOAD = 32, 5
CONNECTIONS = 1000  # one for each request would fill the kernel's queues, not the service
PORT = 8123
ACCEPT = "application/vnd.safetensors"
PATIENCE_S = 120


class Answer(NamedTuple):
    """What became of a request.

    Args:
        begin: When it was asked, in seconds.
        latency: Seconds from there.
        status: 0 for a connection that broke or was never answered.
    """

    begin: float
    latency: float
    status: int


Answers = list[Answer]


async def ask(session: aiohttp.ClientSession, body: dict[str, object], answers: Answers) -> None:
    """One request for weights."""
    begin = time.perf_counter()
    try:
        async with session.post("/v1/models", json=body, headers={"accept": ACCEPT}) as response:
            await response.read()
            status = response.status
    except (aiohttp.ClientError, TimeoutError):
        status = 0
    answers.append(Answer(begin, time.perf_counter() - begin, status))


async def closed_loop(classes: Sequence[str], clients: int, seconds: float) -> Answers:
    """Each client asks again as soon as it is answered."""
    answers: Answers = []
    end = time.perf_counter() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        seed = number * 1_000_000
        while time.perf_counter() < end:
            await ask(session, {"classes": list(classes), "seed": seed}, answers)
            seed += 1

    async with session_of(clients) as session:
        await asyncio.gather(*[client(i, session) for i in range(clients)])
    return answers


def open_loop(classes: Sequence[str], rate: float, seconds: float) -> Answers:
    """Requests at a fixed rate, each connection at its own moments.

    A connection has one request at a time. So the rate is held, whatever becomes of the requests,
    as long as they are answered within CONNECTIONS / rate seconds; a connection that waits longer
    falls behind.
    """
    count = round(rate * seconds)
    with tempfile.TemporaryDirectory() as folder:
        log, body = Path(folder, "log"), Path(folder, "body")
        body.write_text(json.dumps({"classes": list(classes), "seed": 0}))
        options = ["--h1", "-c", CONNECTIONS, "-n", count, "-d", body]
        options += ["-H", "content-type: application/json", "-H", f"accept: {ACCEPT}"]
        # connections begin one after the other, over the time in which each asks once
        options += ["-r", max(1, round(rate / 100)), "--rate-period", "10ms"]
        options += ["--rps", rate / CONNECTIONS, "-N", f"{PATIENCE_S}s", f"--log-file={log}"]
        command = ["h2load", *map(str, options), f"http://127.0.0.1:{PORT}/v1/models"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [line.split() for line in log.read_text().splitlines()]
    answers = [Answer(int(at) / 1e6, int(spent) / 1e6, int(code)) for at, code, spent in lines]
    return answers + [Answer(answers[0].begin, PATIENCE_S, 0)] * (count - len(answers))


def session_of(connections: int) -> aiohttp.ClientSession:
    """A session of at most so many connections."""
    return aiohttp.ClientSession(
        f"http://127.0.0.1:{PORT}",
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
    )


def _run(loop: object, args: tuple[object, ...], pipe: object) -> None:
    pipe.send(asyncio.run(loop(*args)))  # type: ignore[attr-defined, operator]


def elsewhere(loop: object, *args: object) -> Answers:
    """Run a loop in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(loop, args, there))
    process.start()
    there.close()  # so that a process that fails ends the wait
    answers: Answers = here.recv()
    process.join()
    return answers


def rate_of(answers: Answers, seconds: float) -> float:
    """Models per second in the last three quarters of a load.

    Its start has no answers yet; what is answered after its end came from no full load.
    """
    begin = min(answer.begin for answer in answers)
    ends = [answer.begin + answer.latency for answer in answers if answer.status == 201]
    return sum(begin + seconds / 4 < end <= begin + seconds for end in ends) / (0.75 * seconds)


def waits(answers: Answers) -> dict[str, float]:
    """Percentiles of the latencies."""
    return percentiles([answer.latency for answer in answers])


def flooded(flood: Answers, seconds: float) -> dict[str, Any]:
    """What was asked and served in a flood of so many seconds, and what became of all of it."""
    end = min(answer.begin for answer in flood) + seconds
    return waits([answer for answer in flood if answer.status == 201]) | {
        "asked_per_s": round(sum(answer.begin < end for answer in flood) / seconds, 1),
        "served_per_s": round(rate_of(flood, seconds), 1),
        "statuses": {str(k): n for k, n in Counter(a.status for a in flood).items()},
    }


def processor_seconds() -> dict[str, float]:
    """CPU time so far of every process that is there, by what it is; the load's own has ended."""
    kinds = ("Generator", "Ingress", "proxy", "raylet", "gcs_server")
    found: dict[str, float] = defaultdict(float)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        words, times = " ".join(process.info["cmdline"] or []), process.info["cpu_times"]
        kind = next((kind for kind in kinds if kind.lower() in words.lower()), "other")
        found[kind] += times.user + times.system if times else 0.0
    return found


def bare(checkpoint: Path, classes: list[str]) -> dict[str, Any]:
    """Models per second and latency of the pipeline alone, on all cores."""
    from tina import TinaPipeline

    pipe = TinaPipeline.from_pretrained(checkpoint)
    pipe([classes] * 64)
    rates = {}
    for batch in (1, 8, 16, 32, 64):
        times = []
        for turn in range(max(5, 64 // batch)):
            begin = time.perf_counter()
            models = pipe([classes] * batch, seed=list(range(turn, turn + batch)))
            assert isinstance(models, list)
            for model in models:
                model.to_safetensors()
            times.append(time.perf_counter() - begin)
        rates[batch] = round(batch / median(times), 1)
        if batch == 1:
            alone = percentiles(times)
    return {"models_per_s": rates, "alone": alone}


@contextmanager
def service(checkpoint: Path, **options: Any) -> Iterator[None]:
    """The application on a local cluster."""
    import ray
    from ray import serve

    from serve.app import ServeArgs, build_app

    ray.init(log_to_driver=False)
    with tempfile.TemporaryDirectory() as storage:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        args = ServeArgs(checkpoint=str(checkpoint), storage=storage, **options)
        serve.run(build_app(args))
        yield
        serve.shutdown()
    ray.shutdown()


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "runs/quickstart/checkpoint"
    parser.add_argument("--checkpoint", type=checkpoint_folder, default=default)
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args, load_before = parser.parse_args(), load()
    if not shutil.which("h2load"):
        parser.error("h2load is not there: apt install nghttp2-client")
    from tina.checkpoint import load_generator

    checkpoint = args.checkpoint
    generator = load_generator(checkpoint)
    classes = generator.vocabulary.trained_names[: min(10, generator.max_classes)]
    alone = bare(checkpoint, classes)
    best = max(alone["models_per_s"].values())
    options = {"threads": args.threads, "cpus": 1.5 / args.replicas}
    options |= {"min_replicas": args.replicas, "max_replicas": args.replicas, "cache_mb": 0}
    with service(checkpoint, **options):
        elsewhere(closed_loop, classes, CLIENTS, 5)  # warm
        lone = waits(elsewhere(closed_loop, classes, 1, args.seconds))
        before = processor_seconds()
        loaded = elsewhere(closed_loop, classes, CLIENTS, args.seconds)
        spent = {kind: s - before.get(kind, 0) for kind, s in processor_seconds().items()}
        rate, made = rate_of(loaded, args.seconds), sum(a.status == 201 for a in loaded)
        flood = open_loop(classes, OVERLOAD * rate, args.overload_seconds)
        after = waits(elsewhere(closed_loop, classes, 1, 5))
    figures = {
        "dataset": generator.dataset,
        "steps": generator.config.diffusion.sampling_steps,
        "replicas": args.replicas,
        "threads": args.threads,
        "ha_proxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0"),
        "throughput_optimized": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0"),
        "bare": alone,
        "one_client": lone,
        "added_p50_ms": round(lone["p50_ms"] - alone["alone"]["p50_ms"], 1),
        "clients_32": waits(loaded) | {"models_per_s": round(rate, 1)},
        "share_of_bare": round(rate / best, 2),
        "cpu_ms_per_model": {
            kind: round(1000 * s / made, 2)
            for kind, s in sorted(spent.items(), key=lambda found: -found[1])
            if s
        },
        "overload": flooded(flood, args.overload_seconds),
        "one_client_after_it": after,
    }
    append("serve_load", figures, load_before=load_before)


if __name__ == "__main__":
    as_command(main)
