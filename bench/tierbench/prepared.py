"""A packed table for benchmarks: made once under the data folder, found there the next time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram_client.spec import TableSpec
from tierbench.checkpoint import make_checkpoint, planned_bytes
from tierbench.progress import byte_progress
from tierstore.catalog import Catalog
from tierstore.packing import PackOptions, Progress, pack

MODEL = "deepseek-v4.1"
LAYERS = (1,)
SEED = 0


@dataclass(frozen=True)
class PreparedTable:
    """One layer of a scaled V4.1 checkpoint, packed; `row_file` is what lies on the disk."""

    store: Path
    spec: TableSpec
    row_file: Path


def prepared_checkpoint(folder: Path, rows_per_head: int) -> Path:
    """The checkpoint with `rows_per_head` rows a head, made where it is not there yet."""
    out = folder / f"v41-{rows_per_head}" / "checkpoint"
    with byte_progress("making the checkpoint", planned_bytes(MODEL, rows_per_head, LAYERS)) as progress:
        make_checkpoint(MODEL, rows_per_head, out, seed=SEED, layers=LAYERS, progress=progress)
    return out


def prepared_table(folder: Path, rows_per_head: int) -> PreparedTable:
    """The packed table with `rows_per_head` rows a head, made where it is not there yet.

    Raises StorageError, or BadRequest where something else lies at its place.
    """
    store = folder / f"v41-{rows_per_head}" / "store"
    if not (found := packed_tables(store)):
        _pack(prepared_checkpoint(folder, rows_per_head), store)
        found = packed_tables(store)
    ((spec, row_file),) = found
    return PreparedTable(store, spec, row_file)


def _pack(checkpoint: Path, store: Path) -> None:
    done_bytes = 0
    with byte_progress("packing") as progress:

        def on_progress(now: Progress) -> None:
            nonlocal done_bytes
            progress(now.done_bytes - done_bytes)
            done_bytes = now.done_bytes

        pack(checkpoint, store, PackOptions(), notify=lambda text: None, on_progress=on_progress)


def packed_tables(store: Path) -> list[tuple[TableSpec, Path]]:
    """Every table of a store and its row file; none where there is no store."""
    if not (store / "catalog").exists():
        return []
    with Catalog.open(store) as catalog:
        return [(entry.spec, entry.path) for entry in catalog.tables().values()]
