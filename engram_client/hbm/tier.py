"""One budget of device memory for the hot records of several tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engram_client.errors import BadRequest, UnknownTable
from engram_client.hbm.arena import HbmArena
from engram_client.hbm.index import OWNERS_MAX
from engram_client.hbm.table import HbmTable, ids_per_line
from engram_client.table import Table


class HbmTier:
    """Records of `tables` in the memory of `device`; look-ups go through `table(name)`.

    `tables` come from any client, must have records of one size, and compete for the budget: the index
    is part of it. The device may be "cpu". Not thread-safe: all calls belong to one thread and one stream.

    Raises BadRequest for tables that do not go together, or a budget that is too small or not there.
    """

    def __init__(
        self, tables: Iterable[Table], *, budget_bytes: int, device: torch.device | str = "cuda"
    ) -> None:
        tables = list(tables)
        record_bytes = _record_bytes(tables)
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise BadRequest(
                f"the HBM tier cannot use device {device}: {error}; name another with device=, or look rows "
                "up with the tables themselves"
            ) from error
        self._arena = HbmArena(record_bytes, budget_bytes, self.device)
        self._tables: dict[str, HbmTable] = {}
        owner = 0
        for table in tables:
            self._tables[table.spec.name] = HbmTable(table, self._arena, owner)
            owner += ids_per_line(table.spec)

    def table(self, name: str) -> HbmTable:
        """One of the tables. Raises UnknownTable."""
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTable(
                f"the HBM tier was not made for table {name!r}; it has {sorted(self._tables)}"
            ) from None

    def resize(self, budget_bytes: int) -> None:
        """Change the budget; of what is held, what fits is kept: the pinned, then the most read.

        Until it returns the old memory is taken as well. A graph captured before must be captured anew.
        Raises BadRequest and changes nothing.
        """
        self._arena.resize(budget_bytes)

    def stats(self) -> dict[str, int]:
        """`hbm_hits`, `hbm_misses` and others, in records since the start; waits for the device."""
        return self._arena.stats()


def _record_bytes(tables: list[Table]) -> int:
    names = [table.spec.name for table in tables]
    sizes = {table.spec.record_bytes for table in tables}
    if not tables or len(set(names)) != len(names):
        raise BadRequest(f"an HBM tier needs tables of different names, got {names}")
    if len(sizes) != 1:
        found = {table.spec.name: table.spec.record_bytes for table in tables}
        raise BadRequest(f"an HBM tier holds records of one size, got {found} bytes; make a tier for each")
    if sum(ids_per_line(table.spec) for table in tables) > OWNERS_MAX:
        raise BadRequest(f"an HBM tier holds at most {OWNERS_MAX} orders of tables, got {len(tables)} tables")
    return sizes.pop()
