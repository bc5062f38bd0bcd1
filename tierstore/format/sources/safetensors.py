"""Reads the headers of safetensors files: where each tensor's bytes lie.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes. The JSON maps
names to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the end of the JSON;
`__metadata__` holds free text. The format demands that the tensors fill the data without a hole or an
overlap, and so do we: a file that breaks this is damaged, and its rows would be someone else's bytes.

Nothing but the header is read here, so a checkpoint of any size opens at once. Dtypes this module does
not know are kept with their names; only their sizes go unchecked.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_client.errors import FormatError, StorageError

HEADER_BYTES_MAX = 100_000_000  # the limit of the published implementation
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `shape` elements of `dtype` at bytes [offset, offset + bytes)."""

    name: str
    dtype: str  # safetensors' name, such as "F8_E4M3"
    shape: tuple[int, ...]
    path: Path
    offset: int  # from the start of the file
    bytes: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, in the file's order.

    Raises FormatError for a file that is foreign, truncated or inconsistent, StorageError for one that
    cannot be read.
    """
    try:
        file_bytes = os.stat(path).st_size
        with open(path, "rb") as file:
            header_bytes = _header_bytes(path, file.read(8), file_bytes)
            entries = _parse(path, file.read(header_bytes))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    data_start = 8 + header_bytes
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    _check_cover(path, tensors, data_start, file_bytes)
    return {t.name: t for t in tensors}


def _header_bytes(path: Path, prefix: bytes, file_bytes: int) -> int:
    """Length of the JSON header, checked against the file and the format's own limit."""
    if len(prefix) < 8:
        raise FormatError(f"{path}: {file_bytes} bytes is too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > HEADER_BYTES_MAX:
        raise FormatError(f"{path}: not a safetensors file: it begins with a header length of {length} bytes")
    if 8 + length > file_bytes:
        raise FormatError(
            f"{path}: truncated: its header ends at byte {8 + length} of {file_bytes}; copy it again"
        )
    return int(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: not a safetensors file: its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Tensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError(f"{where}: dtype must be a name, got {_short(dtype)}")
    if not _counts(shape):
        raise FormatError(f"{where}: shape must be a list of sizes, got {_short(shape)}")
    if not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(f"{where}: data_offsets must be [begin, end], got {_short(span)}")
    size = span[1] - span[0]
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != size:
        raise FormatError(
            f"{where}: {dtype} {shape} takes {math.prod(shape) * DTYPE_BYTES[dtype]} bytes, "
            f"its data_offsets span {size}"
        )
    return Tensor(name, dtype, tuple(shape), path, data_start + span[0], size)


def _counts(values: Any) -> bool:
    """Whether this is a list of integers >= 0 (JSON's true and false are none)."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_cover(path: Path, tensors: list[Tensor], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the file from `data_start` to its end, each byte once."""
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset != end:
            flaw = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise FormatError(
                f"{path}: tensor {tensor.name!r} {flaw} {before}: it starts at byte {tensor.offset}, "
                f"expected {end}; the file is damaged"
            )
        end, before = tensor.offset + tensor.bytes, f"tensor {tensor.name!r}"
    if end != file_bytes:
        flaw = "truncated" if end > file_bytes else "followed by foreign bytes"
        raise FormatError(
            f"{path}: {flaw}: its tensors end at byte {end}, the file at {file_bytes}; copy it again"
        )
