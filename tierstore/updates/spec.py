"""What a trained table is: its rows, what they are before they were ever written, and whose they are."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from engram_client.errors import BadRequest, FormatError
from engram_client.partition import Partition
from engram_client.spec import HashScheme, RowLayout, layout_from_json, scheme_from_json

ROW_BYTES_MAX = 64 << 10
ROWS_MAX = 2**40


@dataclass(frozen=True)
class Initial:
    """Rows that were never written: `zeros`, `normal` weights of `std` from a counter-based generator, or
    those of a `packed` generation of the whole table, which the store keeps.

    The generator's counter is (seed, table's name, row, element), so a row is the same whenever and by
    whomever it is computed, and a run that is repeated from its seed begins with the same rows. The fields
    `weight` and, where there is one, `master` get the values; others are zeros.
    """

    kind: Literal["zeros", "normal", "packed"] = "zeros"
    std: float = 0.0
    seed: int = 0
    generation: str | None = None  # of the packed table, 32 hexadecimal digits
    path: str | None = field(default=None, compare=False)  # of its row file; not saved, known once opened

    def __post_init__(self) -> None:
        if self.kind not in ("zeros", "normal", "packed"):
            raise BadRequest(f"initial rows are 'zeros', 'normal' or 'packed', got {self.kind!r}")
        if (self.kind == "packed") != (self.generation is not None):
            raise BadRequest(f"a generation is given for packed initial rows and no others, got {self}")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise BadRequest(f"std of initial rows must be finite and >= 0, got {self.std}")
        if not 0 <= self.seed < 2**63:
            raise BadRequest(f"seed of initial rows must lie in [0, 2^63), got {self.seed}")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.described().items())

    def described(self) -> dict[str, Any]:
        """What a trainer is told, and shares of one table agree on: not where this store keeps them."""
        told = {"kind": self.kind, "std": self.std, "seed": self.seed}
        return told | ({"generation": self.generation} if self.generation else {})


def _new_uuid() -> str:
    return os.urandom(16).hex()


@dataclass(frozen=True)
class TrainedSpec:
    """One table that is trained. Row-addressed: a key is a row id."""

    name: str
    rows: int
    layout: RowLayout  # "weight", then "master" where it is kept, then the optimizer's fields
    initial: Initial = Initial()
    scheme: HashScheme | None = None
    layer: int | None = None
    model: str | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)  # opaque here
    uuid: str = field(default_factory=_new_uuid)  # 32 hexadecimal digits
    partition: Partition | None = None  # this is one share of a larger table, which `scheme` is not of

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", self.name):
            raise BadRequest(f"table name {self.name!r}: use letters, digits, dots, dashes, underscores")
        if not 1 <= self.rows <= ROWS_MAX:
            raise BadRequest(f"table {self.name!r}: expected 1 to {ROWS_MAX} rows, got {self.rows}")
        if self.partition is not None and self.partition.store_rows != self.rows:
            raise BadRequest(
                f"table {self.name!r}: share {self.partition.rank} of {self.partition.world} has "
                f"{self.partition.store_rows} rows, got {self.rows}"
            )
        if self.row_bytes > ROW_BYTES_MAX:
            raise BadRequest(
                f"table {self.name!r}: a row with its optimizer state may take {ROW_BYTES_MAX} bytes, "
                f"got {self.row_bytes}"
            )

    @property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    @property
    def whole_rows(self) -> int:
        """Of the table that this is one share of, or all of."""
        return self.partition.rows if self.partition else self.rows

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> TrainedSpec:
        """Inverse of `to_json`. Raises FormatError."""
        try:
            scheme = scheme_from_json(obj["scheme"]) if obj["scheme"] else None
            parts = {"layout": layout_from_json(obj["layout"]), "initial": Initial(**obj["initial"])}
            partition = Partition.from_json(obj["partition"]) if obj.get("partition") else None
            return cls(**{**obj, **parts, "scheme": scheme, "partition": partition})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"a trained table's description cannot be read: {error}") from error
