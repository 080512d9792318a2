"""Checks that several configurations make of their own values; each raises `ConfigError`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from urllib.parse import urlsplit

from tina.errors import ConfigError
from tina.stores import is_uri

SECTIONS = {"task": "tasks"}
"""Of a configuration, where the class is called otherwise."""


def absolute(paths: Mapping[str, str | None]) -> None:
    """Absolute paths or URIs by their keys, where there are any."""
    for key, path in paths.items():
        if path is not None and not is_uri(path) and not Path(path).is_absolute():
            raise ConfigError(
                f"{key} must be an absolute path or a URI, got {path!r}: "
                "a job runs in another working directory than yours"
            )
        if path is not None and not is_uri(path) and set(path) & set("*?["):
            # Ray and DeepSpeed look for their files by patterns
            raise ConfigError(f"{key} must hold none of * ? [, got {path!r}")
        if path is not None and is_uri(path) and urlsplit(path).password:
            raise ConfigError(
                f"{key} holds a password, which the run's config.yaml would keep: "
                "leave it to the environment (AWS_SECRET_ACCESS_KEY)"
            )


def plain_name(key: str, name: str) -> None:
    """A folder's name and no path; stores and file patterns understand other characters anew."""
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"{key} must be a plain folder name (letters, digits, '.', '_', '-'), got {name!r}"
        )


def visible(key: str, secret: str) -> None:
    """Characters that every header carries alike; the message does not repeat them."""
    if not re.fullmatch(r"[\x21-\x7e]*", secret):
        raise ConfigError(f"{key} may hold visible ASCII characters alone, no space")


def positive(owner: object, *keys: str, optional: bool = False) -> None:
    """Above zero; or None, where that is possible."""
    for key in keys:
        got = attrgetter(key)(owner)
        if optional and got is None:
            continue
        if not got > 0:
            raise ConfigError(f"{_dotted(owner, key)} must be above 0, got {got}")


def distinct(owner: object, *keys: str) -> None:
    """No value twice."""
    for key in keys:
        if len(set(got := attrgetter(key)(owner))) < len(got):
            raise ConfigError(f"{_dotted(owner, key)} holds a value twice, got {got}")


def not_negative(owner: object, *keys: str, optional: bool = False) -> None:
    """Zero or above; or None, where that is possible."""
    for key in keys:
        got = attrgetter(key)(owner)
        if optional and got is None:
            continue
        if not got >= 0:
            raise ConfigError(f"{_dotted(owner, key)} must not be negative, got {got}")


def inside(owner: object, *keys: str) -> None:
    """Between zero and one."""
    for key in keys:
        if not 0 < (got := attrgetter(key)(owner)) < 1:
            raise ConfigError(f"{_dotted(owner, key)} must lie between 0 and 1, got {got}")


def shares(owner: object, *keys: str) -> None:
    """From zero to one."""
    for key in keys:
        if not 0 <= (got := attrgetter(key)(owner)) <= 1:
            raise ConfigError(f"{_dotted(owner, key)} is a share, from 0 to 1, got {got}")


def fits(owner: object, *keys: str) -> None:
    """Recipes of fitting, where there are any: their owner knows what they are called."""
    for key in keys:
        if getattr(owner, key):
            positive(owner, f"{key}.steps", f"{key}.batch_size", f"{key}.lr")
            not_negative(owner, f"{key}.weight_decay")
            shares(owner, f"{key}.warmup")


def _dotted(owner: object, key: str) -> str:
    """A key as one writes it."""
    kind = type(owner).__name__.removesuffix("Config").lower()
    return f"{SECTIONS.get(kind, kind)}.{key}"
