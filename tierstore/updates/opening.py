"""Opening a training store: whose it is, what its log holds, what a crash left, and the indices over it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engram_client.errors import StorageError
from tierstore.config import Training
from tierstore.updates.blocks import ALIGN, BlockTable, stride_of
from tierstore.updates.disk import Disk
from tierstore.updates.epochs import EpochsFile
from tierstore.updates.identity import load_identity
from tierstore.updates.journal import Journal
from tierstore.updates.pages import TablePages
from tierstore.updates.row_index import RowIndex
from tierstore.updates.scan import Committed, Scan
from tierstore.updates.segments import Segment, Segments
from tierstore.updates.spec import TrainedSpec
from tierstore.updates.step_index import StepPlace
from tierstore.updates.superblock import Superblock

log = logging.getLogger(__name__)


class Opened:
    """What a store has on disk, recovered. Owns everything until a `RowStorage` takes it over."""

    def __init__(self, disk: Disk, folder: Path, config: Training, changed: threading.Condition) -> None:
        self.identity = load_identity(disk, folder)
        uuid, tables = self.identity.uuid, self.identity.tables
        with ExitStack() as closing:
            closing.callback(disk.lock(folder).close)
            self.steps = disk.open_steps(folder)
            closing.callback(self.steps.close)
            self.superblock = Superblock(disk, folder, uuid)
            self.segments = Segments(disk, folder, uuid, config.segment_bytes, changed)
            closing.callback(self.segments.close)
            self.pages = [TablePages(disk, folder, table) for table in tables]
            for pages in self.pages:
                closing.callback(pages.close)
            self.journal = Journal(disk, folder, uuid, self.pages)
            closing.callback(self.journal.close)
            self.epochs = EpochsFile(disk, folder)
            self._recover(disk, folder)
            self.close = closing.pop_all().close

    def _recover(self, disk: Disk, folder: Path) -> None:
        self.superblock.load()
        folded = self.superblock.folded
        self.segments.open_all()
        known = self.steps.load()
        durable = max([place.end for place in known.values()], default=0)
        if folded.start:
            durable = max(durable, folded.start + ALIGN)
        self.scan = Scan(disk, self.segments, self.identity.uuid, self.identity.words)
        self.scanned = self.scan.run(folded.start, durable)
        for pages in self.pages:
            pages.open()
        self.journal.open()
        replayed = self.journal.replay(folded.folds)
        if replayed:
            log.info("%s: %d pages of an interrupted fold written again", folder, replayed)
        self.epochs.load(folded, [pages.epochs for pages in self.pages])
        self.epochs.remove_others(folded.folds)
        self.segments.cut(self.scanned.end)
        self.segments.drop_before(folded.start)
        self.segments.remove_strangers()
        self.indexed = self._update_steps(known, self.scanned.commits)
        blocks = BlockTable()
        for header in self.scanned.rows:
            blocks.add(header)
        self.indices = index_of(self.scan, self.identity.tables, self.segments.all, blocks.all())

    def _update_steps(self, known: dict[int, StepPlace], commits: list[Committed]) -> list[int]:
        """Have the index say what the log says."""
        true = {c.step: StepPlace(c.start, c.end, c.segment, c.digest) for c in commits}
        put = {step: place for step, place in true.items() if known.get(step) != place}
        drop = [step for step in known if step not in true]
        if put or drop:
            try:
                self.steps.change(put, drop)
            except StorageError as error:
                log.warning("%s; the log holds every commit, so nothing is lost", error)
        return list(true)


def index_of(
    scan: Scan, tables: Sequence[TrainedSpec], segments: list[Segment], blocks: np.ndarray
) -> list[RowIndex]:
    """Where the newest version of every row in `blocks` (BLOCK [n], ascending) lies, table by table.

    Raises DataCorrupt.
    """
    indices = [RowIndex() for _ in tables]
    bases = np.array([s.base for s in segments])
    numbers = np.searchsorted(bases, blocks["position"], side="right") - 1
    for block, number in zip(blocks, numbers.tolist(), strict=True):
        table, ids = int(block["table"]), np.empty(int(block["count"]), np.int64)
        scan.ids(segments[number], int(block["position"]), ids, int(block["ids_sum"]))
        indices[table].put(ids, int(block["first_entry"]), stride_of(tables[table].row_bytes))
    for index in indices:
        index.move_all()  # snapshots are read by several threads, which must change nothing
    return indices
