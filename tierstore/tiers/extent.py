"""The record extent: records kept whole in a bounded file, so that one seen before costs one read.

A record that DRAM drops is written here (extent_writer.py) unless it lies here already, in the younger
half of what the file holds. What DRAM misses is looked for here first: the index
(extent_index.py) says where it may lie, pages are read through the same reader, plan and buffers as
rows, and a record counts only if its page's checksum and its whole identity are right
(extent_layout.py). Everything else is a miss, which the row file answers. Nothing here raises for what the
disk does; deadlines excepted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engram_client.arena.layout import ORDER_BITS
from engram_client.deadline import Deadline
from engram_client.errors import StorageError
from tierstore.config import Config, Nvme
from tierstore.devices.base import PageReader, PageReadFailed
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.header import uuid_words
from tierstore.kernels.extent import (
    DAMAGED,
    FOREIGN,
    GOOD,
    UNASKED,
    UNREAD,
    pack_entries,
    take_entries,
    take_unwritten,
)
from tierstore.tiers.counters import Counters
from tierstore.tiers.extent_file import (
    open_extent,
    remove_other_extents,
    set_identity,
    table_identities,
)
from tierstore.tiers.extent_index import ExtentIndex
from tierstore.tiers.extent_layout import ExtentGeometry
from tierstore.tiers.extent_writer import ByteAllowance, ExtentWriter
from tierstore.tiers.plan import Window, plan_pieces
from tierstore.tiers.staging import Staging
from tierstore.tiers.windows import Landing

log = logging.getLogger(__name__)
FOR_INDICES = (
    50  # this part of the budget is for the indices on disk: 1 % of a file, twice while it is written
)


class ExtentRead:
    """One batch of records on its way from the extent. See `Sweep`.

    `keys`, `owners` int64 [n]; record i goes to address `out`, place i. `missing` holds the positions of the
    records that the index does not know; `settle` tells which others did not come.
    """

    def __init__(
        self,
        extent: Extent,
        keys: np.ndarray,
        owners: np.ndarray,
        out: int,
        staging: Staging,
        deadline: Deadline,
        hint: bool,
    ) -> None:
        self._extent = extent
        self._keys, self._owners, self._out = keys, owners, out
        self._staging, self._deadline, self._hint = staging, deadline, hint
        self._sequences = extent.index.probe(keys, owners, extent.writer.oldest)
        self.missing = np.flatnonzero(self._sequences < 0)
        self._fates = np.where(self._sequences < 0, UNASKED, GOOD).astype(np.uint8)
        unwritten = extent.writer.take(self._sequences, keys, owners, out, self._fates)
        extent.counters.add(extent_unwritten=int(np.count_nonzero(self._fates[unwritten] == GOOD)))
        on_disk = self._sequences >= 0
        on_disk[unwritten] = False
        asked = np.flatnonzero(on_disk)
        record_bytes = extent.geometry.record_bytes
        pieces = extent.geometry.pieces(self._sequences[asked], asked * record_bytes)
        run_pages_max = min(extent.run_pages_max, staging.capacity_pages)
        self.plan = plan_pieces(pieces, extent.gap_pages_max, run_pages_max)
        self._wrong_pages: list[int] = []

    def start(self, window: Window, pages: np.ndarray) -> Landing:
        read = self._extent.reader.start(
            self._extent.file.reading.fd,
            window.run_first_pages,
            window.run_page_counts,
            window.run_slots,
            pages.ctypes.data,
            hint=self._hint,
        )
        self._staging.reads.append(read)
        self._extent.counters.add(extent_reads=window.run_first_pages.size)
        return Landing(window, pages, read)

    def finish(self, landing: Landing) -> None:
        """Take the records of a window that came; a window that failed is left to the row file."""
        window, pieces = landing.window, self.plan.pieces
        targets = pieces.targets[window.pieces]
        try:
            landing.read.wait(self._deadline)
        except PageReadFailed as failure:
            self._wrong_pages.append(failure.page)
            self._fates[targets // self._extent.geometry.record_bytes] = UNREAD
            return
        finally:
            self._extent.counters.add(extent_pages=window.pages.size)
        assert pieces.lengths is not None
        take_entries(
            landing.pages, window.page_slots, window.pages, *uuid_words(self._extent.file.uuid),
            window.piece_slots, pieces.page_offsets[window.pieces], pieces.lengths[window.pieces], targets,
            self._extent.geometry.record_bytes, self._keys, self._owners, self._extent.identities,
            self._out, self._fates,
        )  # fmt: skip

    def settle(self) -> np.ndarray:
        """Once all has been read: count, forget what is not there; positions int64 that did not come."""
        fates, oldest = self._fates, self._extent.writer.oldest
        fates[(fates == DAMAGED) & (self._sequences < oldest)] = FOREIGN  # it was being overwritten
        failed = np.flatnonzero(fates > GOOD)
        if failed.size:
            wrong = failed[(fates[failed] != UNREAD) | self._on_wrong_pages(failed)]
            self._extent.index.remove(self._keys[wrong], self._owners[wrong], self._sequences[wrong])
        good = int(np.count_nonzero(fates == GOOD))
        self._extent.counters.add(
            extent_hits=good,
            extent_misses=fates.size - good,
            extent_false=int(np.count_nonzero(fates == FOREIGN)),
            extent_damaged=int(np.count_nonzero(fates == DAMAGED)),
            extent_read_errors=len(self._wrong_pages),
        )
        return failed

    def _on_wrong_pages(self, which: np.ndarray) -> np.ndarray:
        """Whether a page that could not be read holds some of these records, bool [n]."""
        geometry, lost = self._extent.geometry, np.zeros(which.size, bool)
        pieces = geometry.pieces(self._sequences[which], np.arange(which.size) * geometry.record_bytes)
        lost[pieces.targets[np.isin(pieces.pages, self._wrong_pages)] // geometry.record_bytes] = True
        return lost


class Extent:
    """The extent for records of one size. All methods are thread safe."""

    def __init__(self, writer: ExtentWriter, reader: PageReader, counters: Counters, nvme: Nvme) -> None:
        self.writer, self.file, self.index = writer, writer.file, writer.index
        self.identities, self.geometry = writer.identities, writer.file.geometry
        self.reader, self.counters = reader, counters
        self.gap_pages_max, self.run_pages_max = nvme.coalesce_gap_pages, nvme.run_pages_max

    def read(
        self,
        keys: np.ndarray,
        owners: np.ndarray,
        out: int,
        staging: Staging,
        deadline: Deadline,
        *,
        hint: bool,
    ) -> ExtentRead:
        """Look for records; the index is asked at once, the rest is done by `read_windows`."""
        return ExtentRead(self, keys, owners, out, staging, deadline, hint)

    def warm_up(self) -> None:
        """Call the kernels with nothing."""
        none, pages = np.zeros(0, np.int64), np.zeros((1, PAGE_BYTES // 8), np.uint64)
        self.index.insert(none, 0, 0)
        self.index.remove(none, none, none)
        self.index.withdraw(none, 0, 0)
        take_unwritten(
            pages.ctypes.data, self.geometry.shape, none, none, none, none, self.identities, 0,
            np.zeros(0, np.uint8),
        )  # fmt: skip
        pack_entries(
            pages.ctypes.data, 0, self.geometry.shape, none, none, self.identities, 0, none, none
        )  # fmt: skip
        take_entries(
            pages, none, none, *uuid_words(self.file.uuid), none, none, none, none,
            self.geometry.record_bytes, none, none, self.identities, 0, np.zeros(0, np.uint8),
        )  # fmt: skip

    def offer(self, keys: np.ndarray, owners: np.ndarray, source: int) -> None:
        """Keep records that DRAM does not; record i lies at address `source`, place i; key -1 is none."""
        half_way = self.writer.oldest + self.geometry.slots // 2
        known = self.index.probe(keys, owners, half_way)
        kept = self.identities[owners >> ORDER_BITS].any(axis=1)
        chosen = np.flatnonzero((keys >= 0) & kept & (known < 0))
        if chosen.size:
            self.writer.offer(keys[chosen], owners[chosen], source, chosen)


class ExtentTier:
    """One extent for each record size that gains by it."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        table_bytes: Mapping[int, int],
        generations: Mapping[int, str | None],
        reader: PageReader,
        counters: Counters,
    ) -> None:
        """An extent that cannot be had is said once and done without.

        `table_bytes`: for each record size, bytes of the tables whose records are kept; `generations`:
        of all tables, by their number in this process; None for those that are not kept.
        """
        self._extents: dict[int, Extent] = {}
        self._identities = table_identities(generations)
        budget = config.extent.budget_bytes
        if not budget or not table_bytes:
            return
        identities, total = self._identities, sum(table_bytes.values())
        least = max(ExtentGeometry(record_bytes, 0).group_bytes for record_bytes in table_bytes)
        allowance = ByteAllowance(config.extent.write_bytes_per_s, least)
        buffer_bytes = config.extent.write_buffer_bytes // len(table_bytes)
        try:
            remove_other_extents(folder, table_bytes)
            for record_bytes, size in table_bytes.items():
                share = (budget - budget // FOR_INDICES) * size // total
                if geometry := ExtentGeometry.within(share, record_bytes):
                    index = ExtentIndex(geometry, identities)
                    file = open_extent(folder, geometry, index, config.nvme.direct)
                    writer = ExtentWriter(
                        file, index, identities, allowance, counters,
                        buffer_bytes=buffer_bytes, period_s=config.extent.period_s,
                    )  # fmt: skip
                    self._extents[record_bytes] = Extent(writer, reader, counters, config.nvme)
                else:
                    log.warning("extent.budget_bytes leaves no room for records of %d bytes", record_bytes)
        except (StorageError, OSError) as error:
            log.error(
                "a record extent in %s cannot be had: %s; serving goes on, records that DRAM drops cost a "
                "read for each of their rows",
                folder,
                error,
            )

    def take_up(self, number: int, generation: str | None) -> bool:
        """Know one table more, before anything of it is read; False where there are too many.

        Its records are kept where there is an extent of their size and `generation` is given.
        """
        if number >= len(self._identities):
            return False
        set_identity(self._identities, number, generation)
        return True

    def extent(self, record_bytes: int) -> Extent | None:
        """Where records of this size are kept; None where they are not."""
        return self._extents.get(record_bytes)

    @property
    def capacity_bytes(self) -> int:
        return sum(e.geometry.file_bytes for e in self._extents.values())

    @property
    def index_bytes(self) -> int:
        return sum(e.index.total_bytes for e in self._extents.values())

    def warm_up(self) -> None:
        """Have every kernel compiled before it is needed; touches nothing."""
        for extent in self._extents.values():
            extent.warm_up()

    def flush(self) -> None:
        """Wait until all that was offered is written or dropped; for tests and benchmarks."""
        for extent in self._extents.values():
            extent.writer.flush()

    def close(self) -> None:
        """Write what there is, and the indices."""
        for extent in self._extents.values():
            extent.writer.close()
        self.close_files()

    def close_files(self) -> None:
        for extent in self._extents.values():
            extent.file.close()
