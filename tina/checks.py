"""Checks that several configurations make of their own values; each raises `ConfigError`."""

from __future__ import annotations

from tina.errors import ConfigError


def positive(owner: object, *keys: str) -> None:
    """Above zero."""
    for key in keys:
        if not (got := getattr(owner, key)) > 0:
            raise ConfigError(f"{type(owner).__name__}.{key} must be above 0, got {got}")


def not_negative(owner: object, *keys: str) -> None:
    """Zero or above."""
    for key in keys:
        if not (got := getattr(owner, key)) >= 0:
            raise ConfigError(f"{type(owner).__name__}.{key} must not be negative, got {got}")


def shares(owner: object, *keys: str) -> None:
    """From zero to one."""
    for key in keys:
        if not 0 <= (got := getattr(owner, key)) <= 1:
            raise ConfigError(f"{type(owner).__name__}.{key} is a share, from 0 to 1, got {got}")
