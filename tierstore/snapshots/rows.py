"""All rows of a committed step, wherever they are read from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import structs

from engram_client.errors import BadRequest, UnknownTable
from tierstore.config import Training, load_config
from tierstore.updates import RowStorage, TrainedSpec

FOLDER = "training"  # of a store directory
BATCH_BYTES = 1 << 20  # of rows that are read at once: who trains meanwhile waits for no more
BUFFER_BYTES_MIN = 256 << 10  # for pages
KEEP_ALL_STEPS = 10_000  # reading a store drops no step


class StepRows(Protocol):
    """A `Snapshot`, here or afar."""

    step: int
    state: bytes
    tables: list[TrainedSpec]

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows `ids` int64 [n] of table number `table` into `out` uint8 [n, row_bytes]."""

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        """Those of rows [first, last) that may differ from the initial ones: int64 [n], ascending."""

    def close(self) -> None: ...


@contextmanager
def open_step(directory: Path | str, step: int | None = None) -> Iterator[StepRows]:
    """A kept step (None: the last) of the training store in `directory`, which nobody has open.

    Raises FormatError where there is none, StoreLocked, which names the process that has it, BadRequest for a
    step that is not kept, DataCorrupt.
    """
    with open_storage(directory) as storage, storage.snapshot(step) as rows:
        yield rows


def open_storage(directory: Path | str, together: int = 1) -> RowStorage:
    """The training store in `directory`, to read its steps; raises as `open_step`.

    It is one of `together` that are open at once, in the memory of one.
    """
    config: Training = load_config(file=None, environ=os.environ, flags={}).config.training
    buffer_bytes = max(BUFFER_BYTES_MIN, config.read_buffer_bytes // together)
    config = structs.replace(config, keep_steps=KEEP_ALL_STEPS, read_buffer_bytes=buffer_bytes)
    return RowStorage.open(Path(directory) / FOLDER, config, background=False)


def described(opened: Any) -> StepRows:
    """A client's open step, whose tables may be as they came over the wire."""
    opened.tables = [t if isinstance(t, TrainedSpec) else TrainedSpec.from_json(t) for t in opened.tables]
    rows: StepRows = opened
    return rows


def numbers_of(rows: StepRows, names: Sequence[str]) -> list[int]:
    """The numbers of the tables of these names; no names: all. Raises UnknownTable, BadRequest for
    shares of tables."""
    numbers = {spec.name: number for number, spec in enumerate(rows.tables)}
    for name in names:
        if name not in numbers:
            known = ", ".join(numbers)
            raise UnknownTable(f"no table {name!r} in the training store; it trains: {known}")
    chosen = [numbers[name] for name in dict.fromkeys(names)] if names else list(numbers.values())
    for spec in (rows.tables[number] for number in chosen):
        if (part := spec.partition) is not None:
            raise BadRequest(
                f"table {spec.name!r} is share {part.rank} of {part.world} of a larger one; a share alone "
                "cannot be exported or published: give all of them to tierstore export or publish, or, while "
                "training goes on, snapshots of all of them at one step"
            )
    return chosen


def batches(spec: TrainedSpec, first: int, last: int) -> Iterator[np.ndarray]:
    """Row ids [first, last), int64, some at a time."""
    size = max(1, BATCH_BYTES // spec.row_bytes)
    for start in range(first, last, size):
        yield np.arange(start, min(last, start + size))
