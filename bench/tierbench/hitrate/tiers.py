"""Budgets of the tiers, as they are asked for and as a model's records fit into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engram_client.arena.layout import ArenaGeometry
from engram_client.errors import BadRequest
from tierbench.hitrate.model import Model
from tierbench.hitrate.shown import size
from tierbench.policy.hbm import INDEX_BYTES_PER_SET, WAYS, sets_within, smallest_bytes
from tierbench.policy.product import ROOM, room_for
from tierstore.config.memory_limit import memory_limit
from tierstore.config.units import format_bytes
from tierstore.format.geometry import PAGE_BYTES
from tierstore.tiers.extent import FOR_INDICES
from tierstore.tiers.extent_group import group_for
from tierstore.tiers.extent_layout import FIRST_PAGE, ExtentGeometry

EXTENT_SET_BYTES = 64  # of its index


@dataclass(frozen=True)
class Asked:
    """A budget as it was asked for: in bytes, or as a share of the tables."""

    size_bytes: int | None = None
    share: float | None = None

    def bytes_of(self, model: Model) -> int:
        return self.size_bytes if self.size_bytes is not None else int((self.share or 0) * model.table_bytes)


@dataclass(frozen=True)
class Budgets:
    """Bytes of each tier, 0 for none. `extent_pages` instead of a budget where its file is known."""

    hbm_bytes: int = 0
    dram_bytes: int = 0
    extent_bytes: int = 0
    extent_pages: int | None = None

    def bytes_of(self, tier: str) -> int:
        """Of "hbm", "dram" or "extent"."""
        return int(getattr(self, f"{tier}_bytes"))

    def check(self, model: Model) -> None:
        """Raises BadRequest where one is more than nothing but less than its tier's smallest."""
        record = model.record_bytes
        for tier, smallest in (
            ("hbm", smallest_bytes(record)),
            ("dram", ArenaGeometry(1, record).total_bytes),
        ):
            if 0 < self.bytes_of(tier) < smallest:
                raise BadRequest(
                    f"--{tier} {format_bytes(self.bytes_of(tier))}: a cache of records of {record} bytes "
                    f"takes at least {smallest} bytes; give more, or 0 for none"
                )
        if self.extent_bytes and not extent_pays(model):
            raise BadRequest(
                "--extent: a record of these tables lies on no fewer pages whole than its rows do, so the "
                "service keeps no extent for them; leave it out"
            )
        if self.extent_bytes and self.extent_geometry(model) is None:
            raise BadRequest(
                f"--extent {format_bytes(self.extent_bytes)}: holds no record of {record} bytes; give at "
                f"least {format_bytes(2 * ExtentGeometry(record, 0).group_bytes)}, or 0 for none"
            )

    def hbm_sets(self, model: Model) -> int:
        return max(0, sets_within(self.hbm_bytes, model.record_bytes)) if self.hbm_bytes else 0

    def dram_records(self, model: Model) -> int:
        return model.capacity_records(self.dram_bytes)

    def extent_geometry(self, model: Model) -> ExtentGeometry | None:
        """As the service lays its file out: a part of the budget is for the index on disk."""
        if self.extent_pages is not None:
            return ExtentGeometry(model.record_bytes, self.extent_pages) if self.extent_pages > 0 else None
        found = self.extent_bytes
        return ExtentGeometry.within(found - found // FOR_INDICES, model.record_bytes) if found else None

    def capacity_records(self, model: Model) -> int:
        """Of both memories."""
        return WAYS * self.hbm_sets(model) + self.dram_records(model)

    def replay_bytes(self, model: Model, tokens: int) -> int:
        """Memory that replaying them may take: what tells records apart, not the records."""
        accesses = tokens * model.entries_per_token
        records = room_for(self.dram_records(model), accesses)
        sets = min(self.hbm_sets(model), max(1, ROOM * accesses // WAYS))
        extent = self.extent_geometry(model)
        index = extent.index_sets * EXTENT_SET_BYTES if extent else 0
        return ArenaGeometry(max(1, records // WAYS), 0).total_bytes + sets * INDEX_BYTES_PER_SET + index

    def told(self, model: Model) -> dict[str, Any]:
        memory_bytes = self.hbm_bytes + self.dram_bytes
        extent = self.extent_geometry(model)
        return {
            "hbm_bytes": self.hbm_bytes,
            "dram_bytes": self.dram_bytes,
            "extent_bytes": self.extent_bytes,
            "share_of_tables": memory_bytes / model.table_bytes,
            "capacity_records_by_tier": {
                "hbm": WAYS * self.hbm_sets(model),
                "dram": self.dram_records(model),
                "extent": extent.slots if extent else 0,
            },
        }

    def notes(self, model: Model) -> list[str]:
        """What is odd about them, in words."""
        notes = []
        for tier in ("hbm", "dram", "extent"):
            if self.bytes_of(tier) > model.table_bytes:
                notes.append(
                    f"--{tier} {size(self.bytes_of(tier))} is more than all rows, {size(model.table_bytes)}: "
                    "what was read once stays there, and less buys about the same"
                )
        if not self.hbm_bytes + self.dram_bytes:
            notes.append("no memory at all (--dram 0): whatever is asked for is read from disk")
        return notes


def check_memory(model: Model, budgets: list[Budgets], tokens: int) -> None:
    """Raises BadRequest where replaying all of them at once takes more than this process may use."""
    needed, limit = sum(each.replay_bytes(model, tokens) for each in budgets), memory_limit()
    if needed > limit.bytes:
        raise BadRequest(
            f"replaying these {len(budgets)} budgets takes up to {size(needed)} of memory, and "
            f"{limit.source} is {size(limit.bytes)}; give fewer or smaller budgets, or --curve, which works "
            "on a sample"
        )


def served_budgets(model: Model, stats: dict[str, int]) -> Budgets:
    """Those of a daemon, by its own figures."""
    file_bytes = stats["extent_bytes"] if extent_pays(model) else 0
    pages = ExtentGeometry(model.record_bytes, 0).group.pages
    whole = (file_bytes // PAGE_BYTES - FIRST_PAGE) // pages * pages if file_bytes else 0
    return Budgets(dram_bytes=stats["dram_budget_bytes"], extent_bytes=file_bytes, extent_pages=whole)


def extent_pays(model: Model) -> bool:
    """Whether the service keeps an extent for these tables: a whole record lies on fewer pages than rows."""
    row_pages = model.rows_per_entry * model.geometry(model.tables[0]).pages_per_row
    return row_pages > group_for(model.record_bytes).pages_per_record
