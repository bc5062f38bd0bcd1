"""One budget of device memory for the hot records of several tables."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from engram_client.errors import BadRequest, UnknownTable
from engram_client.gpu.probe import as_device
from engram_client.hbm.index import OWNERS_MAX
from engram_client.hbm.memory import HbmMemory
from engram_client.hbm.table import HbmTable, ids_per_line
from engram_client.table import Table

STAGING_BYTES = 16 << 20
COLUMNS = 8  # ids a position that later tables may have, at least


class HbmTier:
    """Records of `tables` in the memory of `device`; look-ups go through `table(name)`. Thread safe.

    `tables` come from any client, must have records of one size, and compete for the budget: the index is
    part of it. The device may be "cpu". `staging_bytes` of pinned host memory carry what the tier does not
    hold. Where less than the budget is free, the tier takes less and says so.

    Raises BadRequest for tables that do not go together, a budget that is too small, or no such device.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        *,
        budget_bytes: int,
        device: torch.device | str = "cuda",
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        tables = list(tables)
        record_bytes = _record_bytes(tables)
        self.device = as_device(device, "the HBM tier's device")
        columns_max = max(ids_per_line(table.spec) for table in tables)
        columns_max = max(columns_max, COLUMNS)
        self._memory = HbmMemory(record_bytes, columns_max, budget_bytes, staging_bytes, self.device)
        self.record_bytes, self._columns_max = record_bytes, columns_max
        self._tables: dict[str, HbmTable] = {}
        self._owners = 0
        self._adding = threading.Lock()
        for table in tables:
            self.add(table)

    def add(self, table: Table) -> HbmTable:
        """Take another table in, or another generation of one, in the place of the one of that name.

        What is held of an earlier generation is never read for it, and goes in time. Raises BadRequest.
        """
        spec, columns = table.spec, ids_per_line(table.spec)
        with self._adding:
            if spec.record_bytes != self.record_bytes or columns > self._columns_max:
                raise BadRequest(
                    f"this HBM tier holds records of {self.record_bytes} bytes by up to "
                    f"{self._columns_max} ids a "
                    f"position; those of table {spec.name!r} have {spec.record_bytes} and {columns}"
                )
            if self._owners + columns > OWNERS_MAX:
                raise BadRequest(
                    f"an HBM tier numbers at most {OWNERS_MAX} orders of tables over its life; make a new one"
                )
            added = self._tables[spec.name] = HbmTable(table, self._memory, self._owners)
            self._owners += columns
            return added

    def table(self, name: str) -> HbmTable:
        """One of the tables. Raises UnknownTable."""
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTable(
                f"the HBM tier was not made for table {name!r}; it has {sorted(self._tables)}"
            ) from None

    def resize(self, budget_bytes: int, *, graphs_are_gone: bool = False) -> None:
        """Change the budget; of what is held, what fits is kept: the pinned, then the most read.

        Until it returns the old memory is taken as well, and look-ups wait. Graphs that hold look-ups keep
        the old memory's addresses: once one was captured, say `graphs_are_gone` when all of them are, and
        capture anew. Raises BadRequest and changes nothing.
        """
        if self._memory.arena.captured and not graphs_are_gone:
            raise BadRequest(
                "a CUDA graph was captured that reads this tier's memory, which resizing moves; drop "
                "the graphs, "
                "call resize(..., graphs_are_gone=True) and capture them anew"
            )
        self._memory.resize(budget_bytes)
        self._memory.arena.captured = False

    def settle(self) -> None:
        """Have the host wait until all records that look-ups have brought are let in or left out."""
        self._memory.misses.settle()

    def stats(self) -> dict[str, int]:
        """`hbm_hits`, `hbm_misses` and others, in records since the start; waits for the device."""
        return self._memory.stats()


def _record_bytes(tables: list[Table]) -> int:
    names = [table.spec.name for table in tables]
    sizes = {table.spec.record_bytes for table in tables}
    if not tables or len(set(names)) != len(names):
        raise BadRequest(f"an HBM tier needs tables of different names, got {names}")
    if len(sizes) != 1:
        found = {table.spec.name: table.spec.record_bytes for table in tables}
        raise BadRequest(f"an HBM tier holds records of one size, got {found} bytes; make a tier for each")
    return sizes.pop()
