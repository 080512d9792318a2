"""A job's process keeps the memory that it frees, and computes with as many threads as told."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
{before}
def step():
    return [torch.ones(2_000_000) for _ in range(20)]  # held together, as a step's activations
for _ in range(20):
    step()
first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first, torch.get_num_threads())
"""


def run(before):
    """Page faults of twenty steps, and torch's threads."""
    command = [sys.executable, "-c", STEPS.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step():
    settled = "from ray_jobs.process import settle_in; settle_in(threads={})".format
    # without, it depends on where the heap happens to lie: 0 or 780,000 faults
    found = [run(settled(threads)) for threads in (1, 1, None)]
    assert max(faults for faults, _ in found) < 1000
    assert [threads for _, threads in found] == [1, 1, run("")[1]]
