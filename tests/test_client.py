"""The Python client, sync and async: what it sends, what it retries, how it fails."""

import asyncio
import inspect
import json
import time
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from tina import client as client_module
from tina.client import AsyncClient, Client, ServiceError
from tina.errors import ConfigError, DataError, PromptError
from tina.schemas import ModelReply, Prediction, PredictReply, ProblemDocument

REPLY = ModelReply(
    id="an-id",
    classes=["a", "b"],
    familiarity=[1.0, 0.5],
    nearest=["zero", "seven"],
    warnings=[],
    seed=0,
    steps=4,
    guidance=1.0,
    family="cnn5k",
    parameters=10,
    input_shape=[1, 8, 8],
    checkpoint="c",
    links={},
)
PROBLEM = ProblemDocument(
    type="urn:tina:problem:invalid", title="No", status=422, detail="classes", instance="x"
)


class Service:
    """Answers with given responses, then with 200; remembers what it was sent."""

    def __init__(self, *answers):
        self.answers, self.sent = list(answers), []

    def __call__(self, request):
        self.sent.append(request)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return httpx.Response(answer[0], headers={"retry-after": str(answer[1])})
        if answer != 200:
            return httpx.Response(answer, text=PROBLEM.model_dump_json())
        body = REPLY
        if request.url.path.endswith("predict"):
            prediction = Prediction(label="a", probabilities=[1.0, 0.0])
            body = PredictReply(classes=["a", "b"], predictions=[prediction])
        return httpx.Response(200, text=body.model_dump_json())


@pytest.fixture
def waits(monkeypatch):
    """Seconds that a client meant to wait; it does not."""
    found = []

    async def sleep(seconds):
        found.append(seconds)

    monkeypatch.setattr(client_module.time, "sleep", found.append)
    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    return found


def ask(kind, service, name, *args, retries=3, **options):
    """One call by either client."""
    settings = {"token": "t", "retries": retries}
    if kind is Client:
        with Client("http://tina", **settings) as sync:
            sync._http = httpx.Client(
                transport=httpx.MockTransport(service),
                headers=sync._http.headers,
                base_url="http://tina",
            )
            return getattr(sync, name)(*args, **options)

    async def main():
        async with AsyncClient("http://tina", **settings) as client:
            client._http = httpx.AsyncClient(
                transport=httpx.MockTransport(service),
                headers=client._http.headers,
                base_url="http://tina",
            )
            return await getattr(client, name)(*args, **options)

    return asyncio.run(main())


kinds = pytest.mark.parametrize("kind", [Client, AsyncClient])


@kinds
def test_a_prompt_is_sent_as_its_schema_has_it(kind):
    service = Service()
    assert ask(kind, service, "create", ["a", "b"], seed=3, strict=True) == REPLY
    (request,) = service.sent
    assert (request.method, request.url.path) == ("POST", "/v1/models")
    assert json.loads(request.content) == {"classes": ["a", "b"], "seed": 3, "strict": True}
    assert request.headers["authorization"] == "Bearer t"
    for texts in (["a red cup", None], ("a red cup", None), [("a red cup",), None]):
        ask(kind, service, "create", ["a", "b"], descriptions=texts)
        sent = json.loads(service.sent[-1].content)
        assert sent == {"classes": ["a", "b"], "descriptions": ["a red cup", None]}
    ask(kind, service, "create", "a: a red cup, a mug; b")
    sent = json.loads(service.sent[-1].content)
    assert sent == {"classes": ["a", "b"], "descriptions": [["a red cup", "a mug"], None]}
    with pytest.raises(PromptError, match="describes classes itself"):
        ask(kind, service, "create", "a: a red cup; b", descriptions=[None, "a mug"])
    ask(kind, service, "create", ["a", "b"], descriptions=(("a red cup", "a mug"), None))
    assert json.loads(service.sent[-1].content)["descriptions"] == [["a red cup", "a mug"], None]


@kinds
def test_pictures_are_sent_as_files(kind, tmp_path):
    service, file = Service(), tmp_path / "x.png"
    file.write_bytes(b"bytes of a picture")
    ask(kind, service, "create", ["a", "b"], images=[[file], [b"more", b"others"]])
    ask(kind, service, "predict", "an-id", [str(file)])
    for request in service.sent:
        assert request.headers["content-type"].startswith("multipart/form-data")
        assert b"bytes of a picture" in request.content
    assert service.sent[0].content.count(b'name="images[1]"') == 2
    ask(kind, service, "create", ["a", "b", "c"], examples=[[file], None, [b"more", b"others"]])
    assert service.sent[2].content.count(b'name="examples[2]"') == 2
    assert b"examples[1]" not in service.sent[2].content


@kinds
def test_weights_are_bytes(kind):
    service = Service()
    assert isinstance(ask(kind, service, "weights", "an-id", "onnx"), bytes)
    assert str(service.sent[0].url).endswith("/v1/models/an-id?format=onnx")


@kinds
def test_an_overloaded_service_is_asked_again_when_it_says(kind, waits):
    service = Service((503, 7), (429, 2), 502, 408)
    assert ask(kind, service, "create", ["a", "b"], retries=4) == REPLY
    assert waits == [7.0, 2.0, 1.0, 2.0]
    assert len({request.content for request in service.sent}) == 1


@kinds
def test_a_body_that_came_too_slowly_is_not_sent_again(kind, waits):
    problem = {"type": "urn:tina:problem:too-slow", "title": "t", "status": 408, "instance": "i"}
    sent = []

    def service(request):
        sent.append(request)
        return httpx.Response(408, json=problem)

    with pytest.raises(ServiceError) as found:
        ask(kind, service, "predict", "an-id", [b"x"])
    assert found.value.status == 408
    assert len(sent) == 1
    assert waits == []


@kinds
@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        (lambda: formatdate(time.time() + 20, usegmt=True), 20),
        (lambda: time.asctime(time.gmtime(time.time() + 20)), 20),
        (lambda: formatdate(time.time() - 20, usegmt=True), 0),
        (lambda: "soon", 0.25),
    ],
    ids=["a date", "an old form of it", "a date gone by", "no date"],
)
def test_an_overloaded_service_may_name_a_date(kind, waits, monkeypatch, date, seconds):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert ask(kind, Service((503, date())), "create", ["a", "b"]) == REPLY
    finally:
        monkeypatch.undo()
        time.tzset()
    assert waits == [pytest.approx(seconds, abs=1.5 if seconds == 20 else 0)]


@kinds
@pytest.mark.parametrize(
    "wait",
    [31, "9" * 400, formatdate(time.time() + 9000, usegmt=True)],
    ids=["seconds", "for ever", "a date"],
)
def test_a_service_that_names_a_long_wait_is_not_asked_too_early(kind, waits, wait):
    service = Service((503, wait))
    with pytest.raises(ServiceError) as error:
        ask(kind, service, "create", ["a", "b"])
    assert error.value.status == 503
    assert (len(service.sent), waits) == (1, [])


@kinds
def test_a_broken_connection_is_retried_with_growing_delays(kind, waits):
    service = Service(httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.ReadError("x"))
    assert ask(kind, service, "model", "an-id") == REPLY
    assert waits == [0.25, 0.5, 1.0]


@kinds
@pytest.mark.parametrize(
    "error",
    [
        httpx.UnsupportedProtocol("no scheme"),
        httpx.LocalProtocolError("a header"),
        httpx.DecodingError("gzip"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_another_attempt_would_not_mend_is_said_at_once(kind, error, waits):
    with pytest.raises(ServiceError, match=str(error)):
        ask(kind, Service(error), "model", "an-id")
    assert waits == []


@kinds
def test_an_answer_of_another_kind(kind, monkeypatch):
    service = Service()
    monkeypatch.setattr(Service, "__call__", lambda *_: httpx.Response(200, text="<html>"))
    with pytest.raises(ServiceError, match="no ModelReply") as raised:
        ask(kind, service, "model", "an-id")
    assert raised.value.status == 200


@kinds
def test_a_newer_service_says_more(kind, monkeypatch):
    service, reply = Service(), REPLY.model_dump() | {"colour": "red"}
    monkeypatch.setattr(Service, "__call__", lambda *_: httpx.Response(200, json=reply))
    assert ask(kind, service, "model", "an-id") == REPLY


@kinds
def test_a_problem_without_details_from_something_in_between(kind, monkeypatch):
    problem = {"type": "about:blank", "title": "No", "status": 404, "trace": "x"}
    monkeypatch.setattr(Service, "__call__", lambda *_: httpx.Response(404, json=problem))
    with pytest.raises(ServiceError, match=r"^No$") as error:
        ask(kind, Service(), "model", "an-id")
    assert error.value.problem.type == "about:blank"


@kinds
@pytest.mark.parametrize("id", ["../info", "a?x=1#y", "a/b", "a\nb", "%2e"])
def test_an_id_is_one_part_of_the_path(kind, id):
    service = Service()
    for call, args in (("model", ()), ("weights", ()), ("predict", ([b"x"],))):
        ask(kind, service, call, id, *args)
    paths = [request.url.raw_path.decode().split("?")[0].split("/") for request in service.sent]
    assert [len(parts) for parts in paths] == [4, 4, 5]
    assert {unquote(parts[3]) for parts in paths} == {id}


@kinds
def test_a_base_url_that_is_none(kind):
    with pytest.raises(ConfigError, match="base_url"):
        kind("http://[::1")


@kinds
def test_what_cannot_be_asked_at_all(kind, tmp_path):
    with pytest.raises(ConfigError, match="retries must not be negative"):
        kind("http://tina", retries=-1)
    service = Service()
    with pytest.raises(DataError, match=r"cannot read image .*/a\.png: No such file"):
        ask(kind, service, "predict", "an-id", [tmp_path / "a.png"])
    assert service.sent == []


@kinds
@pytest.mark.parametrize("token", ["sésame", "a b", "a\nb", "\u201csesame\u201d", "sesame\x00"])
def test_a_token_that_no_header_carries_is_not_repeated(kind, token):
    with pytest.raises(ConfigError, match="token may hold visible ASCII") as error:
        kind("http://tina", token=token)
    assert token not in str(error.value)


@kinds
def test_the_token_of_a_file_with_an_end_of_line(kind):
    assert kind("http://tina", token="s3cret!\n")._http.headers["authorization"] == "Bearer s3cret!"
    assert "authorization" not in kind("http://tina", token="\n")._http.headers


@kinds
@pytest.mark.parametrize(
    ("call", "args", "options"),
    [
        ("create", ["ab"], {}),
        ("create", [["a", "b"]], {"images": []}),
        ("create", [["a", "b"]], {"images": [[b"x"], []]}),
        ("create", [["a", "b"]], {"images": [[b"x"]]}),
        ("create", [["a", "b"]], {"examples": [[b"x"], []]}),
        ("create", [["a", "b", "c"]], {"examples": [[b"x"], [b"x"]]}),
        ("create", [["a", "b", "c"]], {"examples": [b"x", b"x", None]}),
        ("predict", ["an-id", []], {}),
        ("predict", ["an-id", "photo.png"], {}),
        ("predict", ["an-id", b"x"], {}),
        ("predict", ["an-id", [object()]], {}),
        ("create", [["a", "b"]], {"images": [[b"x"], [object()]]}),
        ("model", [""], {}),
        ("predict", [ModelReply.model_construct(id="an-id"), [b"x"]], {}),
        ("weights", [""], {}),
        ("predict", ["", [b"x"]], {}),
    ],
)
def test_prompts_that_are_refused_before_they_are_sent(kind, call, args, options):
    service = Service()
    with pytest.raises(PromptError):
        ask(kind, service, call, *args, **options)
    assert service.sent == []


@kinds
def test_it_gives_up_at_last(kind, waits):
    with pytest.raises(ServiceError, match="cannot be reached: x") as error:
        ask(kind, Service(*[httpx.ConnectError("x")] * 9), "model", "an-id", retries=2)
    assert error.value.status is None
    assert len(waits) == 2
    with pytest.raises(ServiceError) as error:
        ask(kind, Service(*[(503, 1)] * 9), "model", "an-id", retries=1)
    assert error.value.status == 503


@kinds
def test_a_refusal_is_not_retried_and_carries_the_problem(kind, waits):
    service = Service(422)
    with pytest.raises(ServiceError, match="No: classes") as error:
        ask(kind, service, "create", ["a", "b"])
    assert error.value.problem == PROBLEM
    assert (len(service.sent), waits) == (1, [])


@kinds
@pytest.mark.parametrize("options", [{"steps": 0}, {"seed": -1}, {"descriptions": ["a\x00", "b"]}])
def test_a_bad_prompt_is_not_sent(kind, options):
    service = Service()
    with pytest.raises(PromptError):
        ask(kind, service, "create", ["a", "b"], **options)
    assert service.sent == []


@kinds
@pytest.mark.parametrize("images", ["ab", ["a.png", "b.png"], [Path("a.png")] * 2, [b"a", b"b"]])
def test_pictures_are_a_list_for_each_class(kind, images):
    service = Service()
    with pytest.raises(PromptError, match="list for each class"):
        ask(kind, service, "create", ["a", "b"], images=images)
    assert service.sent == []


@kinds
def test_a_sentence_is_split_as_it_is_everywhere(kind):
    service = Service()
    ask(kind, service, "create", "otters, a bicycle and maple trees.")
    assert json.loads(service.sent[0].content)["classes"] == ["otters", "a bicycle", "maple trees"]


def test_both_clients_have_the_same_calls():
    def public(kind):
        return {
            name: inspect.signature(value)
            for name, value in vars(kind).items()
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)


def test_a_client_may_be_closed_without_a_block():
    one, other = Client("http://tina"), AsyncClient("http://tina")
    one.close()
    asyncio.run(other.close())
    assert one._http.is_closed
    assert other._http.is_closed
