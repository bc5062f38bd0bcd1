"""Where a model's rows come from: tensors in memory, the service asked ahead, the service asked in the layer.

All three hash alike and dequantize alike. Each tells how long a layer stood still for its rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engram_client import Lookback, NgramHashMapping, StepPrefetcher, Table
from engram_client.dequantize import dequantize
from engram_client.spec import RowLayout


class Source(Protocol):
    """Rows of step after step, for one batch of sequences at a time."""

    waited_s: dict[int, list[float]]  # by layer, one number a step

    def begin(self, batch: int) -> None:
        """Fresh sequences."""

    def start(self, tokens: np.ndarray) -> None:
        """The tokens [B, T] of a step are known; steps are used up in the order in which they start."""

    def rows(self, layer: int) -> Tensor:
        """Embeddings [B, T, H, dim] of the first step that is not over."""

    def end_step(self) -> None:
        """The first step that is not over is."""


class _Hashed:
    """What sources share that find a step's ids themselves: by layer, for each step not over."""

    def __init__(self, mapping: NgramHashMapping, layers: tuple[int, ...]) -> None:
        self.mapping, self.layers = mapping, layers
        self.waited_s: dict[int, list[float]] = {layer: [] for layer in layers}
        self._ids: deque[dict[int, np.ndarray]] = deque()
        self._lookback: Lookback

    def begin(self, batch: int) -> None:
        self._lookback = self.mapping.lookback(batch)

    def start(self, tokens: np.ndarray) -> None:
        self._ids.append({layer: self._hash(tokens, layer) for layer in self.layers})
        self._lookback.advance(tokens)

    def end_step(self) -> None:
        self._ids.popleft()

    def _hash(self, tokens: np.ndarray, layer: int) -> np.ndarray:
        return self.mapping.ngram_keys(tokens, layer, lookback=self._lookback)


class Resident(_Hashed):
    """Tables wholly in memory, uint8 [rows, row_bytes] by layer: `torch.index_select` in its best dtype."""

    def __init__(
        self, mapping: NgramHashMapping, tables: Mapping[int, np.ndarray], layout: RowLayout
    ) -> None:
        super().__init__(mapping, tuple(tables))
        self._layout = layout
        view = np.int64 if layout.row_bytes % 8 == 0 else np.uint8
        self._tables = {layer: torch.from_numpy(table.view(view)) for layer, table in tables.items()}

    def _hash(self, tokens: np.ndarray, layer: int) -> np.ndarray:
        return self.mapping.row_ids(tokens, layer, lookback=self._lookback)

    def rows(self, layer: int) -> Tensor:
        row_ids = self._ids[0][layer]
        before = time.perf_counter()
        found = torch.index_select(self._tables[layer], 0, torch.from_numpy(row_ids.reshape(-1)))
        self.waited_s[layer].append(time.perf_counter() - before)
        return dequantize(self._layout, found.view(torch.uint8).view(*row_ids.shape, self._layout.row_bytes))


class InTheLayer(_Hashed):
    """The service, asked when the layer needs the rows."""

    def __init__(self, mapping: NgramHashMapping, tables: Mapping[int, Table]) -> None:
        super().__init__(mapping, tuple(tables))
        self._tables = tables

    def rows(self, layer: int) -> Tensor:
        before = time.perf_counter()
        found = self._tables[layer].lookup_ngrams(self._ids[0][layer])
        self.waited_s[layer].append(time.perf_counter() - before)
        return self._tables[layer].dequantize(found)


class Prefetched:
    """The service, asked for all layers as soon as a step's tokens are known."""

    def __init__(self, steps: StepPrefetcher) -> None:
        self._prefetcher = steps
        self.waited_s: dict[int, list[float]] = {layer: [] for layer in steps.layer_ids}
        self._steps: deque = deque()
        self._lookback: Lookback

    def begin(self, batch: int) -> None:
        self._lookback = self._prefetcher.lookback(batch)

    def start(self, tokens: np.ndarray) -> None:
        self._steps.append(self._prefetcher.start(tokens, lookback=self._lookback))
        self._lookback.advance(tokens)

    def rows(self, layer: int) -> Tensor:
        step = self._steps[0]
        before = time.perf_counter()
        found, index = step.wait_distinct(layer)
        self.waited_s[layer].append(time.perf_counter() - before)
        embeddings = step.table(layer).dequantize(found, index=index)
        return embeddings.view(*step.shape, *embeddings.shape[1:])

    def end_step(self) -> None:
        self._steps.popleft().close()
