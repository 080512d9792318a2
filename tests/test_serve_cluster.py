"""The endpoint on a real Ray cluster: contract, replicas, killed ones, clients that go."""

import asyncio
import random
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from safetensors.torch import load, load_file
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.app import ServeArgs, build_app
from tina import TinaPipeline
from tina.checkpoint import load_generator, save_generator
from tina.client import Client
from tina.errors import ConfigError
from tina.files import hash_file
from tina.storage import MANIFEST

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = 30  # of each operation
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CLASSES = ["three", "five", "eight"]
CLIENTS = 8
LEAVING = 0.1  # share of requests whose client goes before it is answered
GROWTH = 1.1  # of a replica's memory, after a load beside before it


@pytest.fixture(scope="module")
def deploy(port, tmp_path_factory):
    """Serve a checkpoint with two replicas of the generator; the next one replaces it."""
    ray.init(num_cpus=2, include_dashboard=True)
    storage = tmp_path_factory.mktemp("serve")
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(checkpoint):
        args = ServeArgs(
            checkpoint=str(checkpoint),
            storage=str(storage),
            min_replicas=2,
            max_replicas=2,
            cpus=0.5,
            cache_mb=0,
        )
        serve.run(build_app(args))
        return f"http://127.0.0.1:{port}"

    yield run
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(deploy, tiny_checkpoint):
    return deploy(tiny_checkpoint)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    return TinaPipeline.from_pretrained(tiny_checkpoint)(CLASSES, seed=5)


def replicas():
    """Names of the generator's replicas that can be reached."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if "#Generator#" in actor["name"]}


def kill(name):
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)


def check_weights(url, expected):
    with Client(url) as client:
        model = client.create(CLASSES, seed=5)
        found = load(client.weights(model.id))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    return model.id


def test_either_replica_makes_the_librarys_weights(url, expected):
    first = check_weights(url, expected)
    before = replicas()
    assert len(before) == 2
    one, two = sorted(before)
    kill(one)
    assert check_weights(url, expected) == first  # the other one's, or its successor's
    wait_for(lambda: len(replicas() - {one}) == 2)
    kill(two)
    assert check_weights(url, expected) == first
    wait_for(lambda: len(replicas() - before) == 2)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_served_contract(url, mode):
    """No 5xx, and no answer that the document does not have."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with Client(url) as client:
        known = {"id": client.create(CLASSES).id}
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and "models" not in operation.path:
            continue  # it takes nothing that could be wrong
        strategies = [operation.as_strategy(mode)]
        if "{id}" in operation.path:
            strategies.append(operation.as_strategy(mode, path_parameters=known))

        @given(case=st.one_of(strategies))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case):
            # a replica's first ONNX file waits for an export of the graph: 20 s on a slow machine
            response = case.call(timeout=60)
            seen.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        ask()
    assert len(seen) == (6 if mode is GenerationMode.POSITIVE else 3), seen
    if mode is GenerationMode.POSITIVE:
        # few of any texts name a task: tests/test_serve.py has those that do
        assert all(200 in seen[label] for label in seen if label.startswith("GET")), seen


def test_clients_that_go_leave_nothing_hanging(url):
    async def main():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def ask(i):
                prompt = {"classes": CLASSES, "seed": i, "steps": 20}
                return await client.post("/v1/models", json=prompt)

            tasks = [asyncio.create_task(ask(i)) for i in range(60)]
            await asyncio.sleep(0.2)
            for task in tasks[::3]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    stayed = [r for r in results if not isinstance(r, asyncio.CancelledError)]
    assert len(stayed) >= 40
    assert {r.status_code for r in stayed} <= {201, 503}
    assert {r.headers["retry-after"] for r in stayed if r.status_code == 503} <= {"1"}
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_the_readmes_own_lines(url, tmp_path, monkeypatch):
    section = README.split("## Over HTTP")[1].split("\n## ")[0]
    (shell,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    demo, wait, curl = shell.splitlines()
    assert demo == "make demo"
    for line in (wait.removeprefix("make serve & "), curl):
        here = line.replace("localhost:8000", url.removeprefix("http://"))
        subprocess.run(["bash", "-c", here], cwd=tmp_path, check=True, timeout=60)
    assert load_file(tmp_path / "mine.safetensors")["fc.bias"].shape == (3,)
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(block.replace("http://localhost:8000", url), scope)
    assert scope["label"] in CLASSES


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="extra"):
        ServeArgs(checkpoint="/x", replicas=3)
    with pytest.raises(ValueError, match="min_replicas, 3, is above max_replicas, 2"):
        ServeArgs(checkpoint="/x", min_replicas=3)
    with pytest.raises(ValueError, match="min_replicas"):  # what would wake it has no time for that
        ServeArgs(checkpoint="/x", min_replicas=0)
    with pytest.raises(ConfigError, match="absolute"):
        build_app(ServeArgs(checkpoint="runs/quickstart/checkpoint"))
    with pytest.raises(ConfigError, match="absolute"):
        build_app(ServeArgs(checkpoint="/x", storage="here"))
    with pytest.raises(ConfigError, match="checkpoint tina-cifar is none of tina-cifar100-cnn5k, "):
        build_app(ServeArgs(checkpoint="tina-cifar", storage="/tmp"))


def test_replicas_on_gpus_that_no_node_has_are_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for found, told in (({"CPU": 2.0}, True), ({"CPU": 2.0, "GPU": 1.0}, False)):
        monkeypatch.setattr(ray, "cluster_resources", lambda found=found: found)
        caplog.clear()
        build_app(ServeArgs(checkpoint=str(tmp_path), gpus=1))
        assert ("no node has a GPU now" in caplog.text) is told
    build_app(ServeArgs(checkpoint=str(tmp_path)))
    assert not caplog.text


def test_arguments_are_checked_where_serve_reads_them_from_a_file(tmp_path):
    given = {"checkpoint": str(tmp_path), "max_batch": "8"}  # `serve run` has only text
    assert call_user_app_builder_with_args_if_necessary(build_app, given)
    with pytest.raises(ValueError, match="max_bach"):
        call_user_app_builder_with_args_if_necessary(build_app, given | {"max_bach": "8"})


# --- under steady load ---------------------------------------------------------------------------


class Load:
    """Clients that ask again as soon as they are answered, until they are told to stop."""

    def __init__(self, url):
        self.url, self.going = url, True
        self.statuses, self.broken, self.slowest = Counter(), [], 0.0
        self.checkpoints = Counter()
        self.again = Counter()  # what became of models that were asked for again at once

    async def client(self, number):
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            while self.going:
                prompt = {"classes": CLASSES, "seed": draw.randrange(2**31)}
                begin = time.monotonic()
                asked = asyncio.create_task(http.post("/v1/models", json=prompt))
                if draw.random() < LEAVING:
                    await asyncio.sleep(draw.random() * 0.05)
                    asked.cancel()
                try:
                    answer = await asked
                except asyncio.CancelledError:
                    self.statuses["left"] += 1
                    continue
                except httpx.HTTPError as error:
                    self.broken.append(repr(error))
                    continue
                self.slowest = max(self.slowest, time.monotonic() - begin)
                self.statuses[answer.status_code] += 1
                if answer.status_code == 201:
                    self.checkpoints[answer.json()["checkpoint"]] += 1
                    found = await http.get(answer.headers["location"])
                    self.again[found.status_code] += 1
                elif answer.status_code == 503:
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                else:
                    self.broken.append(answer.text)

    def during(self, work):
        """Run blocking work in a thread under this load."""

        async def main():
            clients = [asyncio.create_task(self.client(i)) for i in range(CLIENTS)]
            try:
                await asyncio.to_thread(work)
            finally:
                self.going = False
            await asyncio.wait_for(asyncio.gather(*clients), 90)

        asyncio.run(main())
        assert not self.broken, self.broken[:3]
        assert self.statuses["left"] > 0
        assert self.statuses[201] > 10 * CLIENTS, self.statuses
        assert self.slowest < 60


def memory():
    """Resident bytes of each generator replica."""
    found = {}
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        if "ServeReplica:default:Generator" in " ".join(process.info["cmdline"] or []):
            found[process.pid] = process.info["memory_info"].rss
    return found


@pytest.mark.slow
def test_memory_returns(url):
    wait_for(lambda: len(memory()) == 2)
    Load(url).during(lambda: time.sleep(15))  # the buffers of torch and of Ray fill once
    before = memory()
    Load(url).during(lambda: time.sleep(30))
    after = memory()
    assert set(after) == set(before)
    assert all(after[pid] < GROWTH * before[pid] for pid in before), (before, after)


@pytest.mark.slow
def test_a_replica_dies_under_load(url):
    def work():
        time.sleep(5)
        before = replicas()
        kill(min(before))
        wait_for(lambda: len(replicas() - {min(before)}) == 2)
        time.sleep(5)

    load = Load(url)
    load.during(work)
    assert load.again.keys() <= {200, 503}


@pytest.mark.slow
def test_a_rolling_update_under_load(deploy, url, tiny_checkpoint, tmp_path):
    old = hash_file(tiny_checkpoint / MANIFEST)
    save_generator(load_generator(tiny_checkpoint), tmp_path / "other", card="Another card.\n")
    new = hash_file(tmp_path / "other" / MANIFEST)
    assert new != old
    load = Load(url)

    def work():
        time.sleep(5)
        before = replicas()
        deploy(tmp_path / "other")
        wait_for(lambda: len(replicas() - before) == 2 and not replicas() & before, seconds=180)
        time.sleep(5)

    load.during(work)
    assert set(load.checkpoints) == {old, new}
    assert load.again.keys() <= {200, 410, 503}
    assert httpx.get(f"{url}/v1/info").json()["checkpoint"] == new
