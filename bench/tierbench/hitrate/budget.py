"""One set of budgets under a whole trace: the product's tiers, look-up by look-up, and what they read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.hitrate.lookups import Lookups
from tierbench.hitrate.model import Model
from tierbench.hitrate.tiers import Budgets
from tierbench.policy.hbm import HbmReplay
from tierbench.policy.lookups import PARTS, TALLIES, count_extent_pages, pass_on, tally
from tierbench.policy.pages import FIELDS, count_pages, list_reads
from tierbench.policy.product import FOUND, HELD, KEPT, READ, REPEATED, Replay, room_for
from tierstore.format.geometry import PAGE_BYTES

PERCENTILES = (50, 90, 99, 99.9)
NUMBERS_MAX = 2**32 - 1  # of look-ups, over all budgets
TENTHS = 10
TIERS = {"hbm": HELD, "dram": FOUND, "extent": KEPT}


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
    """The product with one set of budgets. `number` tells it from the others of the same disk."""

    def __init__(self, model: Model, budgets: Budgets, tokens: int, disk: Disk, number: int) -> None:
        self.budgets = budgets
        self._model, self._disk, self._number = model, disk, number
        accesses = tokens * model.entries_per_token
        self.capacity_records = budgets.capacity_records(model)
        sets, width = budgets.hbm_sets(model), 1 if model.by_rows else model.orders
        self._hbm = HbmReplay(sets, width, accesses) if sets else None
        extent = budgets.extent_geometry(model)
        dram = room_for(budgets.dram_records(model), accesses)
        self._replay = Replay(dram, extent) if dram or extent else None
        self._kinds = np.zeros((model.entries_per_token, TALLIES), np.int64)
        self._parts = np.zeros((PARTS, TALLIES), np.int64)
        self._missed = np.zeros(tokens, np.min_scalar_type(model.entries_per_token))
        self._pages = np.zeros(tokens, np.uint16)
        self._replay_s = self._all_s = 0.0

    def take(self, lookups: Lookups) -> None:
        """Replay consecutive look-ups."""
        before = time.perf_counter()
        outcome, pages, source = self._answered(lookups)
        self._replay_s += time.perf_counter() - before
        layers, columns = len(self._model.tables), self._model.columns
        where = (lookups.ends, lookups.first_tokens, layers, columns, lookups.first_token)
        tally(outcome, *where, self._missed.size, self._kinds, self._parts, self._missed)
        self._count_pages(lookups, outcome, where)
        if pages.size:
            at = (lookups.ends, lookups.first_tokens, columns, lookups.first_token)
            count_extent_pages(pages, source, *at, self._pages)
        self._all_s += time.perf_counter() - before

    def _answered(self, lookups: Lookups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What became of each entry uint8 [n], pages of the extent by request, and each entry's request."""
        outcome = np.full(lookups.keys.size, READ, np.uint8)
        keys, owners, ends = lookups.keys, lookups.owners, lookups.ends
        source = np.arange(keys.size)
        if self._hbm:
            keys, owners, ends, source = self._hbm.look_up(keys, owners, ends, outcome)
        answered = np.full(keys.size, READ, np.uint8) if self._hbm else outcome
        pages = np.zeros(0, np.uint8)
        if self._replay:
            pages = self._replay.look_up(keys, owners, ends, answered)
        if self._hbm:
            pass_on(source, answered, outcome)
        return outcome, pages, source

    def _count_pages(self, lookups: Lookups, outcome: np.ndarray, where: tuple[Any, ...]) -> None:
        model, disk = self._model, self._disk
        reads = np.empty((np.count_nonzero(outcome == READ), FIELDS), np.int64)
        list_reads(outcome, *where, self._number * disk.lookups_total + lookups.first_lookup, reads)
        rows, pages = count_pages(
            lookups.keys, reads, model.columns, *model.rows_of(), disk.firsts, disk.rows_per_page,
            disk.pages_per_row, disk.read_last, disk.rows_seen, self._pages,
        )  # fmt: skip
        disk.distinct_rows += rows
        disk.distinct_pages += pages

    def by_token(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries that memory did not hold, and pages read, for each token looked up, in their order."""
        return self._missed, self._pages

    def told(self) -> dict[str, Any]:
        """The figures; rates are shares of accesses, one for each token, table and order (or row)."""
        model, counts = self._model, self._kinds.sum(axis=0)
        accesses = int(counts.sum())
        pages = _spread(self._pages)
        orders, tables = self._by_order(), self._by_table()
        tiers = {name: float(counts[code] / accesses) for name, code in TIERS.items()}
        return {
            **self.budgets.told(model),
            "capacity_records": self.capacity_records,
            "hit_rate": _rate(counts),
            "hit_rate_by_tier": tiers | {"nvme": 1 - sum(tiers.values())},
            "hit_rate_by_order": {name: _rate(c) for name, c in orders.items()},
            "hit_rate_by_table": {name: _rate(c) for name, c in tables.items()},
            "hit_rate_by_tenth": [_rate(t) for t in self._parts.reshape(TENTHS, -1, TALLIES).sum(axis=1)],
            "tiers": {
                name: _tier(code, counts, orders, tables) for name, code in TIERS.items()
                if name == "dram" or self.budgets.bytes_of(name)
            },
            "warm_up": self._warm_up(),
            "records_read_per_access": float(counts[READ]) / accesses,
            "missed_and_brought_for_another": float(counts[REPEATED]) / accesses,
            "missed_records_per_token": _spread(self._missed),
            "page_reads_per_token": pages,
            "disk_bytes_per_token": pages["mean"] * PAGE_BYTES,
            "simulation": self._speed(accesses),
        }  # fmt: skip

    def _by_order(self) -> dict[str, np.ndarray]:
        """Entries by outcome, int64 [TALLIES], for each n-gram length."""
        model = self._model
        kinds = self._kinds.reshape(len(model.tables), model.orders, -1, TALLIES).sum(axis=(0, 2))
        return {str(order + 2): kinds[order] for order in range(model.orders)}

    def _by_table(self) -> dict[str, np.ndarray]:
        tables = self._model.tables
        kinds = self._kinds.reshape(len(tables), -1, TALLIES).sum(axis=1)
        return {table.name: kinds[i] for i, table in enumerate(tables)}

    def _warm_up(self) -> dict[str, Any]:
        """Rates of consecutive parts of the trace, each of the tokens since the one before."""
        parts, tokens = self._parts, self._missed.size
        chosen = np.flatnonzero(parts.sum(axis=1))  # a short trace has fewer parts
        totals = parts[chosen].sum(axis=1)
        rates = {name: (parts[chosen, code] / totals).tolist() for name, code in TIERS.items()}
        ends = -(-(chosen + 1) * tokens // PARTS)
        return {
            "tokens_until": ends.tolist(),
            "hit_rate": [_rate(part) for part in parts[chosen]],
            "hit_rate_by_tier": rates,
        }

    def _speed(self, accesses: int) -> dict[str, float]:
        """What replaying took: the policy and the index alone, and with the pages that it reads."""
        per_s, with_pages_per_s = (accesses / max(1e-9, took) for took in (self._replay_s, self._all_s))
        rows = self._model.rows_per_entry
        return {
            "records_per_s": per_s,
            "rows_per_s": per_s * rows,
            "records_with_pages_per_s": with_pages_per_s,
            "rows_with_pages_per_s": with_pages_per_s * rows,
        }


def _tier(
    code: int, counts: np.ndarray, orders: dict[str, np.ndarray], tables: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What one tier answers, as shares of all accesses, and of those that reached it."""
    before = {HELD: (), FOUND: (HELD,), KEPT: (HELD, FOUND)}[code]
    reached = counts.sum() - sum(counts[other] for other in before)
    return {
        "hit_rate": _share(code, counts),
        "hit_rate_of_what_reached_it": float(counts[code] / max(1, reached)),
        "hit_rate_by_order": {name: _share(code, c) for name, c in orders.items()},
        "hit_rate_by_table": {name: _share(code, c) for name, c in tables.items()},
    }


def _share(code: int, counts: np.ndarray) -> float:
    return float(counts[code] / max(1, counts.sum()))


def _rate(counts: np.ndarray) -> float:
    """What memory answers."""
    return float((counts[FOUND] + counts[HELD]) / max(1, counts.sum()))


def _spread(counts: np.ndarray) -> dict[str, float]:
    """Mean, maximum and percentiles of small whole numbers, of which there may be very many."""
    many = np.bincount(counts)
    below = np.cumsum(many) / counts.size
    found = {f"p{p:g}": float(np.searchsorted(below, p / 100)) for p in PERCENTILES}
    mean = float(many @ np.arange(many.size) / counts.size)
    return {"mean": mean, "max": float(many.size - 1), **found}
