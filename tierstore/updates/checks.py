"""What callers of a `RowStorage` hand over, looked at before anything is done with it; and a full log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_client.errors import BadRequest, IdOutOfRange, Overloaded
from tierstore.config import Training
from tierstore.updates.spec import TrainedSpec


def check_rows(tables: Sequence[TrainedSpec], table: int, ids: np.ndarray, rows: np.ndarray) -> None:
    """Raise BadRequest or IdOutOfRange unless ids are int64 [n] in range and rows uint8 [n, row_bytes]."""
    if not 0 <= table < len(tables):
        raise BadRequest(f"table {table}: the store has {len(tables)} tables, numbered from 0")
    spec = tables[table]
    if ids.dtype != np.int64 or ids.ndim != 1 or not ids.flags.c_contiguous:
        raise BadRequest(f"{spec.name}: row ids must be contiguous int64 [n], got {ids.dtype} {ids.shape}")
    shape = (ids.size, spec.row_bytes)
    if rows.dtype != np.uint8 or rows.shape != shape or not rows.flags.c_contiguous:
        raise BadRequest(f"{spec.name}: rows must be contiguous uint8 {shape}, got {rows.dtype} {rows.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= spec.rows):
        raise IdOutOfRange(
            f"{spec.name}: row ids must lie in [0, {spec.rows}), got {ids.min()} to {ids.max()}"
        )


def check_step(step: int, state: bytes, state_bytes_max: int) -> None:
    """Raise BadRequest unless this can be the step of a commit and what it keeps."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        raise BadRequest(f"a step is a whole number in [0, 2^63), got {step!r}")
    if len(state) > state_bytes_max:
        raise BadRequest(f"the state of a step may take {state_bytes_max} bytes, got {len(state)}")


def log_is_full(
    folder: Path, log_bytes: int, config: Training, kept: Sequence[int], snapshots: int
) -> Overloaded:
    """What to tell when the log is at its bound and nothing in it can be folded."""
    held = (
        f"it holds the kept steps {kept[0]} to {kept[-1]} and what came after" if kept else "nothing is kept"
    )
    pinned = f", and {snapshots} open snapshots" if snapshots else ""
    return Overloaded(
        f"{folder}: the update log is full and cannot be folded, {held}{pinned}: expected at most "
        f"training.log_bytes_max = {config.log_bytes_max} bytes, got {log_bytes}; commit, close snapshots, "
        "lower training.keep_steps, or raise the bound"
    )
