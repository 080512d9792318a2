"""What `precision: auto` means: bf16 where the machine has it in hardware, else fp32.

A CPU without it emulates bf16, and is several times slower than in fp32 (`benchmarks/
classifier_step.py`). A run settles the question once, when it is claimed, and its saved
configuration holds the answer: every worker and every resumption computes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tina.config import Precision
from tina.errors import ConfigError

ON_CPU = {"generic", "tower"}
"""Recipes of what the job's own process trains, on its CPU."""


def has_bf16(*, cpu: bool = False) -> bool:
    """Whether this machine's GPU computes in bf16; without one, or if asked so, its CPU."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def settle(
    values: Mapping[str, Any], saved: Mapping[str, Any], *, cpu: bool = False
) -> dict[str, Any]:
    """A configuration's plain values with each `precision: auto` replaced.

    Args:
        saved: Those of the same run when it was claimed before; what stands there is kept.
        cpu: Whether it is of what a CPU computes, also beside a GPU.
    """
    settled = dict(values)
    for key, value in values.items():
        before = saved.get(key)
        if isinstance(value, Mapping):
            known = before if isinstance(before, Mapping) else {}
            settled[key] = settle(value, known, cpu=cpu or key in ON_CPU)
        elif key == "precision" and value == "auto":
            settled[key] = before or ("bf16" if has_bf16(cpu=cpu) else "fp32")
    return settled


def in_bf16(precision: Precision) -> bool:
    """Whether to compute in bf16.

    Raises:
        ConfigError: `auto`, which only a claimed run has settled.
    """
    if precision == "auto":
        raise ConfigError("precision auto is for jobs, which settle it: say fp32 or bf16 here")
    return precision == "bf16"
