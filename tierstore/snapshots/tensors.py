"""Writes a safetensors file whose tensors come in pieces, in any order, without holding them.

Sizes are known before the first byte is, so room for the whole file is set aside at the start: a disk that is
too small says so then. Tensors of wide elements come first, which aligns them all.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tierstore.format.sources.checkpoint import FIELD_DTYPES
from tierstore.format.sources.safetensors import DTYPE_BYTES

DTYPES = {ours: theirs for theirs, ours in FIELD_DTYPES.items()} | {"int64": "I64"}
ALIGN_BYTES = 8
DROP_BYTES = 64 << 20  # written pages are let go of from time to time, they would push out others'


@dataclass(frozen=True)
class NewTensor:
    """`dtype` is one of ours."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[DTYPES[self.dtype]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


class TensorFile:
    """A safetensors file that is being written. Methods raise OSError."""

    def __init__(self, path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        ordered = sorted(tensors, key=lambda t: -t.element_bytes)
        starts: dict[str, int] = {}
        for tensor in ordered:
            span = [at, at + tensor.bytes]
            header[tensor.name] = {
                "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span,
            }  # fmt: skip
            starts[tensor.name], at = at, at + tensor.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGN_BYTES)
        self._head = len(text).to_bytes(8, "little") + text
        self.bytes = len(self._head) + at
        self._starts = {name: len(self._head) + start for name, start in starts.items()}
        self._since_drop = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def begin(self) -> None:
        """Set room aside and write the header."""
        try:
            os.posix_fallocate(self._fd, 0, self.bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.ftruncate(self._fd, self.bytes)
        self._write(np.frombuffer(self._head, np.uint8), 0)

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """`data`, C-contiguous, at byte `offset` of a tensor."""
        self._write(data.reshape(-1).view(np.uint8), self._starts[name] + offset)
        self._since_drop += data.nbytes
        if self._since_drop >= DROP_BYTES:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._since_drop = 0

    def _write(self, data: np.ndarray, offset: int) -> None:
        view, done = data.data, 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def finish(self) -> None:
        """All of it is on the disk when this returns."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
