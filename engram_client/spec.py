"""What a table is: its identity, the layout of a row, and how token ids become row ids.

Pure data, shared by client and service. A `TableSpec` is what the service tells a client about a
table; the client hashes with it and sends its generation along with every request.

Terms: a *row* is `row_bytes` opaque bytes; a table has `heads` rows for each n-gram of one
*order* (n-gram length); those rows together are a *record*, and the 63-bit *n-gram key* they are
all hashed from names it: `row id = key mod head_sizes[o][h] + head_offsets[o][h]`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from engram_client.errors import FormatError

ELEMENT_BYTES = {
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
    "int8": 1,
    "uint8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}

Addressing = Literal["record", "row"]
SchemeKind = Literal["engram", "ple"]


@dataclass(frozen=True)
class Field:
    """One run of equal elements inside a row, such as its weights or its scales."""

    name: str  # "weight" holds the embedding; "scale" its block scales
    dtype: str  # a key of ELEMENT_BYTES
    count: int  # elements

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            known = ", ".join(ELEMENT_BYTES)
            raise FormatError(f"field {self.name!r}: unknown dtype {self.dtype!r}; known: {known}")
        if self.count < 1:
            raise FormatError(f"field {self.name!r}: count must be >= 1, got {self.count}")

    @property
    def bytes(self) -> int:
        return self.count * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class RowLayout:
    """How the bytes of a row are to be read: its fields, one after another, without padding."""

    fields: tuple[Field, ...]
    global_scale: float | None = None  # multiplies every element of the whole table

    @cached_property
    def row_bytes(self) -> int:
        return sum(f.bytes for f in self.fields)

    @property
    def embedding_dim(self) -> int:
        return self.field("weight").count

    def field(self, name: str) -> Field:
        for f in self.fields:
            if f.name == name:
                return f
        have = ", ".join(f.name for f in self.fields)
        raise FormatError(f"row layout has no field {name!r}; it has: {have}")

    def offset_bytes(self, name: str) -> int:
        """Where field `name` starts inside a row."""
        names = [f.name for f in self.fields]
        return sum(f.bytes for f in self.fields[: names.index(self.field(name).name)])


@dataclass(frozen=True)
class HashScheme:
    """How the last tokens become n-gram keys and row ids, with every parameter resolved.

    `parameters` keeps the published constructor arguments for a reader; the code uses only the
    resolved ones. For "engram" the ids that are hashed are compressed ones: `vocab_size` is the
    compressed size, `pad_id` a raw token id (before compression), `vocabulary_digest` the
    SHA-256 of the compressed map as little-endian int64, or None where the packer had no
    tokenizer. For "ple" raw ids are hashed and `eos_token_id` ends a segment.
    """

    kind: SchemeKind
    layer_id: int
    multipliers: tuple[int, ...]  # one per position back, [max_ngram_size]
    head_sizes: tuple[tuple[int, ...], ...]  # [orders][heads], rows of each head
    head_offsets: tuple[tuple[int, ...], ...]  # [orders][heads], first row of each head
    vocab_size: int
    pad_id: int | None = None
    eos_token_id: int | None = None
    vocabulary_digest: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def orders(self) -> int:
        """How many n-gram lengths are hashed: 2, 3, ... max_ngram_size."""
        return len(self.head_sizes)

    @property
    def heads(self) -> int:
        """Rows in a record: heads per order."""
        return len(self.head_sizes[0])

    @property
    def max_ngram_size(self) -> int:
        return len(self.multipliers)

    @property
    def rows(self) -> int:
        """One past the largest row id the scheme can name."""
        return max(
            o + s
            for os, ss in zip(self.head_offsets, self.head_sizes, strict=True)
            for o, s in zip(os, ss, strict=True)
        )

    @property
    def recoverable(self) -> bool:
        """Whether the row ids of one n-gram determine its key (Chinese remainder)."""
        return all(math.prod(sizes) > 2**63 for sizes in self.head_sizes)


@dataclass(frozen=True)
class TableSpec:
    """Identity and shape of one served table.

    `generation` and `uuid` are 32 hexadecimal digits. `rows` may exceed `scheme.rows` where the
    checkpoint is padded. `addressing` says what a key names: "record" (an n-gram key, all heads
    of one order) or "row" (a row id).
    """

    name: str
    generation: str
    uuid: str
    rows: int
    layout: RowLayout
    addressing: Addressing
    scheme: HashScheme | None = None
    layer: int | None = None
    model: str | None = None

    @cached_property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    @property
    def embedding_dim(self) -> int:
        return self.layout.embedding_dim

    @property
    def record_rows(self) -> int:
        """Rows under one key: heads of an order, or 1 for a row-addressed table."""
        return self.scheme.heads if self.scheme and self.addressing == "record" else 1

    @cached_property
    def record_bytes(self) -> int:
        return self.record_rows * self.row_bytes

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> TableSpec:
        """Inverse of `to_json`. Raises FormatError naming what is missing or unknown."""
        try:
            layout = layout_from_json(obj["layout"])
            scheme = scheme_from_json(obj["scheme"]) if obj.get("scheme") else None
            return cls(**{**obj, "layout": layout, "scheme": scheme})
        except (KeyError, TypeError) as error:
            raise FormatError(f"table description is incomplete or from a newer version: {error}") from error


def layout_from_json(obj: dict[str, Any]) -> RowLayout:
    return RowLayout(tuple(Field(**f) for f in obj["fields"]), obj.get("global_scale"))


def scheme_from_json(obj: dict[str, Any]) -> HashScheme:
    nested = {k: tuple(tuple(row) for row in obj[k]) for k in ("head_sizes", "head_offsets")}
    return HashScheme(**{**obj, **nested, "multipliers": tuple(obj["multipliers"])})
