"""Where numbers come from: the code's commit and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

# below the repository's root; what benchmarks measured is no part of what they measure
WRITTEN = ("benchmarks/results", "benchmarks/profiles")


def commit() -> str:
    """The code's commit: `TINA_COMMIT` where a job has no git, else git's word, else unknown."""
    if "TINA_COMMIT" in os.environ:
        return os.environ["TINA_COMMIT"]
    # an environment may lie in a repository of somebody else's, which does not track this file
    tracked = _git("ls-files", Path(__file__).name)
    found = tracked and _git("describe", "--always", "--abbrev=12")
    # a configuration that is not committed is no part of it either
    left = _git("status", "--porcelain", "--", ":/", *(f":(top,exclude){x}" for x in WRITTEN))
    return f"{found}{'-dirty' * bool(left)}" if found else "unknown"


def _git(*words: str) -> str:
    """What git answers beside this file; nothing where there is no git."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()


def hardware(*, gpu: bool = True) -> str:
    """What ran: processor, cores and how many of them torch uses, GPU, torch.

    Args:
        gpu: Whether one that is there is named: not where all ran beside it.

    Family and model stand behind a processor's name, which may be that of several generations.
    """
    processor, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in first)}
        if name := facts.get("model name"):
            numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
            processor = f"{name} ({', '.join(numbers)})" if numbers else name
    named = f", {torch.cuda.get_device_name()}" if gpu and torch.cuda.is_available() else ""
    count, threads = cores(), torch.get_num_threads()
    used = "" if threads == count else f" ({threads} used)"
    return f"{count} cores of {processor}{used}{named}, torch {torch.__version__}"


def cores() -> int:
    """Cores that this process may use: those of its affinity, as far as its container's share goes.

    Source: cpu.max of Linux's control groups, version 2.
    """
    count, limit = len(os.sched_getaffinity(0)), Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
