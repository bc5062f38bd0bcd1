"""One DRAM budget under a whole trace: the product's arena, look-up by look-up, and what it reads."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.arena.layout import ArenaGeometry
from engram_client.errors import BadRequest
from tierbench.hitrate.lookups import Lookups
from tierbench.hitrate.model import Model
from tierbench.policy.lookups import TALLIES, TENTHS, tally
from tierbench.policy.pages import FIELDS, count_pages, list_reads
from tierbench.policy.product import FOUND, READ, REPEATED, Replay, room_for
from tierstore.config.units import format_bytes
from tierstore.format.geometry import PAGE_BYTES

PERCENTILES = (50, 90, 99, 99.9)
NUMBERS_MAX = 2**32 - 1  # of look-ups, over all budgets


@dataclass(frozen=True)
class Asked:
    """A budget as it was asked for: in bytes, or as a share of the tables."""

    size_bytes: int | None = None
    share: float | None = None

    def bytes_of(self, model: Model) -> int:
        """Raises BadRequest where it is more than nothing but less than the cache's smallest."""
        found = self.size_bytes if self.size_bytes is not None else int((self.share or 0) * model.table_bytes)
        if found:
            smallest = ArenaGeometry(1, model.record_bytes).total_bytes
            if found < smallest:
                raise BadRequest(
                    f"--dram {format_bytes(found)}: a cache of records of {model.record_bytes} bytes "
                    f"takes at least {smallest} bytes; give more, or 0 for none"
                )
        return found


class Disk:
    """What is known of every page and row while budgets are replayed; they share it, as all of them see the
    same records. 4 bytes a page and a bit a row: 0.3 GB for DeepSeek-V4.1."""

    def __init__(self, model: Model, lookups_total: int, budgets: int) -> None:
        if lookups_total * budgets > NUMBERS_MAX:
            raise BadRequest(
                f"{lookups_total} look-ups with {budgets} budgets are more than {NUMBERS_MAX}; "
                "give fewer budgets, larger steps or less text"
            )
        geometries = [model.geometry(table) for table in model.tables]
        self.rows_per_page = geometries[0].rows_per_page or 1
        self.pages_per_row = geometries[0].pages_per_row
        places = [-(-table.rows // self.rows_per_page) for table in model.tables]
        rows = [table.rows for table in model.tables]
        self.firsts = np.stack([np.cumsum(places) - places, np.cumsum(rows) - rows], axis=1).astype(np.int64)
        self.read_last = np.zeros(sum(places), np.uint32)
        self.rows_seen = np.zeros(sum(rows) // 8 + 1, np.uint8)
        self.lookups_total = lookups_total
        self.distinct_rows = self.distinct_pages = 0


class BudgetRun:
    """The product with one budget. `number` tells it from the other budgets of the same disk."""

    def __init__(self, model: Model, budget_bytes: int, tokens: int, disk: Disk, number: int) -> None:
        self.budget_bytes = budget_bytes
        self.capacity_records = model.capacity_records(budget_bytes)
        self._model, self._disk, self._number = model, disk, number
        accesses = tokens * model.entries_per_token
        self._replay = Replay(room_for(self.capacity_records, accesses)) if budget_bytes else None
        self._kinds = np.zeros((model.entries_per_token, TALLIES), np.int64)
        self._tenths = np.zeros((TENTHS, TALLIES), np.int64)
        self._missed = np.zeros(tokens, np.uint8)
        self._pages = np.zeros(tokens, np.uint16)
        self._replay_s = self._all_s = 0.0

    def take(self, lookups: Lookups) -> None:
        """Replay consecutive look-ups."""
        before = time.perf_counter()
        outcome = np.full(lookups.keys.size, READ, np.uint8)
        if self._replay:
            self._replay.look_up(lookups.keys, lookups.owners, lookups.ends, outcome)
        self._replay_s += time.perf_counter() - before
        layers, orders = len(self._model.tables), self._model.orders
        where = (lookups.ends, lookups.first_tokens, layers, orders, lookups.first_token)
        tally(outcome, *where, self._missed.size, self._kinds, self._tenths, self._missed)
        self._count_pages(lookups, outcome, where)
        self._all_s += time.perf_counter() - before

    def _count_pages(self, lookups: Lookups, outcome: np.ndarray, where: tuple[Any, ...]) -> None:
        model, disk = self._model, self._disk
        reads = np.empty((np.count_nonzero(outcome == READ), FIELDS), np.int64)
        list_reads(outcome, *where, self._number * disk.lookups_total + lookups.first_lookup, reads)
        rows, pages = count_pages(
            lookups.keys, reads, model.orders, model.head_sizes, model.head_offsets, disk.firsts,
            disk.rows_per_page, disk.pages_per_row, disk.read_last, disk.rows_seen, self._pages,
        )  # fmt: skip
        disk.distinct_rows += rows
        disk.distinct_pages += pages

    def told(self) -> dict[str, Any]:
        """The figures; rates are shares of accesses, one for each token, layer and order."""
        model, counts = self._model, self._kinds.sum(axis=0)
        accesses = int(counts.sum())
        by_layer = self._kinds.reshape(len(model.tables), model.orders, TALLIES)
        pages = _spread(self._pages)
        return {
            "dram_bytes": self.budget_bytes,
            "share_of_tables": self.budget_bytes / model.table_bytes,
            "capacity_records": self.capacity_records,
            "hit_rate": _rate(counts),
            "hit_rate_by_tier": {"dram": _rate(counts), "nvme": 1 - _rate(counts)},
            "hit_rate_by_order": {str(o + 2): _rate(by_layer[:, o].sum(axis=0)) for o in range(model.orders)},
            "hit_rate_by_table": {
                table.name: _rate(by_layer[i].sum(axis=0)) for i, table in enumerate(model.tables)
            },
            "hit_rate_by_tenth": [_rate(tenth) for tenth in self._tenths],
            "records_read_per_access": float(counts[READ]) / accesses,
            "missed_and_brought_for_another": float(counts[REPEATED]) / accesses,
            "missed_records_per_token": _spread(self._missed),
            "page_reads_per_token": pages,
            "disk_bytes_per_token": pages["mean"] * PAGE_BYTES,
            "simulation": self._speed(accesses),
        }

    def _speed(self, accesses: int) -> dict[str, float]:
        """What replaying took: the policy and the index alone, and with the pages that it reads."""
        per_s, with_pages_per_s = (accesses / max(1e-9, took) for took in (self._replay_s, self._all_s))
        heads = self._model.heads
        return {
            "records_per_s": per_s,
            "rows_per_s": per_s * heads,
            "records_with_pages_per_s": with_pages_per_s,
            "rows_with_pages_per_s": with_pages_per_s * heads,
        }


def _rate(counts: np.ndarray) -> float:
    return float(counts[FOUND] / max(1, counts.sum()))


def _spread(counts: np.ndarray) -> dict[str, float]:
    """Mean, maximum and percentiles of small whole numbers, of which there may be very many."""
    many = np.bincount(counts)
    below = np.cumsum(many) / counts.size
    found = {f"p{p:g}": float(np.searchsorted(below, p / 100)) for p in PERCENTILES}
    mean = float(many @ np.arange(many.size) / counts.size)
    return {"mean": mean, "max": float(many.size - 1), **found}
