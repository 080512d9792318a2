"""Storages that are no folders: what one process keeps, another fetches, whole or not at all.

`fsspec+file` is a store that pyarrow reaches as it reaches S3, with a folder behind it. `bucket` is
one of S3 itself, as far as moto's server goes.
"""

import contextlib
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ray.exceptions import RayTaskError
from safetensors import SafetensorError

from ray_jobs import tune
from tina.config import PromptConfig, RecipeConfig
from tina.configio import parse_config
from tina.datasets import load_dataset
from tina.encoders import TABLE_FILE, build_encoder
from tina.errors import CheckpointError, ConfigError, DataError
from tina.jobconfig import DataConfig, JobConfig
from tina.pipeline import TinaPipeline
from tina.run import Run
from tina.storage import Place, at_hand, cached
from tina.stores import Store, below, is_uri, split

NAMES = st.text("abz09-_. #?%&", min_size=1, max_size=8).filter(lambda name: set(name) != {"."})


@pytest.fixture
def shelf(tmp_path):
    """A folder behind a store, and the store's URI."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    return folder, f"fsspec+file://{folder}"


@pytest.fixture(scope="module")
def bucket(port):
    """The URI of a bucket."""
    from pyarrow.fs import FileSystem

    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    uri = f"s3://bucket?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "tests")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
            limit = time.monotonic() + 60
            while time.monotonic() < limit:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.1)
            files, name = FileSystem.from_uri(f"{uri}&allow_bucket_creation=true")
            files.create_dir(name)
            yield uri
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["a folder", "S3"])
def uri(request, tmp_path):
    """A place of its own in a store of either kind."""
    if request.param == "S3":
        return below(request.getfixturevalue("bucket"), tmp_path.name)
    return f"fsspec+file://{tmp_path}"


def write(place, name, text):
    file = place.folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


# --- locations ------------------------------------------------------------------------------------


@given(
    st.sampled_from(["/runs", "s3://bucket", "s3://bucket/runs", "gs://bucket/a/b", "hdfs:///x"]),
    st.sampled_from(["", "?region=eu-west-1&scheme=http"]),
    NAMES,
)
def test_split_undoes_below(storage, options, name):
    storage += options if is_uri(storage) else ""
    assert split(below(storage, name)) == (storage, name)
    assert below(storage, "a", name) == below(below(storage, "a"), name)


def test_the_run_of_a_path_is_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split("runs/mine") == (str(tmp_path / "runs"), "mine")


# --- the user cache -------------------------------------------------------------------------------


def test_what_a_full_disk_does_not_take_is_made_each_time(tmp_path, monkeypatch, caplog):
    """safetensors writes with an error of its own."""

    def full(file, made):
        file.write_text(made[:2])
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    for _ in range(2):
        file = tmp_path / "cache" / "kept"
        assert cached(file, read=Path.read_text, make=lambda: "made", write=full) == "made"
        assert f"cannot keep {file}: Error while serializing" in caplog.text
        assert not [*file.parent.iterdir()]
        caplog.clear()


# --- places ---------------------------------------------------------------------------------------


def test_what_one_process_keeps_another_fetches(uri):
    mine, yours = Place(uri), Place(uri)
    write(mine, "zoo/part-0", "rows")
    write(mine, "zoo/deep/part-1", "more")
    write(mine, "config.yaml", "name: x")
    assert not yours.fetch("config.yaml").exists()
    mine.keep("zoo", "config.yaml")
    assert not yours.fetch("config.yaml").exists(), "it was asked for before"
    assert yours.fetch("config.yaml", again=True).read_text() == "name: x"
    zoo = yours.fetch("zoo")
    assert (zoo / "part-0").read_text() == "rows"
    assert (zoo / "deep" / "part-1").read_text() == "more"
    assert yours.names() == mine.names() == {"zoo", "config.yaml"}
    assert mine.below("zoo").names() == {"part-0", "deep"}


def test_a_path_is_worked_on_where_it_is(tmp_path):
    place = Place(tmp_path)
    write(place, "a", "1")
    place.keep("a")
    assert place.fetch("a") == tmp_path / "a"
    assert place.names() == {"a"}
    place.remove("a")
    assert place.names() == set()
    assert Place(tmp_path / "none").names() == set()


def test_a_copy_ends_with_its_place(uri):
    place = Place(uri)
    copy = place.folder
    assert copy.is_dir()
    del place
    assert not copy.exists()


def test_a_place_travels_without_its_copy(uri):
    mine = Place(uri)
    write(mine, "a", "1")
    other = pickle.loads(pickle.dumps(mine))
    assert other == mine
    assert hash(other) == hash(mine)
    assert other != Place(below(uri, "b"))
    assert other.folder != mine.folder


def test_a_folder_is_there_with_its_manifest(uri, monkeypatch):
    """Cut off at any file, it is not there; sent again, it is."""
    mine = Place(uri)
    for name in ("config.json", "manifest.json", "model.safetensors", "a/b"):
        write(mine, f"trained/{name}", name)
    send = Store.send
    for most in range(4):
        sent = []

        def stop(store, file, name, most=most, sent=sent):
            if len(sent) == most:
                raise OSError("the network is gone")
            sent.append(name)
            send(store, file, name)

        monkeypatch.setattr("tina.stores.AT_ONCE", 1)
        monkeypatch.setattr(Store, "send", stop)
        with pytest.raises(OSError, match="network"):
            mine.keep("trained")
        assert not Place(uri).fetch("trained", whole=True).exists()
    monkeypatch.setattr(Store, "send", send)
    mine.keep("trained")
    assert (Place(uri).fetch("trained", whole=True) / "a" / "b").read_text() == "a/b"


def test_a_folder_with_a_manifest_is_written_once(uri):
    """As one job of two that release a checkpoint is refused in a folder."""
    first, second = Place(uri), Place(uri)
    for place, text in ((first, "1"), (second, "2")):
        assert not place.fetch("trained", whole=True).exists()
        write(place, "trained/README.md", text)
        write(place, "trained/manifest.json", text)
    first.keep("trained")
    with pytest.raises(FileExistsError, match="exists already; nothing was overwritten"):
        second.keep("trained")
    assert (Place(uri).fetch("trained") / "README.md").read_text() == "1"


def test_a_fetch_that_was_cut_off_is_made_again(shelf, monkeypatch):
    mine, yours = Place(shelf[1]), Place(shelf[1])
    for part in range(3):
        write(mine, f"zoo/part-{part}", "rows")
    mine.keep("zoo")
    copy = Store._copy_here

    def stop(store, path, file):
        if path.endswith("part-2"):
            raise OSError("the network is gone")
        copy(store, path, file)

    monkeypatch.setattr(Store, "_copy_here", stop)
    with pytest.raises(OSError, match="network"):
        yours.fetch("zoo")
    assert not (yours.folder / "zoo").exists()
    monkeypatch.setattr(Store, "_copy_here", copy)
    assert len(list(yours.fetch("zoo").iterdir())) == 3


def test_what_a_killed_process_leaves_goes_with_the_next(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1];"
        "from tina.storage import Place; place = Place(sys.argv[2]);"
        "print(place.folder, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    mine = Place(shelf[1])
    alive = mine.folder
    command = [sys.executable, "-c", code, str(tmp_path), shelf[1]]
    killed = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    assert killed.is_dir()
    other = Place(shelf[1])
    living = {alive, other.folder}
    assert {x for x in tmp_path.glob("tina-*") if x.is_dir()} == living


def test_errors_name_the_place(shelf):
    place = Place(shelf[1])
    with pytest.raises(DataError) as found, place.named():
        raise DataError(f"{place.folder}/zoo holds nothing")
    assert str(found.value) == f"{shelf[1]}/zoo holds nothing"
    # what Ray makes of a worker's is of both kinds, and its text a traceback
    cause = DataError(f"{place.folder}/zoo holds nothing")
    with pytest.raises(DataError) as found, place.named():
        raise RayTaskError("work", f"Traceback\n{cause}", cause).as_instanceof_cause()
    assert type(found.value) is DataError
    assert str(found.value) == f"{shelf[1]}/zoo holds nothing"


@pytest.mark.parametrize("at", [0, 1])
def test_a_folder_is_held_once_its_manifest_is_there(shelf, at):
    folder, place = shelf[0] / "start", Place(shelf[at])
    assert not place.holds("start")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("half of it")
    assert not place.holds("start")
    (folder / "manifest.json").write_text("{}")
    assert place.holds("start")


def test_a_configuration_from_a_store(shelf, tiny_file):
    folder, uri = shelf
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(tiny_file.read_text())
    file = below(uri, "c.yaml")
    wanted = parse_config(JobConfig, ["--config", str(tiny_file)])
    assert parse_config(JobConfig, ["--config", file]) == wanted
    assert parse_config(JobConfig, [f"--config={file}"]) == wanted


def test_a_damaged_configuration_is_named_by_its_place(shelf):
    folder, uri = shelf
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text("tasks: [")
    with pytest.raises(ConfigError, match="is not readable YAML") as found:
        Run.open(below(uri, "run"))
    assert str(found.value).startswith(below(uri, "run"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "is not readable YAML"), ("tasks: [", "is not readable YAML"), ("a: 1", "must hold")],
)
def test_a_space_to_search_is_named_by_its_place(shelf, tiny_file, capsys, text, reason):
    folder, uri = shelf
    if text:
        (folder / "space.yaml").write_text(text)
    space = below(uri, "space.yaml")
    assert tune.main(["--config", str(tiny_file), "--space", space]) == 2
    assert f"error: {space} {reason}" in capsys.readouterr().err


def test_a_configuration_that_is_not_there_is_named_by_its_place(shelf):
    file = below(shelf[1], "c.yaml")
    for words in (["--config", file], [f"--config={file}"]):
        with pytest.raises(ConfigError, match=re.escape(f"File does not exist: '{file}'")):
            parse_config(JobConfig, words)


def test_a_file_that_was_cut_off_is_not_there(shelf, monkeypatch):
    folder, uri = shelf
    mine = Place(uri)
    write(mine, "zoo/part-0", "rows")
    monkeypatch.setattr("pyarrow.fs.copy_files", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011
        mine.keep("zoo/part-0")
    (folder / "zoo" / ".part-1.0123.tmp").write_text("ro")
    assert not Place(uri).fetch("zoo").exists()


def test_remove(uri):
    place = Place(below(uri, "run"))
    for name in ("a", "b"):
        write(place, name, name)
    place.keep("a", "b")
    then = place.modified("a")
    assert Place(below(uri, "run")).modified("a") == then
    time.sleep(1.1)  # S3 knows whole seconds
    place.keep("a")
    assert place.modified("a") > then
    place.remove("a")
    assert place.names() == {"b"}
    assert not place.fetch("a").exists()
    with pytest.raises(FileNotFoundError):
        place.modified("a")
    place.clear()
    assert place.names() == set()
    assert "run" not in Place(uri).names()


@pytest.mark.parametrize("unknown", ["s4://bucket/runs", "s3:///", "fsspec+nothing://x"])
def test_a_store_that_nobody_knows(unknown):
    with pytest.raises(ConfigError, match="is no storage"):
        Place(unknown).fetch("a")


def test_a_bucket_that_is_not_there(bucket):
    place = Place(bucket.replace("//bucket", "//none"))
    write(place, "a", "1")
    with pytest.raises(OSError, match="'none' not found"):
        place.keep("a")


# --- what is read: data, tables, checkpoints ------------------------------------------------------


def test_a_shared_copy_follows_its_source(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_text(name)
    source = below(uri, "data")
    copy = at_hand(source)
    first = (copy / "a").stat().st_ino
    assert at_hand(source) == copy
    assert (copy / "a").stat().st_ino == first, "it was copied twice"
    (folder / "data" / "a").write_text("c")
    os.utime(folder / "data" / "a", ns=(0, 0))  # older, as what is put back from a backup
    (folder / "data" / "b").unlink()
    assert at_hand(source) == copy
    assert {f.name: f.read_text() for f in copy.iterdir()} == {"a": "c"}
    assert at_hand(below(source, "a")).read_text() == "c"
    assert at_hand(str(copy)) == copy
    shutil.rmtree(folder / "data")
    assert not list(at_hand(source).rglob("*"))
    assert not at_hand(below(source, "a")).exists()


def test_a_shared_copy_has_no_part_that_has_left(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("new", "old"):
        (folder / name).mkdir()
        (folder / name / "x").write_text(name)
        copy = at_hand(uri, "new", "old")
        shutil.rmtree(folder / name)
    assert not (copy / "new" / "x").exists()
    assert (copy / "old" / "x").exists()


def test_processes_that_share_a_copy_do_not_disturb_each_other(shelf, tmp_path):
    folder, uri = shelf
    for number in range(200):
        (folder / f"{number}").write_bytes(bytes(20_000))
    code = (
        "import sys; from tina.storage import at_hand;"
        "print(sum(f.stat().st_size for f in at_hand(sys.argv[1]).iterdir()))"
    )
    own = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, uri]
    started = [
        subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [process.communicate()[0] for process in started] == ["4000000\n"] * 4


def test_of_many_data_sets_the_one_that_is_needed_comes(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("cifar100", "mini_imagenet"):
        (folder / name).mkdir()
        (folder / name / "train-0.parquet").write_text(name)
    copy = at_hand(uri, "nothing", "cifar100")
    assert [f.name for f in copy.rglob("*")] == ["cifar100", "train-0.parquet"]


def test_a_bucket_as_a_folder_of_data(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = Place(bucket)
    write(place, "cifar100/train-0.parquet", "rows")
    write(place, "other/train-0.parquet", "rows")
    place.keep("cifar100", "other")
    copy = at_hand(bucket, "cifar100")
    assert {f.parent.name for f in copy.rglob("*.parquet")} == {"cifar100"}
    assert {f.parent.name for f in at_hand(bucket).rglob("*.parquet")} == {"cifar100", "other"}


def test_images_from_a_store_are_those_from_a_folder(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(12):
        file = folder / "mine" / ("ant", "bee")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 9)).save(file)
    here = load_dataset(DataConfig(name="folder", root=str(folder / "mine")))
    there = load_dataset(DataConfig(name="folder", root=below(uri, "mine")))
    assert there.fingerprint == here.fingerprint
    monkeypatch.setenv("TINA_DATA", below(uri, "mine"))
    assert load_dataset(DataConfig(name="folder")).fingerprint == here.fingerprint


def test_data_that_are_not_in_a_store(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "imagenet").mkdir()
    (folder / "imagenet" / "train-0.parquet").write_text("large")
    monkeypatch.setenv("TINA_DATA", uri)
    assert load_dataset(DataConfig(name="digits")).num_classes == 10
    with pytest.raises(DataError, match=re.escape(f"parquet in {uri}/mini_imagenet;")):
        load_dataset(DataConfig(name="mini_imagenet"))
    assert not list((tmp_path / "cache").rglob("train-0.parquet")), "it was not asked for"


@pytest.mark.parametrize("name", ["mine/ant/1.png", "mine/train-0.parquet"])
def test_a_damaged_file_of_data_is_named_by_its_place(shelf, tmp_path, monkeypatch, name):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("no picture, no table")
    kind = "parquet" if name.endswith("parquet") else "folder"
    with pytest.raises(DataError, match=re.escape(f" {uri}/{name}: ")):
        load_dataset(DataConfig(name=kind, root=below(uri, "mine")))


def test_a_table_of_vectors_from_a_store(shelf, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = pa.table(
        {
            "set": ["digits"],
            "name": ["one"],
            "prompt": ["a photo of one"],
            "vector": pa.array([[3.0, 4.0]], pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, folder / TABLE_FILE)
    monkeypatch.setenv("TINA_DATA", uri)
    named = PromptConfig(encoder="table", model="digits", weights=below(uri, TABLE_FILE))
    for config in (PromptConfig(encoder="table", model="digits"), named):
        assert build_encoder(config).encode_text(["one"])[0].tolist() == pytest.approx([0.6, 0.8])
    (folder / TABLE_FILE).write_text("no table")
    with pytest.raises(DataError, match=re.escape(named.weights)):
        build_encoder(named)


def test_a_checkpoint_from_a_store(shelf, tiny_checkpoint, tmp_path, monkeypatch):
    folder, uri = shelf
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    here = TinaPipeline.from_pretrained(tiny_checkpoint)
    there = TinaPipeline.from_pretrained(below(uri, "checkpoint"))
    assert there.checkpoint == here.checkpoint
    with pytest.raises(ConfigError, match="is no storage"):
        TinaPipeline.from_pretrained("s4://bucket/checkpoint")
    nothing = below(uri, "nothing")
    with pytest.raises(CheckpointError, match=re.escape(f"{nothing} is no checkpoint")):
        TinaPipeline.from_pretrained(nothing)
    (folder / "checkpoint" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=re.escape(f"{uri}/checkpoint/config.json was chang")):
        TinaPipeline.from_pretrained(below(uri, "checkpoint"))


def test_a_run_of_a_store(shelf, tiny_run):
    shutil.copytree(tiny_run.folder, shelf[0] / "tiny")
    run = Run.open(below(shelf[1], "tiny"))
    assert run.read_zoo("zoo").theta.equal(tiny_run.read_zoo("zoo").theta)
    assert run.generic.body.equal(tiny_run.generic.body)
    run.claim()
    other = Run(replace(run.config, tasks=replace(run.config.tasks, seed=5)))
    with pytest.raises(ConfigError, match=re.escape(f"{shelf[1]}/tiny holds a run with another")):
        other.claim()
    with pytest.raises(ConfigError, match="holds no run"):
        Run.open(below(shelf[1], "other"))


@pytest.mark.parametrize("at", [0, 1])
def test_a_claim_sees_what_others_have_claimed_since(shelf, tiny_file, at):
    """Two jobs of one name, another rate of learning each: the later start has the last word."""
    config = parse_config(JobConfig, ["--config", str(tiny_file), "--storage", str(shelf[at])])
    first, second = Run(config), Run(replace(config, train=replace(config.train, lr=0.5)))
    for run in (first, second, first):
        run.claim()
    write(first.place, "start/manifest.json", "{}")
    first.place.keep("start")
    with pytest.raises(ConfigError, match="holds a run with another train: choose another name"):
        second.claim()
    first.claim()


@pytest.mark.parametrize("at", [0, 1])
def test_a_claim_sees_a_tower_that_another_has_trained_since(shelf, tiny_file, at):
    config = parse_config(JobConfig, ["--config", str(tiny_file), "--storage", str(shelf[at])])
    tower = RecipeConfig(steps=7)
    first, second = (
        Run(replace(config, prompt=replace(config.prompt, tower=recipe)))
        for recipe in (tower, replace(tower, steps=8))
    )
    for run in (first, second, first):
        run.claim()
    write(first.place, "tower.safetensors", "weights")
    first.place.keep("tower.safetensors")
    with pytest.raises(ConfigError, match="holds a run with another prompt"):
        second.claim()


# --- with Ray -------------------------------------------------------------------------------------


def finish(job, log, *flags, timeout=600):
    """Run a job that succeeds; what it printed."""
    command = [sys.executable, "-m", f"ray_jobs.{job}", *map(str, flags)]
    own = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    given = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("wb") as stream:
        ended = subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            env=given | own,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    assert ended.returncode == 0, log.read_text()[-3000:]
    return log.read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_the_jobs_in_a_bucket(bucket, tiny_file, tmp_path, monkeypatch):
    """From images to a checkpoint, then a sweep that lends its zoo to a run; nothing twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = below(bucket, "runs")
    one = ["--config", tiny_file, "--storage", storage, "--cluster.train_workers", 1]
    finish("quickstart", tmp_path / "first.log", *one)
    run = Run.open(below(storage, "tiny"))
    files = set(run.place.names())
    assert {"config.yaml", "zoo", "direct", "trained", "report.json", "plots"} <= files
    assert any("tfevents" in name for name in run.place.below("tensorboard").names())
    made = TinaPipeline.from_pretrained(below(storage, "tiny", "checkpoint"))
    assert made(["one", "two"]).theta.isfinite().all()
    kept = ["checkpoint/manifest.json", "zoo/zoo.json"]
    kept += [f"zoo/{name}" for name in run.place.below("zoo").names()]
    then = {name: run.place.modified(name) for name in kept}
    assert "tina_shuffled_prompt" in finish("quickstart", tmp_path / "second.log", *one)

    space = tmp_path / "space.yaml"
    sweep = {"name": "s", "trials": 2, "searcher": "random", "cpus": 0.4}
    space.write_text(
        yaml.safe_dump({"sweep": sweep, "space": {"train.lr": {"uniform": [1e-4, 1e-2]}}})
    )
    printed = finish("tune", tmp_path / "tune.log", *one, "--space", space)
    assert "2 of 2 trials ended" in printed
    trials = run.place.below("tune", "s")
    assert {"best.yaml", "trials.parquet", "pareto.png", "sweep.yaml"} <= trials.names()
    again = finish("tune", tmp_path / "again.log", *one, "--space", space)
    assert "trials ended" not in again, "a trial was repeated"
    assert {name: run.place.modified(name) for name in kept} == then
    best = below(storage, "tiny", "tune", "s", "best.yaml")
    printed = finish("train", tmp_path / "train.log", "--config", best)
    assert not list(Path(tempfile.gettempdir()).glob("tina-*.lock")), "a copy was left"
    assert below(storage, "tiny-s-best", "trained") in printed
