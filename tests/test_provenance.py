"""The commit that numbers name: the code's own, or none."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import record
from tina import provenance


@pytest.fixture(autouse=True)
def _no_name(monkeypatch):
    monkeypatch.delenv("TINA_COMMIT", raising=False)


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"


def test_a_variable_is_believed(monkeypatch):
    monkeypatch.setenv("TINA_COMMIT", "abc")
    assert provenance.commit() == "abc"


def test_a_repository_counts_where_it_holds_the_code(monkeypatch, tmp_path):
    file = tmp_path / "environment" / "provenance.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "somebody else's")
    assert provenance.commit() == "unknown"
    git(tmp_path, "add", str(file))
    git(tmp_path, "commit", "-m", "the code")
    code = git(tmp_path, "rev-parse", "--short=12", "HEAD").strip()
    assert provenance.commit() == code
    (tmp_path / "new.yaml").touch()  # what a run may have read
    assert provenance.commit() == f"{code}-dirty"


def test_what_benchmarks_wrote_is_no_change_of_the_code(monkeypatch, tmp_path):
    names = ("tina/provenance.py", "benchmarks/results/a.jsonl", "benchmarks/profiles/a.txt")
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(provenance, "__file__", str(files[0]))
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    code = git(tmp_path, "rev-parse", "--short=12", "HEAD").strip()
    for file in files[1:]:
        file.write_text("a row")
    files[1].with_name("new.jsonl").touch()
    assert provenance.commit() == code
    (tmp_path / "benchmarks" / "new.py").touch()
    assert provenance.commit() == f"{code}-dirty"


def test_rows_name_the_commit_of_the_beginning(monkeypatch, tmp_path, capsys, request):
    def main():
        monkeypatch.setattr(record, "commit", lambda: "changed meanwhile")
        for value in (1, 2):
            record.append("name", {"value": value}, load_before=0)

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "begun")
    record.code.cache_clear()
    request.addfinalizer(record.code.cache_clear)
    record.as_command(main)
    rows = [json.loads(line) for line in (tmp_path / "name.jsonl").read_text().splitlines()]
    assert [row["commit"] for row in rows] == ["begun", "begun"]


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: EPYC\n\nmodel\t: 2\n",
            "EPYC (cpu family 25, model 1)",
        ),
        ("model name\t: Some ARM\n", "Some ARM (1 used),"),
        ("BogoMIPS\t: 50.00\n", provenance.platform.machine()),
    ],
)
def test_hardware_tells_generations_of_one_name_apart(monkeypatch, tmp_path, info, words):
    file = tmp_path / "cpuinfo"
    file.write_text(info)
    monkeypatch.setattr(
        provenance, "Path", lambda name: file if name == "/proc/cpuinfo" else Path(name)
    )
    assert f"cores of {words}" in provenance.hardware()


@pytest.mark.parametrize(
    ("limit", "count"), [("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1), (None, 64)]
)
def test_cores_are_those_of_the_containers_share(monkeypatch, tmp_path, limit, count):
    file = tmp_path / "cpu.max"
    if limit:
        file.write_text(f"{limit}\n")
    monkeypatch.setattr(provenance, "Path", lambda name: file if "cpu.max" in name else Path(name))
    monkeypatch.setattr(provenance.os, "sched_getaffinity", lambda _: range(64))
    assert provenance.cores() == count
    one = "" if count == 1 else " (1 used)"  # of torch's threads, in tests
    assert provenance.hardware().endswith(f"{one}, torch {torch.__version__}")
