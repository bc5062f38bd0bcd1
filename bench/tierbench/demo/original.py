"""Rows as the checkpoint has them: the judge of every row the service returns.

It shares no code with the packer or the service: the header is read here, in ten lines, and rows
are gathered from a memory map of the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


class OriginalRows:
    """One layer's table in a DeepSeek-V4.1 checkpoint, weights and scales apart as published."""

    def __init__(self, checkpoint: Path, layer: int) -> None:
        prefix = f"layers.{layer}.engram.embed."
        self._weights = _tensor(checkpoint, prefix + "weight")
        self._scales = _tensor(checkpoint, prefix + "scale")

    @property
    def rows(self) -> int:
        return len(self._weights)

    @property
    def row_bytes(self) -> int:
        return self._weights.shape[1] + self._scales.shape[1]

    def read(self, part: slice) -> np.ndarray:
        """Consecutive rows, uint8 [n, row_bytes]."""
        return np.concatenate([self._weights[part], self._scales[part]], axis=1)

    def count_wrong(self, rows: np.ndarray, row_ids: np.ndarray) -> int:
        """How many of `rows` uint8 [n, heads, 264] are not the checkpoint's rows `row_ids` [n, heads]."""
        width = self._weights.shape[1]
        wrong = (rows[..., :width] != self._weights[row_ids]).any(axis=-1)
        wrong |= (rows[..., width:] != self._scales[row_ids]).any(axis=-1)
        return int(wrong.sum())


def _tensor(checkpoint: Path, name: str) -> np.ndarray:
    """A one-byte tensor as uint8, mapped from the shard that holds it."""
    shard = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][name]
    with open(checkpoint / shard, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
    start = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(checkpoint / shard, np.uint8, "r", start, tuple(entry["shape"]))
