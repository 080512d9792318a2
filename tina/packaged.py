"""The checkpoints that come with the package, known by name before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"
"""Their folder, each under its name."""


def pretrained() -> list[str]:
    """Their names."""
    return sorted(folder.name for folder in PRETRAINED.iterdir())
