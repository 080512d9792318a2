"""Tensors as safetensors files, byte for byte the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tina.files import write_bytes

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""What safetensors calls them."""


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
    write_bytes(file, pack_tensors(tensors, metadata))
