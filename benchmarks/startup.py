"""How long until Tina answers from nothing, and how much does each extra install?

    python -m benchmarks.startup     # appends a row to results/startup.jsonl
    python -m benchmarks.startup --short --checkpoint runs/quickstart/checkpoint

Each time is the median over processes that were started for it alone, the kinds in turns; files are
in the page cache after the first. Sizes are of this environment's distributions: what the core
needs, and what each extra adds to it, with everything those need in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from statistics import median

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.record import append, as_command, checkpoint_folder, load
from tina.checkpoint import load_generator

PACKAGE = "tina-text2model"
IMPORT = """
import json, time
begin = time.perf_counter()
import tina
print(json.dumps({"import_tina_s": time.perf_counter() - begin}))
"""
FIRST_MODEL = """
import json, sys, time
begin = last = time.perf_counter()
found = {}
def lap(name):
    global last
    now = time.perf_counter()
    found[name], last = now - last, now
from tina import TinaPipeline
lap("import_pipeline_s")
pipe = TinaPipeline.from_pretrained(sys.argv[1])
lap("load_checkpoint_s")
pipe(sys.argv[2:])
lap("first_call_s")
pipe(sys.argv[2:])
lap("second_call_s")
print(json.dumps(found))
"""


def fresh(*command: str) -> tuple[float, dict[str, float]]:
    """Seconds of a process from its start to its end, and what it printed as JSON."""
    begin = time.perf_counter()
    done = subprocess.run([*command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    return seconds, json.loads(done.stdout) if done.stdout.startswith("{") else {}


def start_times(checkpoint: Path, classes: Iterable[str], turns: int) -> dict[str, list[float]]:
    """Seconds of each kind of start, by turn."""
    python, tina = sys.executable, str(Path(sys.executable).with_name("tina"))
    times: dict[str, list[float]] = {}
    for _ in range(turns):
        bare, _ = fresh(python, "-c", "")
        helped, _ = fresh(tina, "--help")
        _, imported = fresh(python, "-c", IMPORT)
        whole, parts = fresh(python, "-c", FIRST_MODEL, str(checkpoint), *classes)
        # the process makes a second model, which a first one need not wait for
        first = whole - parts["second_call_s"]
        found = {"python_s": bare, "tina_help_s": helped, "cold_to_first_model_s": first}
        for name, seconds in {**found, **imported, **parts}.items():
            times.setdefault(name, []).append(seconds)
    return times


def needed(
    root: str, extras: Iterable[str], requires: Callable[[str], Iterable[str] | None]
) -> set[str]:
    """Canonical names of a distribution and all that it needs with these extras.

    Args:
        requires: A distribution's requirement lines by its name; None where it is not installed.
    """
    seen: set[tuple[str, str]] = set()
    open_ends = [(canonicalize_name(root), extra) for extra in ("", *extras)]
    while open_ends:
        name, extra = end = open_ends.pop()
        if end in seen:
            continue
        lines = requires(name)
        if lines is None:
            continue
        seen.add(end)
        for requirement in map(Requirement, lines):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            wanted = canonicalize_name(requirement.name)
            open_ends += [(wanted, more) for more in ("", *requirement.extras)]
    return {name for name, _ in seen}


def installed(name: str) -> Distribution | None:
    """A distribution of this environment."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def requirements(name: str) -> list[str] | None:
    """What an installed distribution says it requires."""
    found = installed(name)
    return None if found is None else found.requires or []


def size(name: str) -> int:
    """Bytes of an installed distribution's files."""
    found = installed(name)
    files = (found.files or []) if found else []
    paths = (Path(str(file.locate())) for file in files)
    return sum(path.stat().st_size for path in paths if path.is_file())


def sizes(largest: int = 5) -> Mapping[str, dict[str, object]]:
    """By extra: MiB and number of distributions that it adds to the core, and the largest."""
    found = installed(PACKAGE)
    assert found is not None, f"{PACKAGE} is not installed in this environment"
    core = needed(PACKAGE, (), requirements)
    sets = {"core": core}
    for extra in found.metadata.get_all("Provides-Extra") or []:
        sets[extra] = needed(PACKAGE, (extra,), requirements) - core
    bytes_of = {name: size(name) for name in set().union(*sets.values())}
    table = {}
    for extra, names in sets.items():
        ordered = sorted(names, key=lambda name: -bytes_of[name])
        table[extra] = {
            "mib": round(sum(map(bytes_of.__getitem__, names)) / 2**20, 1),
            "distributions": len(names),
            "largest_mib": {n: round(bytes_of[n] / 2**20, 1) for n in ordered[:largest]},
        }
    return table


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "runs/cifar100_cnn5k/checkpoint"
    parser.add_argument("--checkpoint", type=checkpoint_folder, default=default)
    parser.add_argument("--short", action="store_true", help="few processes")
    args = parser.parse_args()
    before, turns = load(), 3 if args.short else 11
    generator = load_generator(args.checkpoint)
    classes = generator.vocabulary.trained_names[: generator.max_classes]
    times = start_times(args.checkpoint, classes, turns)
    figures = {
        "short": args.short,
        "dataset": generator.dataset,
        "processes": turns,
        "median_s": {k.removesuffix("_s"): round(median(v), 4) for k, v in times.items()},
        "slowest_s": {k.removesuffix("_s"): round(max(v), 4) for k, v in times.items()},
        "installed": sizes(),
    }
    append("startup", figures, load_before=before)


if __name__ == "__main__":
    as_command(main)
