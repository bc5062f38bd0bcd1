"""A committed step as a training store of its own, from which training goes on as it would have here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engram_client.errors import BadRequest
from tierstore.catalog import Catalog
from tierstore.config import Training
from tierstore.packing import Progress
from tierstore.packing.run import OnProgress
from tierstore.snapshots.fresh import fresh_folder, no_room
from tierstore.snapshots.rows import FOLDER, StepRows
from tierstore.snapshots.shares import shares_of
from tierstore.updates import RowStorage
from tierstore.updates.filled import create_filled

WORLD_MAX = 4096  # ranks
SEGMENT_BYTES = 2 << 20  # of the log, which gets nothing but the commit


@dataclass(frozen=True)
class Copied:
    """What was made."""

    folder: Path
    step: int
    file_bytes: int  # that take room


def copy_step(rows: StepRows, out: Path | str, *, on_progress: OnProgress = lambda progress: None) -> Copied:
    """Make the store directory `out` with all tables of `rows`, their optimizer state, and its step.

    Tables keep names and uuids. Rows that are as they were initially take no room. Raises BadRequest where
    `out` exists, StorageError, and what reading raises; `out` is not there then.
    """
    out = Path(out)

    def on_rows(table: int, done: int) -> None:
        spec = rows.tables[table]
        on_progress(Progress(spec.name, done * spec.row_bytes, spec.rows * spec.row_bytes, 0))

    with fresh_folder(out) as folder:
        try:
            Catalog.open(folder, create=True).close()
            create_filled(folder / FOLDER, rows.tables, rows, on_rows)
            config = Training(segment_bytes=SEGMENT_BYTES)
            with RowStorage.open(folder / FOLDER, config, background=False) as storage:
                commit = storage.commit(rows.step, (), rows.state)
                while storage.write_block():
                    pass
                commit.wait(0)
        except OSError as error:
            raise no_room(out, error, _bytes_wanted(rows)) from error
        taken = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    return Copied(out, rows.step, taken)


def reshard_step(
    rows: StepRows, out: Path | str, world: int, *, on_progress: OnProgress = lambda progress: None
) -> list[Copied]:
    """Make the folder `out` with the stores of `world` ranks that train on from the whole tables `rows`.

    They are OUT/0, OUT/1, ... Raises as `copy_step`, and BadRequest for tables that are shares.
    """
    out = Path(out)
    if not 1 <= world <= WORLD_MAX:
        raise BadRequest(f"a world is 1 to {WORLD_MAX} ranks, got {world}")
    shares = shares_of(rows, world)
    with fresh_folder(out) as folder:
        made = [
            copy_step(share, folder / str(rank), on_progress=on_progress) for rank, share in enumerate(shares)
        ]
    return [replace(copied, folder=out / copied.folder.name) for copied in made]


def _bytes_wanted(rows: StepRows) -> int:
    """At most, of rows; they lie in pages."""
    return sum(spec.rows * spec.row_bytes for spec in rows.tables)
