"""The DRAM of a training store: an arena for each row size, inside one budget that can be changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from engram_client.errors import ConfigError
from tierstore.tiers.trained import Replaced, TrainedArena
from tierstore.updates import TrainedSpec


class Arenas:
    """The budget is shared by the bytes of the tables that have rows of a size."""

    def __init__(self, budget_bytes: int, specs: Sequence[TrainedSpec]) -> None:
        """Raises ConfigError where not every row size gets one set."""
        self._sizes: Counter[int] = Counter()
        for spec in specs:
            self._sizes[spec.row_bytes] += spec.rows * spec.row_bytes
        self.budget_bytes = budget_bytes
        self._shares = self.shares(budget_bytes)
        self._arenas = {size: TrainedArena(share, size) for size, share in self._shares.items()}

    def __iter__(self) -> Iterator[TrainedArena]:
        return iter(self._arenas.values())

    def of(self, row_bytes: int) -> TrainedArena:
        return self._arenas[row_bytes]

    def shares(self, budget_bytes: int) -> dict[int, int]:
        """Bytes for each row size. Raises ConfigError."""
        least = {size: TrainedArena.least_bytes(size) for size in self._sizes}
        spare, total = budget_bytes - sum(least.values()), sum(self._sizes.values())
        if spare < 0:
            raise ConfigError(
                f"$.training.dram_bytes: expected at least {sum(least.values())} bytes for rows of "
                f"{', '.join(map(str, sorted(self._sizes)))} bytes with their optimizer state, got "
                f"{budget_bytes}"
            )
        return {size: least[size] + spare * weight // total for size, weight in self._sizes.items()}

    def replace(self, budget_bytes: int) -> list[tuple[TrainedArena, Replaced]]:
        """Have empty arenas within `budget_bytes`; nothing may be dirty. What `move` of each takes, those
        that shrink first."""
        before, after = self._shares, self.shares(budget_bytes)
        changed = sorted((s for s in after if after[s] != before[s]), key=lambda s: after[s] - before[s])
        self.budget_bytes, self._shares = budget_bytes, after
        return [(self._arenas[size], self._arenas[size].replace(after[size])) for size in changed]

    def close(self) -> None:
        for arena in self:
            arena.close()
