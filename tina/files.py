"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tina.errors import DataError, TinaError


def hash_file(file: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_bytes(content: bytes) -> str:
    """sha256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_suffix(file: Path, suffix: str) -> None:
    """Make sure that a file is called what it will be.

    Raises:
        DataError: It is not.
    """
    if file.suffix != suffix:
        raise DataError(f"{file} must end in {suffix}")


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, then rename it.

    Raises:
        OSError: It cannot; where the error names a temporary file, it is raised with `file`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # threads, and processes of equal number on other machines, may write the same file
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody has asked for
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file of bytes."""
    write_whole(file, lambda temporary: temporary.write_bytes(content))


def write_text(file: Path, text: str) -> None:
    """Write a text file."""
    write_whole(file, lambda temporary: temporary.write_text(text))


def read_table(file: Path, error: type[TinaError]) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TinaError: The caller's kind: the file is not readable JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as reason:
        raise error(f"{file} is not readable JSON: {reason}") from reason
    if not isinstance(found, dict):
        raise error(f"{file} is not a table")
    return found
