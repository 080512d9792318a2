"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def hash_file(file: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_bytes(content: bytes) -> str:
    """sha256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file."""
    write_whole(file, lambda temporary: temporary.write_text(text))


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; tensors are made contiguous and moved to the CPU."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, lambda temporary: save_file(plain, temporary, metadata))
