"""Ties hashing, a table and a module together: start before the layer, wait inside it.

    lookup = EngramLookup(mapping, client.table("engram-1"), layer_id=1)
    layer = EngramLayer(engram, lookup)
    pending = layer.start(token_ids)              # while the model runs the layers before
    hidden = hidden + layer(hidden, pending)      # waits for the rows only here

or all layers of a step at once, with `StepPrefetcher`:

    layers = {1: EngramLayer(engram_1), 14: EngramLayer(engram_14)}
    step = steps.start(token_ids, lookback=lookback)
    hidden = hidden + layers[1](hidden, StepRows(step, 1))

Everything is duck-typed: whatever hashes, looks up and dequantizes as the protocols say will do.
At dead positions no rows are fetched: their keys become -1, and the gate is 0 there.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engram_client.arrays import to_device, to_host
from engram_client.errors import BadRequest
from engram_client.modules.resident import MultiHeadEmbedding
from engram_client.step import Step


class Hashing(Protocol):
    """What `NgramHashMapping` offers: ids [B,T] to int64 keys [B,T,orders] or row ids [B,T,H].

    Arrays, or tensors on a device (`NgramHashMapping.on_device`).
    """

    def ngram_keys(self, token_ids: Any, layer_id: int, dead: Any = None, *, lookback: Any = None) -> Any: ...

    def row_ids(self, token_ids: Any, layer_id: int, dead: Any = None, *, lookback: Any = None) -> Any: ...


class RowHandle(Protocol):
    """A started look-up; `wait` gives rows uint8 [..., H, row_bytes]."""

    def wait(self, timeout: float | None = None) -> Any: ...


class RowTable(Protocol):
    """What a client's table offers of itself here."""

    def prefetch_ngrams(self, ngram_keys: Any) -> RowHandle: ...

    def prefetch(self, row_ids: Any) -> RowHandle: ...

    def dequantize(self, rows: Any) -> Tensor: ...


class Pending(Protocol):
    """Embeddings on their way; `dead` is what `start` was given."""

    dead: Any

    def wait(self, *, timeout: float | None = None, device: torch.device | None = None) -> Tensor: ...


class EmbeddingSource(Protocol):
    """Where a layer's embeddings come from."""

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Any = None) -> Pending: ...


class EngramLookup:
    """Embeddings of one layer from a served table. `by="rows"` is for row-addressed tables."""

    def __init__(
        self,
        mapping: Hashing,
        table: RowTable,
        layer_id: int,
        *,
        by: Literal["ngrams", "rows"] = "ngrams",
    ) -> None:
        self.mapping, self.table, self.layer_id, self.by = mapping, table, layer_id, by

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Any = None) -> PendingRows:
        """Hash token ids [B,T] and begin to fetch their rows; returns at once.

        `dead` is bool [B,T]; `lookback` is the decode state of the hashing, which the caller advances.
        """
        by_key = self.by == "ngrams"
        hash_ids = self.mapping.ngram_keys if by_key else self.mapping.row_ids
        names = hash_ids(token_ids, self.layer_id, dead, lookback=lookback)
        if dead is not None:
            names = _without(names, dead)
        handle = self.table.prefetch_ngrams(names) if by_key else self.table.prefetch(names)
        return PendingRows(self.table, handle, dead)


def _without(names: Any, dead: Any) -> Any:
    """Keys or row ids of -1 at dead positions, where the others are."""
    if isinstance(names, Tensor):
        return names.masked_fill(torch.as_tensor(dead, device=names.device).unsqueeze(-1), -1)
    return np.where(np.asarray(to_host(dead))[..., None], np.int64(-1), names)


class PendingRows:
    """Rows on their way from a service."""

    def __init__(self, table: RowTable, handle: RowHandle, dead: Any) -> None:
        self.table, self.handle, self.dead = table, handle, dead

    def wait(self, *, timeout: float | None = None, device: torch.device | None = None) -> Tensor:
        """Embeddings [B,T,H,dim] on `device` (None: where the rows are); what travels is bytes."""
        rows = _on(device, self.handle.wait(timeout=timeout))
        return self.table.dequantize(rows)


def _on(device: torch.device | None, rows: Any) -> Any:
    """Rows where they are wanted: through pinned memory, without the host waiting for the copy."""
    if device is None or device.type == "cpu":
        return rows
    if isinstance(rows, Tensor) and rows.device.type != "cpu":
        return rows.to(device)
    return to_device(np.asarray(rows), device)


class StepRows:
    """The rows of one layer of a step on their way; `dead` is what the step was started with."""

    def __init__(self, step: Step, layer_id: int) -> None:
        self.step, self.layer_id = step, layer_id

    @property
    def dead(self) -> Any:
        return self.step.dead

    def wait(self, *, timeout: float | None = None, device: torch.device | None = None) -> Tensor:
        """Embeddings [B,T,H,dim] on `device` (None: CPU); rows that are equal travel and wait once."""
        rows, index = self.step.wait_distinct(self.layer_id, timeout=timeout)
        embeddings = self.step.table(self.layer_id).dequantize(_on(device, rows), index=index)
        return embeddings.reshape(*self.step.shape, *embeddings.shape[1:])


class ResidentLookup:
    """Embeddings of one layer from a module's own table: a small model without a service."""

    def __init__(self, mapping: Hashing, embedding: MultiHeadEmbedding, layer_id: int) -> None:
        self.mapping, self.embedding, self.layer_id = mapping, embedding, layer_id

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Any = None) -> PendingResident:
        """Hash token ids [B,T]; the rows are here already."""
        row_ids = self.mapping.row_ids(token_ids, self.layer_id, dead, lookback=lookback)
        return PendingResident(self.embedding, torch.as_tensor(row_ids), dead)


class PendingResident:
    """Row ids whose embeddings are in memory."""

    def __init__(self, embedding: MultiHeadEmbedding, row_ids: Tensor, dead: Any) -> None:
        self.embedding, self.row_ids, self.dead = embedding, row_ids, dead

    def wait(self, *, timeout: float | None = None, device: torch.device | None = None) -> Tensor:
        """Embeddings [B,T,H,dim], differentiable, on `device` (None: where the table is)."""
        embeddings = self.embedding.lookup(self.row_ids.to(self.embedding.embedding.weight.device))
        return embeddings if device is None else embeddings.to(device)


class EngramLayer(nn.Module):
    """An Engram, V4.1 or PLE module with the source of its embeddings; none where a step has them."""

    def __init__(self, engram: nn.Module, source: EmbeddingSource | None = None) -> None:
        super().__init__()
        self.engram = engram
        self.source = source

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Any = None) -> Pending:
        """Begin to fetch what these tokens need; hand the result to `forward`."""
        if self.source is None:
            raise BadRequest("this layer has no source of its own: hand StepRows(step, layer_id) to forward")
        return self.source.start(token_ids, dead, lookback=lookback)

    def forward(
        self, hidden_states: Tensor, pending: Pending, *, timeout: float | None = None, **options: Any
    ) -> Tensor:
        """Wait for the rows, at most `timeout` seconds, and run the module; `options` are its own."""
        embeddings = pending.wait(timeout=timeout, device=hidden_states.device)
        if pending.dead is not None:
            options["dead"] = torch.as_tensor(pending.dead)
        return self.engram(hidden_states, embeddings, **options)
