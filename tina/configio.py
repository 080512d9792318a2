"""Configurations in and out: YAML files, command-line flags, plain values.

jsonargparse does the parsing; here its errors become one-line `ConfigError`s that list the valid
keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from tina.errors import ConfigError, one_line
from tina.storage import at_hand, named
from tina.stores import is_uri

T = TypeVar("T")


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all values that a config class can hold."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        kinds = [kind, *get_args(kind)]  # a section may be optional
        nested = [k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)]
        keys += _keys(nested[0], f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def _parser(cls: type, **options: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(cls, as_group=False)
    return parser


def _build(cls: type[T], parser: Any, parse: Callable[[], Any]) -> T:
    """What a parse gives, turning whatever goes wrong in it into a one-line ConfigError."""
    from jsonargparse import ArgumentError

    try:
        namespace = parser.instantiate(parse())
        return cls(**{name: namespace[name] for name in cls.__dataclass_fields__})  # type: ignore[attr-defined]
    except ConfigError:
        raise
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            cause = cause.__cause__ or cause.__context__
        reason = one_line(error)
        if "must be a mapping, not NoneType" in reason:
            reason = "a section is empty: give it a key, or leave it out"
        signs = ("not accept option", "is not accepted", "unrecognized arguments")
        whole = " ".join(str(error).split())  # of which `reason` has the beginning
        unknown_key = any(sign in whole for sign in signs)
        known = f"; valid keys: {', '.join(_keys(cls))}" if unknown_key else ""
        raise ConfigError(f"{reason}{known}") from error


def parse_config(cls: type[T], argv: Sequence[str], *, description: str = "", prog: str = "") -> T:
    """A config from `--config file.yaml` (a path or URI) and flags such as `--train.lr 3e-4`.

    Raises:
        ConfigError: Unknown key (the message lists the valid ones), wrong type, value out of range.
    """
    parser = _parser(cls, description=description, prog=prog or None)
    words = []
    with ExitStack() as files:
        for before, word in pairwise(["", *argv]):
            key = "--config=" if word.startswith("--config=") else ""
            file = word.removeprefix(key)
            if fetch := (key or before == "--config") and is_uri(file):
                files.enter_context(named(file))
            words.append(f"{key}{at_hand(file)}" if fetch else word)
        return _build(cls, parser, lambda: parser.parse_args(words))


def config_from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """A config from nested plain values, strictly; inverse of `config_to_dict`.

    Raises:
        ConfigError: As `parse_config`.
    """
    # some names mean something to the parser itself
    if unknown := sorted(map(str, values.keys() - cls.__dataclass_fields__.keys())):  # type: ignore[attr-defined]
        raise ConfigError(f"unknown key {unknown[0]!r}; valid keys: {', '.join(_keys(cls))}")
    parser = _parser(cls)
    return _build(cls, parser, lambda: parser.parse_object(dict(values)))


def read_config(cls: type[T], file: Path) -> T:
    """The config that a file holds.

    Raises:
        ConfigError: As `read_yaml` and `parse_config`; it names the file.
    """
    values = read_yaml(file)
    try:
        return config_from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """What a configuration's file holds.

    Raises:
        ConfigError: It cannot be read, is no YAML, or no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{file} is not readable YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no configuration")
    return found


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values (tuples become lists), for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}
