"""A client's tables with an HBM tier before them: `connect(..., hbm_budget_bytes=, device=)`.

A table stays what it is, and what is asked with arrays of the host is answered as ever. Ids that are
tensors on the tier's device are looked up in the tier. Tables of one record size share a tier; where there
are several sizes, each gets the part of the budget that its tables are of all bytes. Tables that come later
join; so do generations, each under numbers of its own.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from engram_client.arrays import is_tensor
from engram_client.errors import BadRequest
from engram_client.gpu.probe import as_device
from engram_client.hbm.table import HbmTable
from engram_client.hbm.tier import HbmTier
from engram_client.prefetch import Prefetcher
from engram_client.spec import TableSpec
from engram_client.table import DEFAULT_TIMEOUT_S, Table
from engram_client.transport.base import Transport

if TYPE_CHECKING:
    import torch

    from engram_client.client import Client

log = logging.getLogger(__name__)


class HotTables:
    """The tiers of one client, made as its tables are opened. Thread safe. Raises BadRequest for no "
    "such device."""

    def __init__(self, budget_bytes: int, device: torch.device | str) -> None:
        self.budget_bytes = budget_bytes
        self.device = as_device(device, "the HBM tier's device")
        self._tiers: dict[int, HbmTier] = {}  # by bytes of a record
        self._parts: dict[int, float] = {}  # of the budget
        self._tables: dict[tuple[str, str], HbmTable | None] = {}  # by name and generation
        self._changing = threading.Lock()

    def table(self, spec: TableSpec, transport: Transport, prefetcher: Prefetcher, client: Client) -> Table:
        """The table, hot; as it is where its part of the budget is too small for a set of its records."""
        name = spec.name, spec.generation
        with self._changing:
            if name not in self._tables:
                self._tables[name] = self._added(Table(spec, transport, prefetcher), client)
            hot = self._tables[name]
        if hot is None:
            return Table(spec, transport, prefetcher, client)
        return HotTable(spec, transport, prefetcher, client, hot)

    def _added(self, table: Table, client: Client) -> HbmTable | None:
        size = table.spec.record_bytes
        try:
            if size in self._tiers:
                return self._tiers[size].add(table)
            self._parts[size] = self._part_of(size, client)
            budget_bytes = int(self.budget_bytes * self._parts[size])
            self._tiers[size] = HbmTier([table], budget_bytes=budget_bytes, device=self.device)
        except BadRequest as error:
            log.warning("no records of table %r are kept on %s: %s", table.spec.name, self.device, error)
            return None
        return self._tiers[size].table(table.spec.name)

    def _part_of(self, record_bytes: int, client: Client) -> float:
        specs = client.tables().values()
        whole = sum(spec.rows * spec.row_bytes for spec in specs)
        mine = sum(spec.rows * spec.row_bytes for spec in specs if spec.record_bytes == record_bytes)
        return mine / whole

    def resize(self, budget_bytes: int, *, graphs_are_gone: bool = False) -> None:
        """See `Client.resize_hbm_tier`; each tier in turn."""
        with self._changing:
            for size, tier in self._tiers.items():
                tier.resize(int(budget_bytes * self._parts[size]), graphs_are_gone=graphs_are_gone)
            self.budget_bytes = budget_bytes

    def stats(self) -> dict[str, int]:
        """Those of all tiers, added."""
        with self._changing:
            found = [tier.stats() for tier in self._tiers.values()]
        return {name: sum(stats[name] for stats in found) for name in (found[0] if found else {})}


class HotTable(Table):
    """A table whose hot records are on a device: see `Table`; `hot` is the way to them alone."""

    def __init__(
        self, spec: TableSpec, transport: Transport, prefetcher: Prefetcher, client: object, hot: HbmTable
    ) -> None:
        super().__init__(spec, transport, prefetcher, client)
        self.hot = hot

    def _is_hot(self, ids: Any, heads: slice | None, addressing: str) -> bool:
        there = is_tensor(ids) and ids.device == self.hot.device
        return there and heads is None and self.spec.addressing == addressing

    def lookup_ngrams(
        self, ngram_keys: Any, *, heads: slice | None = None, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Any:
        """As `Table.lookup_ngrams`; keys on the tier's device are answered there, from it."""
        if self._is_hot(ngram_keys, heads, "record"):
            return self.hot.lookup_ngrams(ngram_keys, timeout=timeout)
        return super().lookup_ngrams(ngram_keys, heads=heads, timeout=timeout)

    def lookup_ngrams_into(
        self,
        ngram_keys: Any,
        out: Any,
        *,
        heads: slice | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """As `Table.lookup_ngrams_into`; keys and a buffer on the tier's device are served there."""
        if self._is_hot(ngram_keys, heads, "record") and is_tensor(out) and out.device == self.hot.device:
            self.hot.lookup_ngrams_into(ngram_keys, out, timeout=timeout)
        else:
            super().lookup_ngrams_into(ngram_keys, out, heads=heads, timeout=timeout)

    def lookup(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Any:
        """As `Table.lookup`; ids on the tier's device are answered there where rows are the records."""
        if self._is_hot(row_ids, None, "row"):
            return self.hot.lookup(row_ids, timeout=timeout)
        return super().lookup(row_ids, timeout=timeout)

    def lookup_into(self, row_ids: Any, out: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> None:
        """As `Table.lookup_into`, likewise."""
        if self._is_hot(row_ids, None, "row") and is_tensor(out) and out.device == self.hot.device:
            self.hot.lookup_into(row_ids, out, timeout=timeout)
        else:
            super().lookup_into(row_ids, out, timeout=timeout)

    def prefetch_ngrams(
        self, ngram_keys: Any, *, heads: slice | None = None, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Any:
        """As `Table.prefetch_ngrams`; of keys on the tier's device hits are copied at once."""
        if self._is_hot(ngram_keys, heads, "record"):
            return self.hot.prefetch_ngrams(ngram_keys, timeout=timeout)
        return super().prefetch_ngrams(ngram_keys, heads=heads, timeout=timeout)

    def prefetch(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Any:
        """As `Table.prefetch`, likewise."""
        if self._is_hot(row_ids, None, "row"):
            return self.hot.prefetch(row_ids, timeout=timeout)
        return super().prefetch(row_ids, timeout=timeout)
