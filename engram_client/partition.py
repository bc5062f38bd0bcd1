"""Which rank of a sharded training keeps which row of a table.

Row ids are dealt out like cards: row `id` is kept by rank `id % world`, as row `id // world` of its store.
So the rows of every head, and the often-named ones among them, are spread evenly whatever the sizes of
heads are, and a store holds its share without gaps. The rule is saved with each share: rows dealt out for
another number of ranks, or by another rule, are refused when they are opened, not read wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, FormatError
from engram_client.spec import HashScheme, scheme_from_json

RULE = "interleaved"


@dataclass(frozen=True)
class Partition:
    """Share `rank` of `world` of a table of `rows` rows. `scheme` hashes to row ids of the whole table."""

    rank: int
    world: int
    rows: int
    scheme: HashScheme | None = None
    rule: str = RULE

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise BadRequest(f"a share is one of 0 to {self.world - 1} of {self.world}, got {self.rank}")
        if self.rule != RULE:
            raise BadRequest(
                f"rows were dealt out by the rule {self.rule!r}, known is {RULE!r}; read them with the "
                "version that wrote them"
            )

    @property
    def store_rows(self) -> int:
        """Rows of the share's table: at least one, which nobody names where the table is smaller than the
        world."""
        return max(1, -(-(self.rows - self.rank) // self.world))

    def owners(self, ids: np.ndarray) -> np.ndarray:
        """Ranks int64 [n] that keep rows int64 [n]."""
        return ids % self.world

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Rows int64 [n] of the whole table as rows of their owners' stores."""
        return ids // self.world

    def row_ids(self, places: np.ndarray) -> np.ndarray:
        """Rows int64 [n] of this share's store as rows of the whole table."""
        return places * self.world + self.rank

    def places_before(self, row: int) -> int:
        """How many rows of this share come before `row` of the whole table."""
        return max(0, -(-(row - self.rank) // self.world))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Partition:
        """Inverse of `to_json`. Raises FormatError."""
        try:
            scheme = scheme_from_json(obj["scheme"]) if obj["scheme"] else None
            return cls(**{**obj, "scheme": scheme})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"a table's partition cannot be read: {error}") from error
