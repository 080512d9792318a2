"""Jobs on a cluster that changes: lost nodes, too few nodes, too little memory, broken workers."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs import resources
from ray_jobs.build_zoo import blocks_of
from ray_jobs.job import run_job
from tina.configio import config_from_dict
from tina.errors import ConfigError, DataError
from tina.jobconfig import JobConfig
from tina.run import Run
from tina.zoo import build_rows, read_zoo

ROOT = Path(__file__).parents[1]

# Ray's own words, 2.60
KILLED = """1 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 10.0.0.7, ID: abc) was 23.0GB used / 24.0GB limit (0.958)
OOM kill reason: Memory usage 24696061952B exceeded threshold of 24480219955B (95.0% of limit)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND"""


def config_of(storage, **changes):
    """A zoo that takes a worker half a minute, Ray aside; its numbers mean nothing."""
    values = {
        "name": "zoo",
        "storage": str(storage),
        "data": {"name": "digits"},
        "tasks": {"min_classes": 2, "max_classes": 4, "train": 40, "val": 2, "held_out": 2},
        "classifier": {
            "family": "cnn5k",
            "generic": {"steps": 40, "batch_size": 32, "lr": 1e-2},
            "finetune": {"steps": 400, "batch_size": 64, "lr": 3e-3},
        },
        "cluster": {"zoo_workers": 3, "zoo_block": 2, "train_workers": 1},
    }
    for key, change in changes.items():
        values[key] |= change
    return values


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_of(tmp_path / "runs")))
    return file


def fail_with(error, config_file):
    """A job whose work raises: its exit code."""

    def work(run):
        raise error

    return run_job(
        work, ["--config", str(config_file)], name="build_zoo", about="A job that fails."
    )


# --- what an error comes out as -------------------------------------------------------------------


def in_a_task(cause):
    """An error of a worker, as `ray.get` raises it."""
    from ray.exceptions import RayTaskError

    error = RayTaskError(
        "work()", "Traceback ...\n  File ...\nError", cause, "ray::x", 1, "1.2.3.4"
    )
    return error.as_instanceof_cause()


def on_ranks(*failures):
    from ray.train import WorkerGroupError

    return WorkerGroupError("rank 0 failed\nrank 1 failed", dict(enumerate(failures)))


def on_the_controller(error):
    from ray.train import ControllerError

    return ControllerError(error)


def killed():
    from ray.exceptions import OutOfMemoryError

    return OutOfMemoryError(KILLED)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataError("the zoo\n is spoilt"),
        lambda: in_a_task(DataError("the zoo is spoilt")),
        lambda: in_a_task(PermissionError("the zoo is spoilt")),
        lambda: on_ranks(RuntimeError("Connection closed by peer"), DataError("the zoo is spoilt")),
        lambda: on_the_controller(in_a_task(DataError("the zoo is spoilt"))),
    ],
)
def test_what_a_user_can_mend_ends_with_2_and_one_line(make, config_file, capsys):
    assert fail_with(make(), config_file) == 2
    assert capsys.readouterr().err == "error: the zoo is spoilt\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (killed, ["a pool worker", "23.0GB used / 24.0GB limit", "cluster.zoo_block"]),
        (lambda: in_a_task(MemoryError()), ["a pool worker", "cluster.zoo_workers"]),
        (lambda: in_a_task(torch.OutOfMemoryError("CUDA out of memory")), ["CUDA", "zoo_block"]),
        (lambda: in_a_task(killed()), ["a pool worker"]),
        (
            lambda: on_ranks(RuntimeError("Connection closed by peer"), killed()),
            ["training rank 1 ran", "23.0GB", "train.accumulation", "cluster.zero_stage"],
        ),
        (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["own process"]),
    ],
)
def test_too_little_memory_ends_with_1_and_one_line(make, words, config_file, capsys):
    assert fail_with(make(), config_file) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("error: build_zoo: ")
    assert "ran out of memory" in printed
    assert "PID" not in printed  # not the list of processes that Ray gives
    for word in words:
        assert word in printed


def died_while_made():
    from ray.exceptions import ActorDiedError, RayTaskError

    text = "Traceback (most recent call last):\n  File ...\nModuleNotFoundError: No module 'tina'"
    return ActorDiedError(RayTaskError("init()", text, ValueError(), "ray::x", 1, "1.2.3.4"))


def sigkilled():
    from ray.core.generated.common_pb2 import ActorDiedErrorContext
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    why = "Killed by SIGKILL, maybe by the OOM killer."
    died = ActorDiedError(ActorDiedErrorContext(error_message=why, actor_id=bytes(16)))
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=died)


def crashed():
    from ray.exceptions import WorkerCrashedError

    return WorkerCrashedError()


def timed_out():
    from ray.exceptions import GetTimeoutError

    return GetTimeoutError("waited\nin vain")


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: ZeroDivisionError("a\nbug"), "ZeroDivisionError: a bug"),
        (lambda: in_a_task(ZeroDivisionError("a bug")), "ZeroDivisionError: a bug"),
        (lambda: ZeroDivisionError("bug " * 1000), "ZeroDivisionError: bug bug"),
        (lambda: on_ranks(ZeroDivisionError("a bug")), "ZeroDivisionError: a bug"),
        (died_while_made, "ActorDiedError: ModuleNotFoundError: No module 'tina'"),
        (crashed, "WorkerCrashedError: The worker died unexpectedly"),
        (timed_out, "GetTimeoutError: waited in vain"),  # an OSError by birth, but none of a user's
    ],
)
def test_other_failures_end_with_1_and_their_reason_last(make, last, config_file, capsys):
    assert fail_with(make(), config_file) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith(f"error: {last}")
    assert len(lines[-1]) < 600


def test_a_rank_that_was_killed_is_told_from_those_that_lost_it(config_file, capsys):
    """The kernel says nothing when it kills for memory: what would help is said all the same."""
    lost = RuntimeError("Connection closed by peer")
    assert fail_with(on_ranks(lost, sigkilled()), config_file) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ActorDiedError: ")
    assert "If memory ran out: raise train.accumulation or cluster.zero_stage" in last


@pytest.mark.parametrize("storage", ["file/runs", "file"])
def test_storage_that_cannot_be_written(storage, tmp_path, config_file, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--config", str(config_file), "--storage", str(tmp_path / storage)]
    assert run_job(lambda run: None, flags, name="build_zoo", about="A job.") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert str(tmp_path / "file") in printed


# --- what a cluster holds -------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch):
    """A cluster to be made up, and what its autoscaler was asked for."""
    import ray
    import ray.autoscaler.sdk

    found, asked = [], []
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr(
        ray.autoscaler.sdk, "request_resources", lambda bundles: asked.append(bundles)
    )
    return found, asked


def node(alive=True, name="", **resources):
    return {"Alive": alive, "NodeID": name, "Resources": resources}


@pytest.mark.parametrize(
    ("each", "expected"),
    [({"CPU": 1.0}, 13), ({"CPU": 4.0}, 3), ({"CPU": 1.0, "GPU": 1.0}, 3), ({"CPU": 0.1}, 130)],
)
def test_capacity_counts_whole_workers_on_living_nodes(nodes, each, expected):
    found, _ = nodes
    found += [node(CPU=8.0, GPU=2.0), node(CPU=5.0, GPU=1.0), node(GPU=4.0), node(False, CPU=64.0)]
    assert resources.capacity(each) == expected


def test_capacity_leaves_the_job_its_own_process(nodes, monkeypatch):
    """`--entrypoint-num-cpus` holds a worker's place to the end: ranks would wait for ever."""
    found, asked = nodes
    found += [node(name="head"), node(name="a", CPU=2.0), node(name="b", CPU=2.0)]
    assert resources.capacity({"CPU": 1.0}) == 4
    monkeypatch.setattr(resources, "own_share", lambda: {"b": {"CPU": 1.0}})
    assert resources.capacity({"CPU": 1.0}) == 3
    assert resources.capacity({"CPU": 2.0}) == 1
    with pytest.raises(ConfigError, match="holds 1 of them beside the job itself after 0 s"):
        resources.require(2, {"CPU": 2.0}, key="cluster.train_workers", wait_s=0)
    assert asked[0] == [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}]


@pytest.mark.parametrize("reachable", [True, False])
def test_what_a_submitted_job_holds(monkeypatch, reachable):
    import ray.util.state
    from ray.util.state.exception import ServerUnavailable

    def list_actors(filters, detail):
        assert filters[0] == ("name", "=", "_ray_internal_job_actor_raysubmit_1")
        if not reachable:
            raise ServerUnavailable
        return [SimpleNamespace(node_id="b", required_resources={"CPU": 1.0})]

    monkeypatch.setattr(ray.util.state, "list_actors", list_actors)
    monkeypatch.setenv(
        resources.SUBMITTED, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    )
    resources.own_share.cache_clear()
    try:
        assert resources.own_share() == ({"b": {"CPU": 1.0}} if reachable else {})
    finally:
        resources.own_share.cache_clear()


@given(st.integers(0, 300), st.integers(1, 9), st.integers(0, 20))
def test_blocks_hold_each_task_once_and_none_is_long_at_the_end(n, most, workers):
    blocks = [range(n)[place] for place in blocks_of(n, most=most, workers=workers)]
    assert [task for block in blocks for task in block] == list(range(n))
    sizes = [len(block) for block in blocks]
    if workers <= 1:
        assert sizes == [most] * (n // most) + [n % most] * (n % most > 0)
    else:
        assert sizes == sorted(sizes, reverse=True)
        assert all(0 < size <= most for size in sizes)
        # while one worker does a block, the others have as much of what is left, and more
        assert all(2 * workers * (len(b) - 1) < n - b.start for b in blocks)


def test_what_the_cluster_holds_is_not_asked_for(nodes):
    found, asked = nodes
    found.append(node(CPU=4.0))
    resources.require(4, {"CPU": 1.0}, key="cluster.train_workers", wait_s=0)
    assert asked == []


def test_a_cluster_that_grows_is_awaited(nodes, monkeypatch):
    found, asked = nodes
    found.append(node(CPU=1.0))
    monkeypatch.setattr(resources.time, "sleep", lambda seconds: found.append(node(CPU=1.0)))
    resources.require(3, {"CPU": 1.0}, key="cluster.train_workers", wait_s=60)
    # each time anew, as others' requests take its place; and nothing is left to be held
    assert asked == [[{"CPU": 1.0}] * 3, [{"CPU": 1.0}] * 3, []]


def test_a_cluster_that_does_not_grow_is_refused(nodes):
    found, asked = nodes
    found.append(node(CPU=3.0))
    begin = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        resources.require(4, {"CPU": 2.0}, key="cluster.train_workers", wait_s=1)
    assert 1 <= time.monotonic() - begin < 5
    assert asked == [[{"CPU": 2.0}] * 4] * (len(asked) - 1) + [[]]
    message = str(refused.value)
    assert message.startswith("cluster.train_workers needs 4 x 2 CPU, and the cluster holds 1 of")
    assert "lower cluster.train_workers" in message
    with pytest.raises(ConfigError, match=r"needs 1 x 1\.5 GiB of memory, and the cluster holds 0"):
        resources.require(1, {"memory": 1.5 * 2**30}, key="it", wait_s=0)
    assert "cluster.wait_s" in message


# --- a real cluster -------------------------------------------------------------------------------

# Ray leaves a socket of the head node's to the garbage collector
leaky = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its sockets; apart, so that no other job on the machine joins in."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path must be short
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment(ray_folder, monkeypatch):
    """For jobs and for the nodes that this process starts."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in {
        "PATH": tools,
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": ray_folder,
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def cluster(environment):
    """Three nodes of one CPU each; a job in this environment joins them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        environment.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def running(config_file, log, script=None):
    """A job in a process of its own, that is gone at the end with all that it started."""
    what = [str(script)] if script else ["-m", "ray_jobs.build_zoo"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *what, "--config", str(config_file)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        for left in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def run_to_its_end(config_file, log, script=None, *, timeout=400):
    """Exit code and output of a job."""
    with running(config_file, log, script) as process:
        process.wait(timeout)
    return process.returncode, log.read_text()


def broken(tmp_path, body):
    """A zoo job whose actors do something else."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import ray_jobs.build_zoo as zoo\n"
        "from ray_jobs.job import run_job\n"
        "from tina.errors import DataError\n"
        "class Broken:\n"
        "    def __init__(self, *args):\n"
        "        pass\n"
        "    def __call__(self, blocks):\n"
        f"        {body}\n"
        "zoo.Teacher = Broken\n"
        "sys.exit(run_job(zoo.work, sys.argv[1:], name='build_zoo', about='A job.'))\n"
    )
    return script


def stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@leaky
@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_costs_no_row(cluster, config_file, tmp_path):
    """A node dies in the middle of a build: every task has its row, as if nothing had been."""
    run = Run(config_from_dict(JobConfig, yaml.safe_load(config_file.read_text())))
    folder, log = run.folder / "zoo", tmp_path / "first.log"
    with running(config_file, log) as process:
        limit = time.monotonic() + 120
        while not list(folder.glob("*.parquet")):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.05)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        early = len(list(folder.glob("*.parquet")))
        process.wait(180)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert early < 21, "the zoo was built before the node was lost"

    zoo, tasks = read_zoo(folder), run.zoo_tasks("zoo")
    assert sorted(zoo.task_ids) == sorted(task.task_id for task in tasks)  # each once
    rows = build_rows(
        tasks,
        family=run.family,
        dataset=run.dataset,
        store=run.store,
        generic=run.generic,
        recipe=run.recipe("zoo"),
        max_classes=run.config.tasks.max_classes,
        stacked=False,
    )
    expected = {row["task_id"]: row for row in rows}
    for i, task_id in enumerate(zoo.task_ids):
        assert torch.equal(zoo.theta[i], torch.from_numpy(expected[task_id]["theta"]))
        assert float(zoo.accuracy[i]) == pytest.approx(expected[task_id]["accuracy"])

    before = stamps(folder)
    code, _ = run_to_its_end(config_file, tmp_path / "second.log")
    assert code == 0
    assert stamps(folder) == before


@leaky
@pytest.mark.ray
def test_more_workers_than_the_cluster_holds(cluster, config_file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from ray_jobs.job import run_job, start_ray\n"
        "from ray_jobs.resources import require\n"
        "def work(run):\n"
        "    start_ray()\n"
        "    require(4, {'CPU': 1.0}, key='cluster.train_workers', wait_s=2)\n"
        "sys.exit(run_job(work, sys.argv[1:], name='train', about='A job.'))\n"
    )
    code, printed = run_to_its_end(config_file, tmp_path / "log", script, timeout=60)
    assert code == 2
    assert printed.splitlines()[-1] == (
        "error: cluster.train_workers needs 4 x 1 CPU, and the cluster holds 3 of them after 2 s: "
        "lower cluster.train_workers, add nodes or raise cluster.wait_s"
    )
    assert "Traceback" not in printed


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("raise ZeroDivisionError('a bug')", 1, "error: ZeroDivisionError: a bug"),
        ("raise DataError('no such images')", 2, "error: no such images"),
    ],
)
def test_an_error_in_an_actor_ends_the_job_at_once(
    environment, config_file, tmp_path, body, code, last
):
    tried = tmp_path / "tried"
    note = f"print(blocks['task_ids'][0].as_py(), file=open({str(tried)!r}, 'a'), flush=True)"
    script = broken(tmp_path, f"{note}; {body}")
    values = config_of(tmp_path / "runs", cluster={"zoo_workers": 1})
    config_file.write_text(yaml.safe_dump(values))
    found, printed = run_to_its_end(config_file, tmp_path / "log", script)
    assert found == code, printed[-3000:]
    assert printed.splitlines()[-1] == last
    assert ("Traceback" in printed) == (code == 1)
    blocks = tried.read_text().splitlines()
    # none is tried again; beside the first, the one that waited at its worker may have begun
    assert 1 <= len(set(blocks)) == len(blocks) <= 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_block_that_kills_its_actor_ends_the_job(environment, config_file, tmp_path):
    """As one does that needs too much memory: tried again as often as a lost node's, no more."""
    tried = tmp_path / "tried"
    script = broken(tmp_path, f"open({str(tried)!r}, 'a').write('x'); import os; os._exit(1)")
    values = config_of(tmp_path / "runs", cluster={"zoo_workers": 1, "max_failures": 1})
    config_file.write_text(yaml.safe_dump(values))
    code, printed = run_to_its_end(config_file, tmp_path / "log", script, timeout=180)
    assert code == 1, printed[-3000:]
    assert printed.splitlines()[-1].startswith("error: ActorDiedError: ")
    assert tried.read_text() == "xx"
