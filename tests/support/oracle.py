"""What a look-up must answer, found without the product: rows from safetensors, row ids from config.json.

Rows are read with the safetensors library, primes are found by trial division, keys are reduced
with Python's own numbers. Nothing here is imported from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


@dataclass(frozen=True)
class Oracle:
    """One table: its rows, uint8 [n, row_bytes], and [orders][heads] of (head size, first row)."""

    rows: np.ndarray
    heads: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def orders(self) -> int:
        return len(self.heads)

    @property
    def row_bytes(self) -> int:
        return int(self.rows.shape[1])

    def lookup(self, row_ids: Any) -> np.ndarray:
        """uint8 [..., row_bytes]; zeros for -1."""
        ids = np.asarray(row_ids)
        found = self.rows[np.maximum(ids, 0)]
        found[ids == -1] = 0
        return found

    def row_ids(self, keys: Any) -> np.ndarray:
        """int64 [..., H] of keys [..., orders]; -1 stays -1."""
        flat = np.asarray(keys).reshape(-1, self.orders).tolist()
        ids = [
            [-1 if key < 0 else key % size + first for key, heads in zip(record, self.heads, strict=True)
             for size, first in heads]
            for record in flat
        ]  # fmt: skip
        return np.array(ids, np.int64).reshape(*np.shape(keys)[:-1], self.orders * len(self.heads[0]))

    def lookup_ngrams(self, keys: Any, heads: slice = slice(None)) -> np.ndarray:
        """uint8 [..., H, row_bytes]."""
        ids = self.row_ids(keys)
        by_order = ids.reshape(*ids.shape[:-1], self.orders, len(self.heads[0]))[..., heads]
        return self.lookup(by_order.reshape(*ids.shape[:-1], self.orders * by_order.shape[-1]))


def tensor_bytes(folder: Path, name: str) -> np.ndarray:
    """Tensor `name` of the checkpoint as uint8 [rows, bytes of a row]."""
    import torch

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                return tensor.reshape(tensor.shape[0], -1).view(torch.uint8).numpy()
    raise KeyError(name)


def v41_oracle(folder: Path, layer: int) -> Oracle:
    """A DeepSeek-V4.1 table: weights and scales of a row side by side."""
    prefix = f"layers.{layer}.engram.embed."
    rows = np.concatenate([tensor_bytes(folder, prefix + n) for n in ("weight", "scale")], axis=1)
    config = json.loads((folder / "config.json").read_text())
    sizes = engram_primes(
        len(config["engram_layer_ids"]),
        [config["engram_vocab_size"]] * (config["engram_max_ngram_size"] - 1),
        config["engram_n_heads"],
    )[config["engram_layer_ids"].index(layer)]
    return Oracle(rows, with_offsets(sizes))


def demo_oracle(folder: Path, layer: int) -> Oracle:
    """A table of the published demo."""
    rows = tensor_bytes(folder, f"layers.{layer}.engram.multi_head_embedding.embedding.weight")
    config = json.loads((folder / "config.json").read_text())
    sizes = engram_primes(len(config["layer_ids"]), config["engram_vocab_size"], config["n_head_per_ngram"])
    return Oracle(rows, with_offsets(sizes[config["layer_ids"].index(layer)]))


def ple_oracle(folder: Path, layer: int) -> Oracle:
    """A PLE table: its shards one after another, its hash as the checkpoint's own buffers say."""
    prefix = f"model.language_model.layers.{layer}.ple.ple_embedding."
    rows = [tensor_bytes(folder, f"{prefix}ngram_embedding.shard_{i}.weight") for i in range(128)]
    buffers = [
        tensor_bytes(folder, prefix + name).view(np.int64).reshape(2, 8).tolist()
        for name in ("ngram_heads_vocab_sizes", "ngram_heads_offsets")
    ]
    heads = tuple(tuple(zip(*order, strict=True)) for order in zip(*buffers, strict=True))
    return Oracle(np.concatenate(rows), heads)


def engram_primes(layers: int, starts: Sequence[int], heads: int) -> list[list[list[int]]]:
    """[layer][order][head]: rising primes from each start on, each used once in the whole model."""
    seen: set[int] = set()
    sizes = []
    for _ in range(layers):
        layer = []
        for start in starts:
            free = (n for n in count(start) if n not in seen and is_prime(n))
            layer.append([next(free) for _ in range(heads)])
            seen.update(layer[-1])
        sizes.append(layer)
    return sizes


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def with_offsets(sizes: list[list[int]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    flat = [size for order in sizes for size in order]
    firsts = iter(np.cumsum([0, *flat]).tolist())
    return tuple(tuple((size, next(firsts)) for size in order) for order in sizes)
