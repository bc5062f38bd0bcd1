"""One table behind the HBM tier: hits are copied on the device, the rest comes from the table itself.

A look-up launches one kernel, which takes every record that the tier holds, then waits for the device to
learn what is missing, asks the table once for each of that (`misses.py`), and offers it to the tier.
`hits_into` does not wait at all and lists on the device what is missing; `fill` serves such a list.

Rows are those of the generation that the table had when it was opened, as with the table itself.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.arrays import is_tensor
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest
from engram_client.gpu.probe import out_of_memory
from engram_client.gpu.streams import Event, record_current
from engram_client.hashing import inputs
from engram_client.hashing.device import HASHING, DeviceHashMapping, DeviceLookback
from engram_client.hbm.handle import HbmHandle
from engram_client.hbm.memory import HbmMemory
from engram_client.hbm.misses import Fill, Lines, Misses
from engram_client.hbm.operations import DECODED_TYPE, Decoding, Keys, decoding_of
from engram_client.ids import check_keys, check_row_ids
from engram_client.spec import TableSpec
from engram_client.table import DEFAULT_TIMEOUT_S, Table

_PINNED_AT_ONCE = 1 << 12  # lines of ids
_BULK_BYTES = 1 << 28  # of records read at once, at most


def ids_per_line(spec: TableSpec) -> int:
    """How many ids name the records of one position: one an order, or one row id."""
    return spec.scheme.orders if spec.scheme is not None and spec.addressing == "record" else 1


class HbmTable:
    """A table whose hot records are in device memory; made by `HbmTier.table`. Thread safe, on any stream.

    Ids are int64 or int32, torch tensors on any device or numpy arrays; rows come back on the tier's
    device, in the order of the current stream. Record-addressed tables are asked by n-gram keys,
    row-addressed ones by row ids. -1 means "no row here" and is answered with zeros. `timeout` is in
    seconds. Every call may raise what the table's do; none raises for want of device memory as long as its
    own result fits.
    """

    def __init__(self, table: Table, memory: HbmMemory, first_owner: int) -> None:
        self.spec = table.spec
        self.device = memory.device
        self._table, self._memory, self._first_owner = table, memory, first_owner
        self._width = ids_per_line(table.spec)
        self._decoding = decoding_of(table.spec.layout, table.spec.record_rows)

    def lookup_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of n-gram keys [..., orders]: uint8 [..., H, row_bytes], H = orders * heads."""
        return self._read(self._keys(ngram_keys), None, timeout)

    def lookup_ngrams_into(
        self, ngram_keys: Any, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> None:
        """As `lookup_ngrams`, into a uint8 buffer on the device; undefined content if it raises."""
        self._read(self._keys(ngram_keys), out, timeout)

    def lookup_values(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """What the rows of n-gram keys stand for: bfloat16 [..., H, embedding_dim].

        Rows of FP8 E4M3, with E8M0 scales or none, are decoded as they are copied, without another pass.
        """
        keys = self._keys(ngram_keys)
        if self._decoding is None:
            return self._table.dequantize(self._read(keys, None, timeout), dtype=DECODED_TYPE)
        return self._read(keys, None, timeout, decoding=self._decoding)

    def lookup_tokens(
        self,
        hashing: DeviceHashMapping,
        token_ids: Tensor,
        dead: Tensor | None = None,
        *,
        lookback: DeviceLookback | None = None,
        values: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> Tensor:
        """Rows of token ids [B,T]: uint8 [B,T,H,row_bytes], or with `values` as `lookup_values` gives them.

        Hashes, finds and copies in one kernel. `hashing` is the table's on the tier's device. Dead
        positions get zeros. An id outside the vocabulary raises IdOutOfRange, with the position of its
        n-gram's key.
        """
        asked, shape = self._hashed(hashing, token_ids, dead, lookback)
        decoding = self._decoding if values else None
        out = self._buffer(shape, None, decoding)
        self._memory.attempt(lambda: self._read_keys(asked, shape, out, decoding, timeout))
        if values and decoding is None:
            return self._table.dequantize(out, dtype=DECODED_TYPE)
        return out

    def lookup(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of row ids [...] of a row-addressed table: uint8 [..., row_bytes]."""
        return self._read(self._rows(row_ids), None, timeout)

    def lookup_into(self, row_ids: Any, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """As `lookup`, into a uint8 buffer on the device; undefined content if it raises."""
        self._read(self._rows(row_ids), out, timeout)

    def hits_into(self, ids: Tensor, out: Tensor, found: Tensor | None = None) -> Misses:
        """Copy only what the tier holds, and list on the device what it does not.

        Never waits for the device, so a CUDA graph may hold it: ids int64, contiguous, on the device;
        `found` int64 of `found_size(ids)` keeps the list at an address of the caller's. Rows of missing ids
        become zeros and must not be used before `fill` has put them there. An id that names nothing at all
        (below -1) is missing, too.
        """
        if not is_tensor(ids) or ids.device != self.device or ids.dtype != torch.int64:
            raise BadRequest(f"hits_into takes int64 tensors on {self.device}; lookup_ngrams takes others")
        ids = self._line(ids, "ids")
        if not ids.is_contiguous():
            raise BadRequest(f"hits_into takes contiguous ids, got strides {list(ids.stride())}")
        return self._hits(self._asked(ids), self._buffer(ids.shape, out, None), None, found)

    @staticmethod
    def found_size(ids: Tensor) -> int:
        """How many int64 `hits_into` lists misses in."""
        return 3 + 2 * ids.numel()

    def fill(self, misses: Misses, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> int:
        """Bring what `hits_into` did not find into the same `out`; how many records that were.

        Waits for the device, to learn what is missing, and only for that. Raises as a look-up.
        """
        deadline = Deadline.after(timeout)
        pairs = self._memory.misses.listed(misses, timeout)
        if len(pairs):
            shape = self._shape_of(misses.keys)
            flat = self._flat(self._buffer(shape, out.view(self._out_shape(shape)), None), None)
            self._serve(pairs, misses.keys.view(shape), flat, None, deadline)
        return len(pairs)

    def prefetch_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> HbmHandle:
        """Copy the hits now and start to read the rest; the handle's `wait` returns the rows of both."""
        return self._started(self._keys(ngram_keys), timeout)

    def prefetch(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> HbmHandle:
        """As `prefetch_ngrams`, for row ids of a row-addressed table."""
        return self._started(self._rows(row_ids), timeout)

    def pin(self, ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Read the records of these n-gram keys or row ids into the tier and never replace them.

        `stats()["hbm_pinned"]` tells how many are: a set of 16 that is full of pinned records takes no more.
        """
        lines = self._keys(ids) if self.spec.addressing == "record" else self._rows(ids)
        host, deadline = lines.reshape(-1, self._width).cpu().numpy(), Deadline.after(timeout)
        self._check(host)
        at_once = _PINNED_AT_ONCE
        if self._table.fills_devices:  # the more at once, the closer together the pages they need
            budget_bytes = min(_BULK_BYTES, self._memory.arena.budget_bytes // 4)
            at_once = max(at_once, budget_bytes // (self._width * self.spec.record_bytes))
        for start in range(0, len(host), at_once):
            part = host[start : start + at_once]
            self._memory.attempt(partial(self._pin, part, deadline))

    def _pin(self, lines: np.ndarray, deadline: Deadline) -> None:
        server, owner = self._memory.misses, self._first_owner
        records = self._in_bulk(lines, deadline) if self._table.fills_devices else None
        if records is None:
            server.pin(lines, self._from_table(lines, deadline), owner, deadline)
        else:
            server.pin_records(lines, records, owner)

    def _in_bulk(self, lines: np.ndarray, deadline: Deadline) -> Tensor | None:
        """Records of lines of ids on the device, by one sorted sweep over the disk.

        None where the device has no memory for so many at once.
        """
        entries = lines.reshape(-1)
        there = np.flatnonzero(entries >= 0)
        orders = there % self._width if self.spec.addressing == "record" else np.zeros_like(there)
        try:
            with torch.inference_mode(False):
                shape = (entries.size, self.spec.record_bytes)
                records = torch.empty(shape, dtype=torch.uint8, device=self.device)
                found = records if there.size == entries.size else torch.empty_like(records[: there.size])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        self._table.fill_device(entries[there], orders, found, timeout=deadline.remaining_s())
        if found is not records:  # of a negative id nothing is admitted, whatever lies there
            records.index_copy_(0, torch.from_numpy(there).to(self.device), found)
        return records

    def dequantize(self, rows: Any, *, dtype: torch.dtype | None = None, index: Any = None) -> Tensor:
        """Rows uint8 [..., row_bytes] as a tensor [..., embedding_dim], where the rows are."""
        return self._table.dequantize(rows, dtype=dtype, index=index)

    def _read(
        self, ids: Tensor, out: Tensor | None, timeout: float | None, decoding: Decoding | None = None
    ) -> Tensor:
        def read() -> Tensor:
            there = self._buffer(ids.shape, out, decoding)
            self._read_keys(self._asked(ids), ids.shape, there, decoding, timeout)
            return there

        return self._memory.attempt(read)

    def _read_keys(
        self, asked: Keys, shape: torch.Size, out: Tensor, decoding: Decoding | None, timeout: float | None
    ) -> None:
        deadline = Deadline.after(timeout)
        misses = self._hits(asked, out, decoding)
        pairs = self._memory.misses.listed(misses, deadline.remaining_s())
        if len(pairs):
            self._serve(pairs, asked.keys.view(shape), self._flat(out, decoding), decoding, deadline)

    def _serve(
        self,
        pairs: np.ndarray,
        ids: Tensor,
        flat: Tensor,
        decoding: Decoding | None,
        deadline: Deadline,
    ) -> None:
        lines = self._lines(pairs, ids)
        fill, ready = self._from_table(lines.ids, deadline), record_current(self.device)
        self._memory.misses.serve(lines, fill, flat, self._first_owner, decoding, ready, deadline)

    def finish(
        self, lines: Lines, rows: np.ndarray, out: Tensor, ready: Event, timeout: float | None
    ) -> None:
        """Put rows of `lines` that were read elsewhere where they belong in `out`, and offer them "
        "to the tier."""
        records = rows.reshape(*lines.ids.shape, self.spec.record_bytes)

        def fill(part: slice, there: np.ndarray) -> None:
            there[:] = records[part]

        deadline = Deadline.after(timeout)
        flat = self._flat(out, None)
        self._memory.attempt(
            lambda: self._memory.misses.serve(lines, fill, flat, self._first_owner, None, ready, deadline)
        )

    def _started(self, ids: Tensor, timeout: float | None) -> HbmHandle:
        def start() -> tuple[Tensor, np.ndarray, Event]:
            out = self._buffer(ids.shape, None, None)
            misses = self._hits(self._asked(ids), out, None)
            return out, self._memory.misses.listed(misses, timeout), record_current(self.device)

        out, pairs, ready = self._memory.attempt(start)
        if not len(pairs):
            return HbmHandle(self, out, ready, None, None)
        lines = self._lines(pairs, ids)
        if self.spec.addressing == "record":
            handle = self._table.prefetch_ngrams(lines.ids, timeout=timeout)
        else:
            handle = self._table.prefetch(lines.ids[:, 0], timeout=timeout)
        return HbmHandle(self, out, ready, lines, handle)

    def _hits(
        self, asked: Keys, out: Tensor, decoding: Decoding | None, found: Tensor | None = None
    ) -> Misses:
        size = self.found_size(asked.keys)
        if found is None:
            with torch.inference_mode(False):
                found = torch.empty(size, dtype=torch.int64, device=self.device)
        elif found.dtype != torch.int64 or tuple(found.shape) != (size,) or found.device != self.device:
            raise BadRequest(
                f"found must be int64 [{size}] on {self.device}, got {found.dtype} {list(found.shape)} on "
                f"{found.device}"
            )
        self._memory.arena.lookup_into(asked, self._flat(out, decoding), found, decoding)
        return Misses(found, asked.keys)

    def _lines(self, pairs: np.ndarray, ids: Tensor) -> Lines:
        """Raises IdOutOfRange where one of them names nothing; `ids` are all that were asked for."""
        wanted = pairs[:, 1]
        if wanted.min() < -1 or wanted.max() >= self._ids_end():
            self._check(ids.cpu().numpy())
        return Lines.of(pairs, self._width)

    def _from_table(self, lines: np.ndarray, deadline: Deadline) -> Fill:
        def fill(part: slice, rows: np.ndarray) -> None:
            ids, left_s = lines[part], deadline.remaining_s()
            if self.spec.addressing == "record":
                shape = (len(ids), self._width * self.spec.record_rows, self.spec.row_bytes)
                self._table.lookup_ngrams_into(ids, rows.reshape(shape), timeout=left_s)
            else:
                self._table.lookup_into(ids[:, 0], rows[:, 0], timeout=left_s)

        return fill

    def _asked(self, ids: Tensor) -> Keys:
        return Keys(ids.reshape(-1), self._first_owner, self._width)

    def _hashed(
        self,
        hashing: DeviceHashMapping,
        token_ids: Tensor,
        dead: Tensor | None,
        lookback: DeviceLookback | None,
    ) -> tuple[Keys, torch.Size]:
        """What to ask for, and the shape of its ids."""
        scheme = self.spec.scheme
        if scheme is None or self.spec.addressing != "record":
            raise BadRequest(
                f"table {self.spec.name!r} is addressed by rows: hash to row ids, and look those up"
            )
        if hashing.device != self.device:
            raise BadRequest(f"the hash mapping is on {hashing.device}, the tier on {self.device}")
        if hashing.multipliers(scheme.layer_id) != tuple(map(int, scheme.multipliers)):
            raise BadRequest(
                f"the hash mapping is not that of table {self.spec.name!r}; make it with the table's "
                f"mapping()"
            )
        given = hashing.inputs(token_ids, scheme.layer_id, dead, lookback=lookback)
        shape = torch.Size((*token_ids.shape, self._width))
        if self._memory.arena.in_order or not HASHING.serves(self.device):
            keys = hashing.hash_plainly(given)
            if given.dead is not None:
                keys = keys.masked_fill(given.dead.unsqueeze(-1), -1)
            return Keys(keys.reshape(-1), self._first_owner, self._width), shape
        with torch.inference_mode(False):
            keys = torch.empty(math.prod(shape), dtype=torch.int64, device=self.device)
        return Keys(keys, self._first_owner, self._width, given), shape

    def _flat(self, out: Tensor, decoding: Decoding | None) -> Tensor:
        """`out` record by record, as the arena takes it."""
        if decoding is None:
            return out.view(-1, self.spec.record_bytes)
        return out.view(-1, self.spec.record_rows, self.spec.layout.embedding_dim)

    def _shape_of(self, keys: Tensor) -> torch.Size:
        return torch.Size((len(keys) // self._width, self._width))

    def _out_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Of rows of ids [..., columns]."""
        middle = (self._width * self.spec.record_rows,) if self.spec.addressing == "record" else ()
        return (*shape[:-1], *middle, self.spec.row_bytes)

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

    def _buffer(self, ids: torch.Size, out: Tensor | None, decoding: Decoding | None) -> Tensor:
        """`out`, checked, or memory of its own, for the rows of ids of this shape [..., columns]."""
        shape = self._out_shape(ids)
        if decoding is not None:
            shape = (*shape[:-1], self.spec.layout.embedding_dim)
        if out is None:
            dtype = torch.uint8 if decoding is None else DECODED_TYPE
            with torch.inference_mode(False):  # a handle may fill it elsewhere than where it was started
                return torch.empty(shape, dtype=dtype, device=self.device)
        if not is_tensor(out) or out.device != self.device or out.dtype != torch.uint8:
            raise BadRequest(f"out must be a uint8 tensor on {self.device}")
        if tuple(out.shape) != shape or not out.is_contiguous():
            raise BadRequest(f"out must be contiguous and {list(shape)}, got {list(out.shape)}")
        return out
