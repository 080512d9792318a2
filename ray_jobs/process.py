"""How a job's own process computes on CPU."""

from __future__ import annotations

import ctypes
import platform

import torch

# names and numbers of malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
LARGEST = 32 << 20
"""Bytes of the largest block that glibc can keep (HEAP_MAX_SIZE / 2)."""


def settle_in(*, threads: int | None = None) -> None:
    """Keep freed memory for the next step, and compute with so many threads.

    A step allocates megabytes of activations and frees them. By default glibc gives each block back
    to the kernel and gets it again page by page, zeroed: a fifth of a training step (docs/log.md).
    Other C libraries stay as they are.

    Args:
        threads: Torch's; default: as they are (in a process of Ray's as many as CPUs asked for).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in (
            (MMAP_THRESHOLD, LARGEST),
            (TRIM_THRESHOLD, 1 << 30),
            (TOP_PAD, 64 << 20),
        ):
            libc.mallopt(option, value)
