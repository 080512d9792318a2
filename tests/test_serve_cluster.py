"""The endpoint on a real Ray cluster: contract, replicas, killed ones, clients that go."""

import asyncio
import re
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import ray
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import serve
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
from tina.client import Client
from tina.errors import ConfigError

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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def url(tiny_checkpoint, tmp_path_factory):
    """A service with two replicas of the generator."""
    ray.init(num_cpus=2, include_dashboard=True)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = ServeArgs(
        checkpoint=str(tiny_checkpoint),
        storage=str(tmp_path_factory.mktemp("serve")),
        min_replicas=2,
        max_replicas=2,
        cpus=0.5,
        cache_mb=0,
    )
    serve.run(build_app(args))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


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
            response = case.call()
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
    (curl,) = [line for line in shell.splitlines() if line.startswith("curl")]
    curl = curl.replace("localhost:8000", url.removeprefix("http://"))
    subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True, timeout=60)
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
    with pytest.raises(ConfigError, match="absolute"):
        build_app(ServeArgs(checkpoint="runs/quickstart/checkpoint"))
    with pytest.raises(ConfigError, match="absolute"):
        build_app(ServeArgs(checkpoint="/x", storage="here"))
