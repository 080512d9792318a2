"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tina.errors import TinaError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""What safetensors calls them."""


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


def pack_tensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file's content; equal tensors and metadata give equal bytes.

    The library's own `save` writes metadata in random order, and takes ten times as long to look
    for tensors that share memory.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    parts, end = [], 0
    # in the library's order: the widest first, which aligns all
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(tensor.flatten().view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file."""
    content = pack_tensors(tensors, metadata)
    write_whole(file, lambda temporary: temporary.write_bytes(content))
