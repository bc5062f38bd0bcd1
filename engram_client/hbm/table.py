"""One table behind the HBM tier: hits are copied on the device, the rest comes from the table itself.

A look-up takes every record that the tier holds, asks the table once for each of the others, puts them
where they belong and offers them to the tier. It waits for the device once, to learn what is missing;
`hits_into` does not wait at all and answers with what is missing, on the device.

Rows are those of the generation that the table had when it was opened, as with the table itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.arrays import is_tensor
from engram_client.errors import BadRequest
from engram_client.hashing import inputs
from engram_client.hbm.arena import HbmArena
from engram_client.ids import check_keys, check_row_ids
from engram_client.prefetch import Handle
from engram_client.spec import TableSpec
from engram_client.table import DEFAULT_TIMEOUT_S, Table

_PINNED_AT_ONCE = 1 << 12  # lines of ids
_BULK_BYTES = 1 << 28  # of records read at once, at most; the more, the closer together the pages they need


def ids_per_line(spec: TableSpec) -> int:
    """How many ids name the records of one position: one an order, or one row id."""
    return spec.scheme.orders if spec.scheme is not None and spec.addressing == "record" else 1


@dataclass(frozen=True)
class _Missing:
    """What a look-up did not find: where it belongs, and how to ask for each of it once."""

    at: Tensor  # int64 [m] places in the flat output, on the device
    lines: np.ndarray  # int64 [l, columns], -1 where a column has fewer
    source: np.ndarray  # int64 [m], which id of the flat lines each place wants


def distinct_lines(ids: np.ndarray, columns: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines int64 [l, width] that hold each id once, in its column, and each id's place in them.

    ids and columns int64 [m]; columns are 0..width-1. Unfilled places are -1.
    """
    source = np.empty(len(ids), np.int64)
    found = []
    for column in range(width):
        here = np.flatnonzero(columns == column)
        distinct, inverse = np.unique(ids[here], return_inverse=True)
        source[here] = inverse.reshape(-1) * width + column
        found.append(distinct)
    lines = np.full((max(map(len, found)), width), -1, np.int64)
    for column, distinct in enumerate(found):
        lines[: len(distinct), column] = distinct
    return lines, source


class HbmTable:
    """A table whose hot records are in device memory; made by `HbmTier.table`. Not thread-safe.

    Ids are int64 or int32, torch tensors on any device or numpy arrays; rows come back on the tier's device.
    Record-addressed tables are asked by n-gram keys, row-addressed ones by row ids. -1 means "no row
    here" and is answered with zeros. `timeout` is in seconds. Every call may raise what the table's do.
    """

    def __init__(self, table: Table, arena: HbmArena, first_owner: int) -> None:
        self.spec = table.spec
        self.device = arena.device
        self._table, self._arena = table, arena
        self._width = ids_per_line(table.spec)
        with torch.inference_mode(False):
            owners = torch.arange(first_owner, first_owner + self._width, device=arena.device)
            self._owners = owners.short()

    def lookup_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of n-gram keys [..., orders]: uint8 [..., H, row_bytes], H = orders * heads."""
        return self._read(self._keys(ngram_keys), None, timeout)

    def lookup_ngrams_into(
        self, ngram_keys: Any, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> None:
        """As `lookup_ngrams`, into a uint8 buffer on the device; undefined content if it raises."""
        self._read(self._keys(ngram_keys), out, timeout)

    def lookup(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of row ids [...] of a row-addressed table: uint8 [..., row_bytes]."""
        return self._read(self._rows(row_ids), None, timeout)

    def lookup_into(self, row_ids: Any, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """As `lookup`, into a uint8 buffer on the device; undefined content if it raises."""
        self._read(self._rows(row_ids), out, timeout)

    def hits_into(self, ids: Tensor, out: Tensor) -> Tensor:
        """Copy only what the tier holds; which ids are missing, bool of their shape, on the device.

        Never waits for the device, so a CUDA graph may hold it. Ids int64 on the device; rows of
        missing ids become zeros and must not be used: look again, or with `lookup_ngrams`. An id that
        names nothing at all (below -1) is missing, too.
        """
        if not is_tensor(ids) or ids.device != self.device or ids.dtype != torch.int64:
            raise BadRequest(f"hits_into takes int64 tensors on {self.device}; lookup_ngrams takes others")
        ids = self._line(ids, "ids")
        missing = self._copy_hits(ids, self._buffer(ids, out))
        return missing.reshape(ids.shape if self.spec.addressing == "record" else ids.shape[:-1])

    def prefetch_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> HbmHandle:
        """Copy the hits now and start to read the rest; the handle's `wait` returns the rows of both."""
        ids = self._keys(ngram_keys)
        out = self._buffer(ids, None)
        missing = self._missing(ids, out)
        handle = None if missing is None else self._table.prefetch_ngrams(missing.lines, timeout=timeout)
        return HbmHandle(self, out, missing, handle)

    def pin(self, ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Read the records of these n-gram keys or row ids into the tier and never replace them.

        `stats()["hbm_pinned"]` tells how many are: a set of 16 that is full of pinned records takes no more.
        """
        lines = self._keys(ids) if self.spec.addressing == "record" else self._rows(ids)
        line_bytes = self._width * self.spec.record_bytes
        at_once = max(_PINNED_AT_ONCE, min(_BULK_BYTES, self._arena.budget_bytes // 4) // line_bytes)
        for part in lines.reshape(-1, self._width).split(at_once):
            host = part.cpu().numpy()
            self._check(host)
            if (records := self._in_bulk(host, timeout)) is not None:
                self._admit(host, records, pinned=True)
                continue
            for few in np.split(host, range(_PINNED_AT_ONCE, len(host), _PINNED_AT_ONCE)):
                self._admit(few, self._fetch(few, timeout), pinned=True)

    def dequantize(self, rows: Any, *, dtype: torch.dtype | None = None, index: Any = None) -> Tensor:
        """Rows uint8 [..., row_bytes] as a tensor [..., embedding_dim], where the rows are."""
        return self._table.dequantize(rows, dtype=dtype, index=index)

    def take_in(self, out: Tensor, missing: _Missing, rows: Tensor) -> None:
        """Put rows of `missing.lines` where they belong in `out`, and offer them to the tier."""
        records = rows.to(self.device, non_blocking=True).reshape(-1, self.spec.record_bytes)
        source = torch.from_numpy(missing.source).to(self.device)
        out.view(-1, self.spec.record_bytes).index_copy_(0, missing.at, records.index_select(0, source))
        self._admit(missing.lines, records, pinned=False)

    def _read(self, ids: Tensor, out: Tensor | None, timeout: float | None) -> Tensor:
        out = self._buffer(ids, out)
        missing = self._missing(ids, out)
        if missing is not None:
            self.take_in(out, missing, self._fetch(missing.lines, timeout))
        return out

    def _missing(self, ids: Tensor, out: Tensor) -> _Missing | None:
        """Copy the hits; what else there is to fetch. Waits for the device."""
        at = self._copy_hits(ids, out).nonzero().squeeze(1)
        if not len(at):
            return None
        wanted = ids.reshape(-1).index_select(0, at).cpu().numpy()
        if wanted.min() < -1 or wanted.max() >= self._ids_end():
            self._check(ids.cpu().numpy())
        lines, source = distinct_lines(wanted, (at % self._width).cpu().numpy(), self._width)
        return _Missing(at, lines, source)

    def _copy_hits(self, ids: Tensor, out: Tensor) -> Tensor:
        """What is missing, bool [n]."""
        return self._arena.lookup_into(
            ids.reshape(-1), self._owners_of(ids), out.view(-1, self.spec.record_bytes)
        )

    def _fetch(self, lines: np.ndarray, timeout: float | None) -> Tensor:
        """Rows of lines of ids from the table, in host memory that a GPU can copy from while others work."""
        shape = (len(lines), self._width * self.spec.record_rows, self.spec.row_bytes)
        pinned = self.device.type == "cuda"
        rows = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        if self.spec.addressing == "record":
            self._table.lookup_ngrams_into(lines, rows.numpy(), timeout=timeout)
        else:
            self._table.lookup_into(lines[:, 0], rows[:, 0].numpy(), timeout=timeout)
        return rows

    def _in_bulk(self, lines: np.ndarray, timeout: float | None) -> Tensor | None:
        """Records of lines of ids on the device, by one sorted sweep over the disk.

        None where the table cannot, or where the device has no memory for so many at once.
        """
        if not self._table.fills_devices:
            return None
        entries = lines.reshape(-1)
        there = np.flatnonzero(entries >= 0)
        orders = there % self._width if self.spec.addressing == "record" else np.zeros_like(there)
        try:
            records = torch.empty(
                (entries.size, self.spec.record_bytes), dtype=torch.uint8, device=self.device
            )
            found = records if there.size == entries.size else torch.empty_like(records[: there.size])
        except torch.OutOfMemoryError:
            return None
        self._table.fill_device(entries[there], orders, found, timeout=timeout)
        if found is not records:  # of a negative id nothing is admitted, whatever lies there
            records.index_copy_(0, torch.from_numpy(there).to(self.device), found)
        return records

    def _admit(self, lines: np.ndarray, rows: Tensor, *, pinned: bool) -> None:
        ids = torch.from_numpy(lines).to(self.device)
        records = rows.to(self.device, non_blocking=True).reshape(-1, self.spec.record_bytes)
        self._arena.admit(ids.reshape(-1), self._owners_of(ids), records, pinned=pinned)

    def _owners_of(self, ids: Tensor) -> Tensor:
        return self._owners.expand(ids.numel() // self._width, self._width).reshape(-1)

    def _ids_end(self) -> float:
        return math.inf if self.spec.addressing == "record" else self.spec.rows

    def _check(self, ids: np.ndarray) -> None:
        if self.spec.addressing == "record":
            check_keys(ids, self.spec.name)
        else:
            check_row_ids(ids[..., 0], self.spec.rows, self.spec.name)

    def _keys(self, ngram_keys: Any) -> Tensor:
        if self.spec.addressing != "record":
            raise BadRequest(f"table {self.spec.name!r} is addressed by rows; look its row ids up")
        return self._line(ngram_keys, "ngram_keys")

    def _rows(self, row_ids: Any) -> Tensor:
        if self.spec.addressing == "record":
            raise BadRequest(
                f"table {self.spec.name!r} is addressed by n-gram keys, and the tier holds whole records of "
                "them; look single rows up with the table itself"
            )
        return self._line(row_ids, "row_ids")

    def _line(self, values: Any, what: str) -> Tensor:
        """Ids as int64 [..., columns] on the device; row ids get an axis of one."""
        if is_tensor(values):
            if values.dtype not in (torch.int64, torch.int32):
                raise BadRequest(f"{what} must be int64 or int32, got {values.dtype}")
            ids = values.detach().to(self.device).long()
        else:
            ids = torch.from_numpy(inputs.as_int64(values, what, inputs.ID_DTYPES)).to(self.device)
        if self.spec.addressing != "record":
            return ids.unsqueeze(-1)
        if ids.ndim == 0 or ids.shape[-1] != self._width:
            raise BadRequest(
                f"{what} must be [..., {self._width}] (one key per order), got {list(ids.shape)}"
            )
        return ids

    def _buffer(self, ids: Tensor, out: Tensor | None) -> Tensor:
        """`out`, checked, or memory of its own, for the rows of ids [..., columns]."""
        rows = self._width * self.spec.record_rows
        middle = (rows,) if self.spec.addressing == "record" else ()
        shape = (*ids.shape[:-1], *middle, self.spec.row_bytes)
        if out is None:
            with torch.inference_mode(False):  # a handle may fill it elsewhere than where it was started
                return torch.empty(shape, dtype=torch.uint8, device=self.device)
        if not is_tensor(out) or out.device != self.device or out.dtype != torch.uint8:
            raise BadRequest(f"out must be a uint8 tensor on {self.device}")
        if tuple(out.shape) != shape or not out.is_contiguous():
            raise BadRequest(f"out must be contiguous and {list(shape)}, got {list(out.shape)}")
        return out


class HbmHandle:
    """Rows of which some are on the device already and others on their way. Not thread-safe."""

    def __init__(self, table: HbmTable, out: Tensor, missing: _Missing | None, handle: Handle | None) -> None:
        self._table, self._out, self._missing, self._handle = table, out, missing, handle

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._handle is None or self._handle.done()

    def wait(self, timeout: float | None = None) -> Tensor:
        """Rows uint8 [..., H, row_bytes] on the device; may be called again.

        Raises DeadlineExceeded where they are late, and what the look-up raised.
        """
        if self._handle is not None and self._missing is not None:
            rows = np.asarray(self._handle.wait(timeout=timeout))
            self._table.take_in(self._out, self._missing, torch.from_numpy(rows))
            self._handle = None
        return self._out

    def cancel(self) -> None:
        """Give up what is on its way, if anything is; `wait` then raises Cancelled."""
        if self._handle is not None:
            self._handle.cancel()
