"""Trained tables for tests, and a dict model that says what their rows must be."""

from __future__ import annotations

import numpy as np

from engram_client.spec import Field, RowLayout
from tierstore.updates import Initial, RowStorage, TrainedSpec

WIDE = RowLayout(
    (Field("weight", "bfloat16", 24), Field("master", "float32", 24), Field("adam_m", "float32", 9))
)
NARROW = RowLayout((Field("weight", "float32", 5), Field("sum", "bfloat16", 1)))  # 22 bytes: no multiple of 8
LARGE = RowLayout((Field("weight", "float32", 1500),))  # more than a page


def tables() -> list[TrainedSpec]:
    return [
        TrainedSpec("wide", 900, WIDE, Initial("normal", 0.02, seed=3), uuid="11" * 16),
        TrainedSpec("narrow", 5000, NARROW, uuid="22" * 16),
        TrainedSpec("large", 40, LARGE, Initial("normal", 1.0, seed=4), uuid="33" * 16),
    ]


def random_rows(random: np.random.Generator, spec: TrainedSpec, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids int64 and rows uint8 [n, row_bytes]."""
    ids = random.choice(spec.rows, min(count, spec.rows), replace=False).astype(np.int64)
    return ids, random.integers(0, 256, (ids.size, spec.row_bytes), dtype=np.uint8)


class TableModel:
    """What every row must be: a dict a table, and a copy of them for each committed step."""

    def __init__(self, storage: RowStorage) -> None:
        """`storage` is empty; what it says of rows that were never written is taken down once."""
        self.initial = [read_all(storage, t) for t in range(len(storage.tables))]
        self.now: list[dict[int, bytes]] = [{} for _ in storage.tables]
        self.committed: dict[int, list[dict[int, bytes]]] = {}

    def write(self, table: int, ids: np.ndarray, rows: np.ndarray) -> None:
        self.now[table].update(zip(ids.tolist(), (row.tobytes() for row in rows), strict=True))

    def commit(self, step: int) -> None:
        self.committed[step] = [dict(table) for table in self.now]

    def go_back(self, step: int | None) -> None:
        empty: list[dict[int, bytes]] = [{} for _ in self.now]
        self.now = [dict(table) for table in self.committed.get(-1 if step is None else step, empty)]
        self.committed = {s: t for s, t in self.committed.items() if step is not None and s <= step}

    def rows(self, table: int) -> np.ndarray:
        """uint8 [rows, row_bytes]."""
        rows = self.initial[table].copy()
        for row, value in self.now[table].items():
            rows[row] = np.frombuffer(value, np.uint8)
        return rows

    def check(self, storage: RowStorage) -> None:
        """Every row of every table."""
        for table, spec in enumerate(storage.tables):
            found, expected = read_all(storage, table), self.rows(table)
            wrong = np.flatnonzero((found != expected).any(axis=1))
            assert wrong.size == 0, f"{spec.name}: {wrong.size} rows are wrong, the first is {wrong[0]}"


def read_all(storage: RowStorage, table: int) -> np.ndarray:
    spec = storage.tables[table]
    out = np.zeros((spec.rows, spec.row_bytes), np.uint8)
    storage.read(table, np.arange(spec.rows), out)
    return out
