"""Opening a training store: whose it is, what its log holds, what a crash left, and the indices over it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_client.errors import StorageError
from tierstore.config import Training
from tierstore.updates.blocks import ALIGN, BlockTable, stride_of
from tierstore.updates.disk import Disk
from tierstore.updates.identity import load_identity
from tierstore.updates.row_index import RowIndex
from tierstore.updates.scan import Committed, Scan
from tierstore.updates.segments import Segments
from tierstore.updates.spec import TrainedSpec
from tierstore.updates.step_index import StepPlace
from tierstore.updates.superblock import Superblock

log = logging.getLogger(__name__)


class Opened:
    """What a store has on disk, recovered. Owns everything until a `RowStorage` takes it over."""

    def __init__(self, disk: Disk, folder: Path, config: Training, changed: threading.Condition) -> None:
        self.identity = load_identity(disk, folder)
        self.owner = disk.lock(folder)
        self.segments = Segments(disk, folder, self.identity.uuid, config.segment_bytes, changed)
        try:
            self.steps = disk.open_steps(folder)
            try:
                self._recover(disk, folder, config)
            except BaseException:
                self.segments.close()
                self.steps.close()
                raise
        except BaseException:
            self.owner.close()
            raise

    def _recover(self, disk: Disk, folder: Path, config: Training) -> None:
        self.superblock = Superblock(disk, folder, self.identity.uuid)
        self.superblock.load()
        folded = self.superblock.folded
        self.segments.open_all()
        known = self.steps.load()
        durable = max([place.end for place in known.values()], default=0)
        if folded.start:
            durable = max(durable, folded.start + ALIGN)
        self.scan = Scan(disk, self.segments, self.identity.uuid, self.identity.words)
        self.scanned = self.scan.run(folded.start, durable)
        self.segments.cut(self.scanned.end)
        self.segments.drop_before(folded.start)
        self.segments.remove_strangers()
        self.indexed = self._update_steps(known, self.scanned.commits)
        blocks = BlockTable()
        for header in self.scanned.rows:
            blocks.add(header)
        self.indices = index_of(self.scan, self.segments, self.identity.tables, blocks.all())

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
    scan: Scan, segments: Segments, tables: Sequence[TrainedSpec], blocks: np.ndarray
) -> list[RowIndex]:
    """Where the newest version of every row in `blocks` (BLOCK [n], ascending) lies, table by table."""
    indices = [RowIndex() for _ in tables]
    for block in blocks:
        position, table = int(block["position"]), int(block["table"])
        segment = next(s for s in reversed(segments.all) if s.base <= position)
        ids = scan.ids(segment, position, int(block["count"]), int(block["ids_sum"]))
        indices[table].put(ids, int(block["first_entry"]), stride_of(tables[table].row_bytes))
    return indices
