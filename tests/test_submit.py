"""The README's own lines on a real cluster: `ray start --head`, a `ray job submit` per job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tina.checkpoint import check_manifest
from tina.run import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def cluster_lines() -> list[str]:
    """The commands of the README's section on clusters, one per line."""
    section = README.split("## On a cluster")[1].split("\n## ")[0]
    (block, *_) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [line for line in block.replace("\\\n", "").splitlines() if line.strip()]


def lines(start: str) -> list[str]:
    found = [line for line in cluster_lines() if start in line]
    assert found, f"the README has no line with {start!r}"
    return found


class Shell:
    """Runs lines as a user in the project's folder would, after `source .venv/bin/activate`."""

    def __init__(self, home: Path) -> None:
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),  # a machine that never ran Ray: no token yet
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.exports = "".join(f"{line}\n" for line in lines("export "))

    def run(self, line: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one line; what it printed is in `stdout`, errors too."""
        return subprocess.run(
            ["bash", "-c", self.exports + line],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )


def refuse_more_ranks_than_fit_beside_the_job(shell, line, folder, config):
    """The cluster could hold them if it were idle, and Ray Train would wait for ever."""
    mine = line.replace("ray job submit", "ray job submit --entrypoint-num-cpus 1")
    mine = mine.replace("configs/quickstart.yaml", str(config))
    mine = mine.replace('"$PWD/runs"', str(folder / "runs"))
    ranks = (
        f"--cluster.train_workers 2 --cluster.train_cpus {os.cpu_count() / 2} --cluster.wait_s 1"
    )
    done = shell.run(f"{mine} {ranks}")
    assert done.returncode != 0
    assert "the cluster holds 1 of them beside the job itself after 1 s" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_each_job_of_the_readme_is_submitted_and_succeeds(tmp_path, tiny_file):
    shell = Shell(tmp_path)
    space = tmp_path / "space.yaml"
    sweep = yaml.safe_load((ROOT / "configs" / "tune_digits.yaml").read_text())["sweep"]
    small = {"sweep": sweep | {"trials": 2}, "space": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}
    space.write_text(yaml.safe_dump(small))
    try:
        for line in [*lines("ray get-auth-token"), *lines("ray start --head")]:
            done = shell.run(line)
            assert done.returncode == 0, done.stdout
        for job in ("build_zoo", "train", "evaluate", "tune"):
            for line in lines(f"ray_jobs.{job}"):
                if job == "train":
                    refuse_more_ranks_than_fit_beside_the_job(shell, line, tmp_path, tiny_file)
                mine = line.replace("configs/quickstart.yaml", str(tiny_file))
                mine = mine.replace("configs/tune_digits.yaml", str(space))
                mine = mine.replace('"$PWD/runs"', str(tmp_path / "runs"))
                done = shell.run(mine)
                assert done.returncode == 0, done.stdout[-4000:]
                assert "succeeded" in done.stdout.lower(), done.stdout[-2000:]
        run = Run.open(tmp_path / "runs" / "tiny")
        check_manifest(run.checkpoint)
        found = run.folder / "tune" / sweep["name"]
        assert {"trials.parquet", "pareto.png", "best.yaml"} <= {f.name for f in found.iterdir()}
        report = json.loads(run.report_file.read_text())
        head = shell.run("git rev-parse --short=12 HEAD").stdout.strip()
        assert report["commit"].startswith(head), "the commit did not travel with the job"

        # a job that fails says why, last, and with its status
        broken = lines("ray_jobs.train")[0].replace("configs/quickstart.yaml", str(tiny_file))
        broken = broken.replace('"$PWD/runs"', "/proc/nowhere")
        done = shell.run(broken)
        assert done.returncode != 0
        last = [line for line in done.stdout.splitlines() if line.strip()][-12:]
        assert any(line.strip().startswith("error: ") for line in last), done.stdout[-2000:]
    finally:
        shell.run("ray stop --force")


def test_submitted_lines_name_absolute_storage_and_carry_the_commit():
    for job in ("build_zoo", "train", "evaluate", "tune"):
        for line in lines(f"ray_jobs.{job}"):
            assert "ray job submit --working-dir ." in line
            assert '--storage "$PWD/runs"' in line
            assert '--runtime-env-json "$(python -m ray_jobs.job)"' in line


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("../some/where", str(ROOT.parent / "some" / "where")),  # a job runs elsewhere
        ("~/data", str(Path.home() / "data")),  # as an environment file has it
        ("s3://bucket/data", "s3://bucket/data"),
    ],
)
def test_the_runtime_environment_is_json(monkeypatch, given, sent):
    monkeypatch.setenv("TINA_DATA", given)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/somebody/.cache")  # which no other machine has
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.job"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    variables = json.loads(done.stdout)["env_vars"]
    assert variables.pop("TINA_COMMIT")
    assert variables == {"TINA_DATA": sent}
