"""The weights of a committed step as a generation that is served: read-only, packed like any other.

Row files of all tables are written first, as `pack` writes them; then one transaction makes them current, so
that layers of one model are never of two steps. What they replace is retired and stays: daemons serve both
while clients move over, and `tierstore rollback` goes back.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import BadRequest, StorageError
from engram_client.spec import RowLayout, TableSpec
from tierstore.catalog import Catalog
from tierstore.format.direct import OUT_OF_SPACE, sync_folder
from tierstore.format.rowfile import RowFile
from tierstore.format.source import TableRows
from tierstore.format.writer import RowFileJob, finish, write_rows
from tierstore.packing import PackedTable, Progress
from tierstore.packing.claim import claim
from tierstore.packing.names import check_name
from tierstore.packing.plan import choose_addressing
from tierstore.packing.run import OnProgress
from tierstore.packing.space import MARGIN_BYTES
from tierstore.snapshots.leftovers import clear, clear_killed, note_placed, scratch_folder
from tierstore.snapshots.rows import FOLDER, StepRows, batches, numbers_of
from tierstore.snapshots.weights import Weights
from tierstore.updates.disk import REAL_DISK
from tierstore.updates.identity import is_created, load_identity

UNKNOWN_GENERATION = "0" * 32


@dataclass(frozen=True)
class Published:
    """What is current now; `replaced` holds the generations that were before, by table."""

    step: int
    tables: tuple[PackedTable, ...]
    replaced: dict[str, str]


class _TrainedRows:
    """Weights of one table for the packer; see `RowReader`. Read by one thread."""

    def __init__(self, rows: StepRows, number: int, weights: Weights) -> None:
        self._rows, self._number, self._weights = rows, number, weights

    def read(self, first_row: int, last_row: int, batch_rows: int, staging: np.ndarray) -> None:
        spec, size = self._rows.tables[self._number], self._weights.field.bytes
        for ids in batches(spec, first_row, last_row):
            batch = np.empty((ids.size, spec.row_bytes), np.uint8)
            self._rows.read(self._number, ids, batch)
            at = (int(ids[0]) - first_row) * size
            staging[at : at + ids.size * size] = self._weights.of(batch).reshape(-1)

    def close(self) -> None:
        """The step is its owner's to close."""


@dataclass(frozen=True)
class _Task:
    job: RowFileJob
    rows: _TrainedRows


def publish_step(
    rows: StepRows,
    folder: Path | str,
    *,
    tables: Sequence[str] = (),
    name: str | None = None,
    dtype: str | None = None,
    addressing: str = "auto",
    on_progress: OnProgress = lambda progress: None,
) -> Published:
    """Make the weights of `rows` the current generation of these tables (none: all) in a store directory.

    `name` is what one table is to be called there. Weights are `dtype`, or as they are kept. Raises
    BadRequest, UnknownTable, StoreLocked where another process packs a table of that name, StorageError, and
    what reading raises; nothing is changed for readers then.
    """
    folder = Path(folder).absolute()
    numbers = numbers_of(rows, tables)
    if name is not None and len(numbers) != 1:
        have = ", ".join(rows.tables[number].name for number in numbers)
        raise BadRequest(f"the name {name!r} is for one table, these are {len(numbers)} ({have}); choose one")
    with ExitStack() as stack:
        tasks = [_task(rows, number, folder, name, dtype, addressing) for number in numbers]
        _check_names(folder, [task.job.spec.name for task in tasks])
        catalog = stack.enter_context(Catalog.open(folder, create=True))
        clear_killed(folder, catalog)  # what was killed is not gone on with: its step may be gone
        for task in tasks:
            own, what = task.job.path.parent, f"table {task.job.spec.name!r}"
            stack.enter_context(claim(folder / "packing" / task.job.spec.name, what))  # as `pack` does
            stack.enter_context(claim(own, what))
            stack.callback(clear, own, folder, catalog)
            clear(own, folder, catalog)
        room = _Room(rows.step, folder, tasks, catalog)
        room.check()
        try:
            packed = [_write(task, folder, on_progress) for task in tasks]
            old = catalog.publish_together([(p.spec, str(p.path.relative_to(folder))) for p in packed])
        except StorageError as error:
            for task in tasks:
                clear(task.job.path.parent, folder, catalog)
            raise room.told(error) from error
        sync_folder(folder)
    replaced = {e.spec.name: e.spec.generation for e in old if e is not None}
    return Published(rows.step, tuple(packed), replaced)


def _task(
    rows: StepRows, number: int, folder: Path, name: str | None, dtype: str | None, addressing: str
) -> _Task:
    spec = rows.tables[number]
    weights = Weights(spec.layout, dtype)
    layout = RowLayout((weights.field,))
    source = TableRows(name or spec.name, spec.model, spec.layer, spec.rows, layout, spec.scheme)
    check_name(source.name)
    table = TableSpec(
        source.name, UNKNOWN_GENERATION, os.urandom(16).hex(), spec.rows, layout,
        choose_addressing(source, addressing), spec.scheme, spec.layer, spec.model,
    )  # fmt: skip
    job = RowFileJob.plan(source, table, scratch_folder(folder, source.name))
    return _Task(job, _TrainedRows(rows, number, weights))


def _check_names(folder: Path, names: Sequence[str]) -> None:
    """A name means one table to those who connect to a directory."""
    if not is_created(REAL_DISK, folder / FOLDER):
        return
    trained = {spec.name for spec in load_identity(REAL_DISK, folder / FOLDER).tables}
    for name in names:
        if name in trained:
            raise BadRequest(
                f"{folder} trains a table {name!r} itself, and a name means one table there; "
                "publish it under another name (--as NAME), or into another store"
            )


class _Room:
    """The bytes that publishing takes, and what to tell where they are not to be had."""

    def __init__(self, step: int, folder: Path, tasks: Sequence[_Task], catalog: Catalog) -> None:
        self._step, self._folder = step, folder
        self._sizes = {task.job.spec.name: task.job.header.geometry.file_bytes for task in tasks}
        served = [entry.spec for name, entry in catalog.tables().items() if name in self._sizes]
        self._served = ", ".join(f"generation {spec.generation} of {spec.name!r}" for spec in served)
        self._wanted_bytes = sum(self._sizes.values()) + MARGIN_BYTES

    def check(self) -> None:
        """Raises StorageError; nothing was written then. Others may take the room afterwards."""
        if self._wanted_bytes > _free_bytes(self._folder):
            raise self._too_little("there is too little room", "nothing was written")

    def told(self, error: StorageError) -> StorageError:
        """`error`, or what there is to say where the disk has become full; what was written is gone."""
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in OUT_OF_SPACE:
            return error
        return self._too_little(
            f"the disk became full ({cause.strerror})", "what had been written was removed"
        )

    def _too_little(self, what: str, left: str) -> StorageError:
        names = ", ".join(f"{name!r} ({size} bytes)" for name, size in self._sizes.items())
        goes_on = f"{self._served} {'is' if self._served.count(',') == 0 else 'are'} served as before"
        return StorageError(
            f"{self._folder}: {what} to publish step {self._step} as {names}: {self._wanted_bytes} bytes are "
            f"wanted, {_free_bytes(self._folder)} are free; {left}, "
            f"{goes_on if self._served else 'none of these is served there yet'}: make room, or remove "
            "retired generations (tierstore pack --prune does), and publish again"
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _write(task: _Task, folder: Path, on_progress: OnProgress) -> PackedTable:
    job, name = task.job, task.job.spec.name
    began_s, total = time.monotonic(), job.header.geometry.file_bytes

    def on_packed(done: int) -> None:
        on_progress(Progress(name, done * total // job.source.rows, total, 0))

    journal = job.open_journal()
    write_rows(job, task.rows, journal, on_packed, lambda rows: None)
    path = finish(
        job, journal, folder / "tables" / name, lambda final: note_placed(job.path.parent, final, folder)
    )
    return PackedTable(RowFile.open(path).spec, path, total, 0, time.monotonic() - began_s)
