"""The one allowed direction of imports, and what the library may lean on."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tina

PACKAGE = Path(tina.__file__).parent
FILES = {file.stem: file for file in sorted(PACKAGE.glob("*.py")) if file.stem != "__init__"}
# From the images to the command line: a module imports only what stands before it.
STAGES = [
    *[
        "errors",
        "packaged",
        "files",
        "stores",
        "storage",
        "checks",
        "config",
        "jobconfig",
        "configio",
        "precision",
        "space",
    ],
    *["tensors", "rounding", "images", "names", "superclasses", "listing", "hub_parquet"],
    *["sources", "views", "datasets", "tasks", "fitting", "neighbours"],
    *[
        "layout",
        "backbone",
        "families",
        "inputs",
        "classifiers",
        "finetune",
        "generic",
        "tower",
        "zoo",
    ],
    *[
        "minilm",
        "encoders",
        "asked",
        "sparsemax",
        "prompts",
        "mapped",
        "curvature",
        "codec",
        "transformer",
    ],
    *["diffusion", "lent", "generator", "examples", "checkpoint", "engine", "batches", "training"],
    *["export", "model", "scoring", "advice", "pipeline"],
    *[
        "metrics",
        "baselines",
        "mixer",
        "comparison",
        "controls",
        "validation",
        "calibration",
        "evaluation",
        "novelty",
        "report",
        "plots",
        "provenance",
        "claim",
        "run",
        "sweep",
    ],
    *["schemas", "client", "cli", "__main__"],
]
FORBIDDEN = {"ray", "deepspeed", "ray_jobs", "serve"}
MOST_LINES = 400


def imported(source):
    """Dotted names of all that a module imports, within functions and for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "tina" + f".{node.module}" * bool(node.module) if node.level else node.module
            yield base
            if base == "tina":
                yield from (f"tina.{alias.name}" for alias in node.names)


def stages_of(source):
    """The modules of tina that a source imports."""
    parts = (name.split(".") for name in imported(source))
    return {path[1] for path in parts if path[0] == "tina" and len(path) > 1}


@pytest.mark.parametrize(
    "source",
    [
        "import tina.run",
        "from tina.run import Run",
        "from tina import run",
        "from . import run",
        "from .run import Run",
        "def f():\n    import os, tina.run as r",
        "if TYPE_CHECKING:\n    from tina.run import Run",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert stages_of(source) == {"run"}


def test_every_module_has_its_place():
    assert set(FILES) <= set(STAGES), "a new module needs a place in the order"
    assert len(set(STAGES)) == len(STAGES)


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_a_later_one(name):
    later = stages_of(FILES[name].read_text()) - set(STAGES[: STAGES.index(name)])
    assert not later, f"{name} imports {', '.join(sorted(later))}, which come after it"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_the_library_knows_no_cluster(file):
    found = {name.split(".")[0] for name in imported(file.read_text())}
    assert not found & FORBIDDEN


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_no_module_is_long(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES


OUTSIDE = [file for at in ("benchmarks", "docs") for file in (PACKAGE.parent / at).glob("*.py")]


@pytest.mark.parametrize("file", sorted(OUTSIDE), ids=lambda file: file.stem)
def test_what_mypy_does_not_read_imports_what_there_is(file):
    """Within functions too, which only a whole run of a benchmark would come to."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (*FORBIDDEN, "tina"):
            source = importlib.import_module(node.module)
            for alias in node.names:
                found = hasattr(source, alias.name) or importlib.util.find_spec(
                    f"{node.module}.{alias.name}"
                )
                assert found, f"{node.module} has no {alias.name}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("tina", ("torch", "numpy", "ray")), ("serve.app", ("torch", "tina.pipeline"))],
    ids=["the library", "the ingress"],
)
def test_an_import_brings_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_tina_promises_is_there():
    for name in tina.__all__:
        assert getattr(tina, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'tina' has no attribute 'Tina'"):
        _ = tina.Tina
