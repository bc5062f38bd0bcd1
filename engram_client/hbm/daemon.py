"""Rows out of the HBM arena that a daemon keeps on this device, and the rest from the table itself.

    hot = hot_table(client.table("deepseek-v4.1.layer1"), "cuda", budget_bytes=2 << 30)

gives a `DaemonTable` where the daemon of this machine has an arena there that this process can open, and
otherwise a cache of this process's own (`HbmTier`) in front of the same table; which of the two is said once.
Both are asked alike.

The daemon may go, or give its arena another size, at any time: every call looks at what there is now, and
without an arena everything is missing there and comes from the table.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from engram_client.arena.layout import ORDER_BITS
from engram_client.arrays import is_tensor
from engram_client.errors import BadRequest
from engram_client.gpu import as_device
from engram_client.gpu.ipc import NotShared
from engram_client.hashing import inputs
from engram_client.hbm.imported import open_mirror
from engram_client.hbm.mirror import Mirror
from engram_client.hbm.misses import Lines, Misses
from engram_client.hbm.table import HbmTable, ids_per_line
from engram_client.hbm.tier import HbmTier
from engram_client.ids import check_keys
from engram_client.spec import TableSpec
from engram_client.table import DEFAULT_TIMEOUT_S, Table
from engram_client.transport.attachment import OfferedHbm

log = logging.getLogger(__name__)


@runtime_checkable
class OffersHbm(Protocol):
    """What a transport may be able to do besides: tell of the daemon's arena in device memory."""

    def hbm_offer(self, spec: TableSpec) -> tuple[OfferedHbm, int] | None:
        """The arena with this table's records, and the number that it knows the table by."""


def hot_table(
    table: Table, device: torch.device | str = "cuda", *, budget_bytes: int
) -> DaemonTable | HbmTable:
    """See above. `budget_bytes` is what a cache of this process's own may take of the device.

    Raises BadRequest where the device cannot be used, or has not so much memory where it is needed.
    """
    try:
        return DaemonTable(table, device)
    except NotShared as reason:
        log.warning(
            "table %r: hot rows lie in a cache of this process (%s), not in one that all processes share",
            table.spec.name, reason,
        )  # fmt: skip
    return HbmTier([table], budget_bytes=budget_bytes, device=device).table(table.spec.name)


class DaemonTable:
    """A record-addressed table whose hot records are in the daemon's HBM arena. One thread, one stream.

    Keys are int64 tensors on the device. Raises NotShared where there is no such arena now.
    """

    def __init__(self, table: Table, device: torch.device | str) -> None:
        self.spec, self.device = table.spec, as_device(device)
        if table.spec.addressing != "record" or table.spec.scheme is None:
            raise NotShared("its rows are addressed singly; the daemon's arena holds whole records")
        self._table, self._transport = table, table.transport
        self._orders = ids_per_line(table.spec)
        self._mirror: Mirror | None = None
        self._serving = 0  # the nonce of the arena that was opened last: numbers come again with a new daemon
        self._said = False
        with torch.inference_mode(False):  # tensors of inference mode cannot be written outside of it
            self._counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # hits, misses
            self._owners = torch.zeros(self._orders, dtype=torch.int64, device=self.device)
        if self._current(insist=True) is None:
            raise NotShared("the daemon has no HBM arena for it, or this is not its machine")

    def hits_into(self, ids: Tensor, out: Tensor, found: Tensor | None = None) -> Misses:
        """Copy what the arena holds of keys [..., orders], and list on the device what it does not.

        As `HbmTable.hits_into`: never waits for the device; rows of missing keys become zeros in `out` uint8
        [..., H, row_bytes] and must not be used before `fill`. A graph that holds this reads memory that
        is gone once the daemon is: capture it anew after `attached` was false.
        """
        self._check(ids, out)
        keys, mirror = ids.reshape(-1), self._current()
        if mirror is None:
            out.zero_()
            missing = keys != -1
        else:
            owners = self._owners.expand(len(keys) // self._orders, self._orders).reshape(-1)
            rows = out.view(-1, self.spec.record_bytes)
            missing = mirror[0].read_into(keys, owners, mirror[1], rows)
        count = missing.sum()
        self._counts += torch.stack(((keys != -1).sum() - count, count))
        return Misses(self._listed(keys, missing, count, found), keys)

    @staticmethod
    def found_size(ids: Tensor) -> int:
        """How many int64 `hits_into` lists misses in."""
        return HbmTable.found_size(ids)

    def _listed(self, keys: Tensor, missing: Tensor, count: Tensor, found: Tensor | None) -> Tensor:
        """See `Misses.found`: the missing first, all in a shape that depends on the batch alone."""
        size = self.found_size(keys)
        if found is None:
            found = torch.zeros(size, dtype=torch.int64, device=self.device)
        elif not is_tensor(found) or tuple(found.shape) != (size,) or found.dtype != torch.int64:
            raise BadRequest(f"found must be int64 [{size}] on {self.device}")
        places = (~missing).to(torch.uint8).argsort(stable=True)
        pairs = torch.stack((places, keys.index_select(0, places)), dim=1)
        found[0] = count
        found[1 : 1 + 2 * len(keys)] = pairs.view(-1)
        return found

    def fill(self, misses: Misses, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> int:
        """Bring what `hits_into` did not find into the same `out`; how many records that were.

        Waits for the device, to learn what is missing. Raises as a look-up.
        """
        count = int(misses.count)
        if not count:
            return 0
        pairs = misses.found[1 : 1 + 2 * count].view(-1, 2).cpu().numpy()
        if pairs[:, 1].min() < 0:
            check_keys(misses.keys.view(-1, self._orders).cpu().numpy(), self.spec.name)
        lines = Lines.of(pairs, self._orders)
        rows = torch.from_numpy(np.asarray(self._table.lookup_ngrams(lines.ids, timeout=timeout)))
        records = rows.reshape(-1, self.spec.record_bytes)[torch.from_numpy(lines.source)]
        places = torch.from_numpy(lines.places).to(self.device)
        out.view(-1, self.spec.record_bytes).index_copy_(0, places, records.to(self.device))
        return count

    def lookup_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of n-gram keys [..., orders]: uint8 [..., H, row_bytes] on the device."""
        if not is_tensor(ngram_keys):
            ngram_keys = torch.from_numpy(inputs.as_int64(ngram_keys, "ngram_keys", inputs.ID_DTYPES))
        keys = ngram_keys.to(self.device).long()
        shape = (*keys.shape[:-1], self._orders * self.spec.record_rows, self.spec.row_bytes)
        out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.lookup_ngrams_into(keys, out, timeout=timeout)
        return out

    def lookup_ngrams_into(
        self, ngram_keys: Tensor, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> None:
        """As `lookup_ngrams`, into a buffer on the device; undefined content if it raises.

        Waits for the device once, to learn what is missing.
        """
        self.fill(self.hits_into(ngram_keys, out), out, timeout=timeout)

    def dequantize(self, rows: Any, *, dtype: torch.dtype | None = None, index: Any = None) -> Tensor:
        """Rows uint8 [..., row_bytes] as a tensor [..., embedding_dim], where the rows are."""
        return self._table.dequantize(rows, dtype=dtype, index=index)

    @property
    def attached(self) -> bool:
        """Whether the daemon's arena is read now."""
        return self._current() is not None

    def stats(self) -> dict[str, int]:
        """`hbm_hits` and `hbm_misses`, in records since the start; waits for the device."""
        hits, misses = self._counts.tolist()
        return {"hbm_hits": hits, "hbm_misses": misses}

    def _current(self, *, insist: bool = False) -> tuple[Mirror, int] | None:
        """What is offered now, opened; and the daemon's nonce. With `insist` it raises NotShared."""
        offer = self._transport.hbm_offer(self.spec) if isinstance(self._transport, OffersHbm) else None
        if offer is None:
            self._mirror, self._serving = None, 0
            return None
        offered, table_number = offer
        serving = offered.note.serving
        if serving != self._serving:
            self._mirror, self._serving = None, serving
            try:
                self._mirror = open_mirror(offered, self.device)
                owners = (table_number << ORDER_BITS) + torch.arange(self._orders, device=self.device)
                self._owners.copy_(owners)
            except (NotShared, RuntimeError) as error:
                if insist:
                    raise NotShared(str(error).partition("\n")[0]) from error
                self._say(error)
        return (self._mirror, serving) if self._mirror is not None else None

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            log.warning("table %r: the daemon's HBM arena is not read any more: %s", self.spec.name, error)

    def _check(self, keys: Any, out: Any) -> None:
        if not is_tensor(keys) or keys.device != self.device or keys.dtype != torch.int64:
            raise BadRequest(f"keys must be an int64 tensor on {self.device}; lookup_ngrams takes others")
        if keys.ndim == 0 or keys.shape[-1] != self._orders:
            raise BadRequest(f"keys must be [..., {self._orders}] (one an order), got {list(keys.shape)}")
        shape = (*keys.shape[:-1], self._orders * self.spec.record_rows, self.spec.row_bytes)
        if not is_tensor(out) or out.device != self.device or out.dtype != torch.uint8:
            raise BadRequest(f"out must be a uint8 tensor on {self.device}")
        if tuple(out.shape) != shape or not out.is_contiguous():
            raise BadRequest(f"out must be contiguous and {list(shape)}, got {list(out.shape)}")
