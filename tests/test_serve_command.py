"""`python -m serve`: one line for what is wrong, any port, and an end by Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import serve.__main__ as command
from tina.client import Client

ROOT = Path(__file__).parents[1]
CLASSES = ["three", "five", "eight"]


@pytest.fixture
def cluster(monkeypatch):
    """What the command asks of Ray, without Ray."""
    asked = []
    monkeypatch.setattr(command.ray, "init", lambda **options: None)
    calls = SimpleNamespace(
        status=lambda: SimpleNamespace(proxies={}),
        start=lambda **options: asked.append(options),
        run=lambda app, blocking: None,
        shutdown=lambda: asked.append("shutdown"),
    )
    monkeypatch.setattr(command, "serve", calls)
    calls.asked = asked
    return calls


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["checkpoint"], "arguments are KEY=VALUE, got 'checkpoint'"),
        (["storage=/x"], "checkpoint: Field required"),
        (["checkpint=/x"], "unknown key 'checkpint'; valid keys: checkpoint, encoder, storage, "),
        (["checkpoint=/x", "checkpoint=/y"], "checkpoint is given twice"),
        (["checkpoint=/x", "max_batch=0"], "max_batch: Input should be greater than or equal to 1"),
        (["checkpoint=/x", "encoder=clip"], "encoder: Input should be 'sentence' or 'open_clip'"),
        (["checkpoint=/x", "min_replicas=3"], "error: min_replicas, 3, is above max_replicas, 2"),
        (["checkpoint=tina-cifar"], "checkpoint tina-cifar is none of tina-cifar100-cnn5k, "),
        (["checkpoint=here/x"], "checkpoint must be an absolute path, got here/x"),
        (["checkpoint=/x/y"], "no checkpoint at /x/y: take one that comes with Tina"),
    ],
)
def test_what_is_wrong_is_one_line(cluster, port, capsys, words, reason):
    assert command.main(["--port", str(port), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert not cluster.asked


def test_an_encoder_that_the_checkpoint_does_not_take(cluster, tiny_checkpoint, port, capsys):
    words = [f"checkpoint={tiny_checkpoint}", "--port", str(port), "encoder=sentence"]
    assert command.main(words) == 2
    assert "error: encoder sentence: the checkpoint reads any text" in capsys.readouterr().err


def test_a_cluster_that_serves_is_left_alone(cluster, tiny_checkpoint, port, capsys):
    cluster.status = lambda: SimpleNamespace(proxies={"node": "HEALTHY"})
    assert command.main([f"checkpoint={tiny_checkpoint}", "--port", str(port)]) == 2
    assert "this Ray cluster serves already" in capsys.readouterr().err
    assert not cluster.asked


def test_an_application_that_does_not_come_up(cluster, tiny_checkpoint, port, capsys):
    def fail(app, blocking):
        raise RuntimeError("Deploying\napplication failed")

    cluster.run = fail
    assert command.main([f"checkpoint={tiny_checkpoint}", "--port", str(port)]) == 1
    assert capsys.readouterr().err == "error: Deploying application failed\n"
    options = {"proxy_location": "EveryNode", "http_options": {"port": port}}
    assert cluster.asked == [options, "shutdown"]


def test_who_interrupts_the_start_is_not_shown_where(cluster, tiny_checkpoint, port, capsys):
    def interrupted(**options):
        raise KeyboardInterrupt

    cluster.start = interrupted
    assert command.main([f"checkpoint={tiny_checkpoint}", "--port", str(port)]) == 0
    assert not capsys.readouterr().err
    assert cluster.asked == ["shutdown"]


@pytest.mark.parametrize("port", [-1, 0, 65536, 10**9])
def test_what_is_no_port(cluster, tiny_checkpoint, capsys, port):
    assert command.main([f"checkpoint={tiny_checkpoint}", "--port", str(port)]) == 2
    assert f"error: nothing can listen at port {port}: " in capsys.readouterr().err


@pytest.mark.ray
def test_it_serves_on_a_port_until_it_is_interrupted(tiny_checkpoint, tmp_path, port, capfd):
    words = [f"checkpoint={tiny_checkpoint}", f"storage={tmp_path}", "--port", str(port)]
    url = f"http://localhost:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", *words],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        # what a shell starts in the background ignores it, and so do its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
        with Client(url) as client:
            assert client.create(CLASSES).classes == CLASSES
        assert command.main(words) == 2
        said = f"error: nothing can listen at port {port}: [Errno 98] Address already in use"
        assert said in capfd.readouterr().err
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        process.kill()
    command.check_free(port)
