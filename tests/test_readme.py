"""The README is true: its commands run, its tables are what the reports say."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_jobs.job import run_job
from tina.checkpoint import PRETRAINED, load_generator
from tina.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def lines(start: str) -> list[list[str]]:
    shell = "\n".join(blocks("sh"))
    found = [shlex.split(line, comments=True) for line in shell.splitlines() if start in line]
    assert found, f"README has no line with {start!r}"
    return found


def test_python_block_runs(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block, _ = blocks("python")  # the other needs a service: tests/test_serve_cluster.py
    scope: dict[str, object] = {}
    exec(block.replace("runs/quickstart/checkpoint", str(tiny_checkpoint)), scope)
    assert (tmp_path / "mine.safetensors").exists()
    assert (tmp_path / "mine.onnx").exists()
    assert tuple(scope["logits"].shape) == (4, 3)  # type: ignore[attr-defined]


def test_command_lines_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINA_CHECKPOINT", str(tiny_checkpoint))
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for words in lines(".venv/bin/tina"):
        if words[0].startswith("TINA_CHECKPOINT"):  # other classes: the CIFAR-100 checkpoint's
            continue
        assert words[0] == ".venv/bin/tina"
        assert main(words[1:]) == 0, words


def test_it_counts_the_words_of_the_packaged_generator() -> None:
    vocabulary = load_generator(PRETRAINED / "tina-cifar100-cnn5k").vocabulary
    trained = len(vocabulary.trained_names)
    further = len(vocabulary.names) - trained
    text = " ".join(README.split())
    assert f"trained on {trained} classes of CIFAR-100 (" in text
    assert f"and knows {further:,} further" in text
    for word in re.findall(r"further words \((.*?);", README)[0].split(", "):
        assert vocabulary.lookup(word.strip('"')) is not None, word


def test_job_lines_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in lines("python -m ray_jobs.quickstart"):
        argv = [word.replace("$PWD", str(ROOT)) for word in words[3:]]
        assert "--dry-run" in argv
        assert run_job(lambda run: None, argv, name="quickstart", about="") == 0
    assert "width: 128" in capsys.readouterr().out


# spaces of sweeps, tune_*.yaml, are read by tests/test_tune.py
PRESETS = sorted(set((ROOT / "configs").glob("*.yaml")) - set((ROOT / "configs").glob("tune_*")))


@pytest.mark.parametrize("config", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid(config: Path) -> None:
    argv = ["--config", str(config), "--storage", "/runs", "--dry-run"]
    assert run_job(lambda run: None, argv, name="quickstart", about="") == 0


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_tables_are_written_from_reports() -> None:
    spec = importlib.util.spec_from_file_location("publish", ROOT / "docs" / "publish.py")
    assert spec is not None
    assert spec.loader is not None
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    for file in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        assert publish.rewrite(file.read_text()) == file.read_text(), f"run {spec.origin}"


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_published_reports_name_their_commit() -> None:
    for file in (ROOT / "docs" / "results").glob("*/report.json"):
        report = json.loads(file.read_text())
        assert re.fullmatch(r"[0-9a-f]{7,40}", report["commit"]), file
