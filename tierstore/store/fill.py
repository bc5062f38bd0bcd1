"""Serving what DRAM does not hold: claim, read, put records together, hand them out, admit them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.kernels.distinct import find_distinct
from tierstore.kernels.rows import copy_parts, derive_row_ids
from tierstore.store.in_flight import Claim, InFlight, wait_for
from tierstore.store.table import Access
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.extent import Extent, ExtentTier
from tierstore.tiers.nvme import NvmeTier
from tierstore.tiers.staging import Staging, StagingPool
from tierstore.tiers.windows import Sweep

# Planned at once: a plan takes memory, and these keep a disk busy for about a second.
UNCACHED_ROWS_MAX = 1 << 16


@dataclass(frozen=True)
class Wanted:
    """The distinct records behind a batch of missing entries."""

    positions: np.ndarray  # of the entries in the request, int64 [n], those of one record together
    inverse: np.ndarray  # which record each entry wants, int64 [n], ascending
    entries: np.ndarray  # key or row id of each record, int64 [m]
    owners: np.ndarray  # int64 [m]

    def parts(self, records_max: int) -> Iterator[Wanted]:
        """The same records, so many at a time, each with its entries."""
        for start in range(0, self.entries.size, records_max):
            stop = start + records_max
            low, high = np.searchsorted(self.inverse, (start, stop))
            yield Wanted(
                self.positions[low:high],
                self.inverse[low:high] - start,
                self.entries[start:stop],
                self.owners[start:stop],
            )


def distinct_records(access: Access, ids: np.ndarray, positions: np.ndarray) -> Wanted:
    """Find the distinct records behind `ids[positions]`; `ids` int64, flat."""
    entries, owners = ids[positions], access.owners(positions)
    places = np.full(1 << max(4, int(2 * entries.size - 1).bit_length()), -1, np.int64)
    first, inverse = np.empty_like(entries), np.empty_like(entries)
    count = find_distinct(entries, owners, places, first, inverse)
    first = first[:count]
    by_record = np.argsort(inverse, kind="stable")
    return Wanted(positions[by_record], inverse[by_record], entries[first], owners[first])


class Filler:
    """Brings missing records from NVMe, at most a staging buffer's worth at a time."""

    def __init__(
        self,
        nvme: NvmeTier,
        extents: ExtentTier,
        staging: StagingPool,
        in_flight: InFlight,
        counters: Counters,
    ) -> None:
        self._nvme = nvme
        self._extents = extents
        self._staging = staging
        self._in_flight = in_flight
        self._counters = counters

    def warm_up(self) -> None:
        """Call the kernels with nothing."""
        none, one = np.zeros(0, np.int64), np.ones((1, 1), np.int64)
        find_distinct(none, none, np.full(1, -1, np.int64), none, none)
        derive_row_ids(none, none, one, one, np.zeros((0, 1), np.int64))
        copy_parts(0, none, 0, 0, 0, none, 0)
        with self._in_flight.claim(none, none):
            self._nvme.warm_up()
        self._extents.warm_up()

    def fill(
        self,
        access: Access,
        arena: Arena | None,
        ids: np.ndarray,
        misses: np.ndarray,
        out: int | None,
        deadline: Deadline,
    ) -> None:
        """Serve the entries `ids[misses]`; with `out` None the records only go to DRAM."""
        if arena is None and out is not None and self._extent(access) is None:
            self._read_uncached(access, ids, misses, out, deadline)
            return
        records_max = self._staging.record_bytes // access.entry_bytes
        while misses.size:
            wanted = distinct_records(access, ids, misses)
            parts = wanted.parts(records_max)
            left = [self._fill_part(access, arena, part, ids, out, deadline) for part in parts]
            misses = np.concatenate(left)

    def _read_uncached(
        self, access: Access, ids: np.ndarray, misses: np.ndarray, out: int, deadline: Deadline
    ) -> None:
        """Read what nobody keeps straight to where it is wanted, and of a record only the heads asked for."""
        row_bytes = access.table.spec.row_bytes
        part_at, part_bytes = access.part
        heads = slice(part_at // row_bytes, (part_at + part_bytes) // row_bytes)
        inside = np.arange(0, part_bytes, row_bytes)
        entries_max = max(1, UNCACHED_ROWS_MAX // inside.size)
        for start in range(0, misses.size, entries_max):
            positions = misses[start : start + entries_max]
            rows = access.row_ids(ids[positions], access.owners(positions))[:, heads].ravel()
            targets = (positions[:, None] * part_bytes + inside).ravel()
            with self._staging.take(deadline) as staging:
                self._nvme.read_rows(
                    access.table.row_file,
                    access.table.file,
                    rows,
                    targets,
                    out,
                    staging,
                    deadline,
                    hint=False,
                )
            self._counters.add(records_read=positions.size)

    def _extent(self, access: Access) -> Extent | None:
        """Where the entries of a request are kept whole, if they are."""
        return self._extents.extent(access.entry_bytes) if access.in_extent else None

    def _fill_part(
        self,
        access: Access,
        arena: Arena | None,
        wanted: Wanted,
        ids: np.ndarray,
        out: int | None,
        deadline: Deadline,
    ) -> np.ndarray:
        """Serve what nobody else is reading, then look again for the rest; returns what is left."""
        with self._staging.take(deadline) as staging:
            if arena is None:
                everything = np.ones(wanted.entries.size, bool)
                self._read(access, None, wanted, everything, staging, out, deadline)
                return wanted.positions[:0]
            with self._in_flight.claim(wanted.entries, wanted.owners, hint=out is None) as claim:
                self._read(access, arena, wanted, claim.mine, staging, out, deadline)
        return self._look_again(access, arena, wanted, claim, ids, out, deadline)

    def _read(
        self,
        access: Access,
        arena: Arena | None,
        wanted: Wanted,
        mine: np.ndarray,
        staging: Staging,
        out: int | None,
        deadline: Deadline,
    ) -> None:
        """Read records into the staging buffer; hand out the parts asked for; admit."""
        entries, owners = wanted.entries[mine], wanted.owners[mine]
        if not entries.size:
            return
        pages = self._bring(access, entries, owners, staging, deadline, hint=out is None)
        if arena is not None:
            arena.note_pages(pages)
        records = staging.records.ctypes.data
        if out is not None:
            place_of = np.cumsum(mine) - 1
            served = mine[wanted.inverse]
            places = place_of[wanted.inverse[served]]
            copy_parts(records, places, access.entry_bytes, *access.part, wanted.positions[served], out)
        self._keep(access, arena, entries, owners, records, wanted_soon=out is None)

    def _bring(
        self,
        access: Access,
        entries: np.ndarray,
        owners: np.ndarray,
        staging: Staging,
        deadline: Deadline,
        *,
        hint: bool,
    ) -> int:
        """Put records together in the staging buffer: whole from the extent, or from their rows.

        Returns how many pages that takes, where no two rows share one.
        """

        def read_rows(which: np.ndarray, beside: tuple[Sweep, ...] = ()) -> int:
            row_ids = access.row_ids(entries[which], owners[which])
            inside = np.arange(row_ids.shape[1]) * table.spec.row_bytes
            targets = which[:, None] * access.entry_bytes + inside
            self._nvme.read_rows(
                table.row_file, table.file, row_ids.ravel(), targets.ravel(), records, staging, deadline,
                hint=hint, beside=beside,
            )  # fmt: skip
            self._counters.add(records_read=which.size)
            return row_ids.size

        table, records = access.table, staging.records.ctypes.data
        extent = self._extent(access)
        if extent is None:
            return read_rows(np.arange(entries.size))
        found = extent.read(entries, owners, records, staging, deadline, hint=hint)
        pages = entries.size - found.missing.size + read_rows(found.missing, (found,))
        failed = found.settle()
        return pages + (read_rows(failed) if failed.size else 0)

    def _keep(
        self,
        access: Access,
        arena: Arena | None,
        entries: np.ndarray,
        owners: np.ndarray,
        records: int,
        *,
        wanted_soon: bool,
    ) -> None:
        """Admit records to DRAM, and let the extent have what DRAM drops for them."""
        extent = self._extents.extent(access.entry_bytes) if access.cached else None
        places = np.arange(entries.size)
        if arena is not None and extent is None:
            arena.admit(entries, owners, records, places, wanted_soon=wanted_soon)
        elif arena is not None:
            arena.exchange(entries, owners, records, places, wanted_soon=wanted_soon)
        if extent is not None:
            extent.offer(entries, owners, records)

    def _look_again(
        self,
        access: Access,
        arena: Arena,
        wanted: Wanted,
        claim: Claim,
        ids: np.ndarray,
        out: int | None,
        deadline: Deadline,
    ) -> np.ndarray:
        """Entries that others were reading: by now most are in DRAM."""
        if not claim.others:
            return wanted.positions[:0]
        left = wanted.positions[~claim.mine[wanted.inverse]]
        self._counters.add(in_flight_waits=left.size)
        ended = wait_for(claim.others, deadline, hint=out is None)
        left = read_scattered(access, arena, ids, left, out)
        if ended or not left.size:
            return left
        self._read_alone(access, arena, distinct_records(access, ids, left), out, deadline)
        return left[:0]

    def _read_alone(
        self, access: Access, arena: Arena, wanted: Wanted, out: int | None, deadline: Deadline
    ) -> None:
        """Read what a hint is reading too: it takes longer than the demand can wait."""
        self._counters.add(hints_overtaken=wanted.entries.size)
        with self._staging.take(deadline) as staging:
            everything = np.ones(wanted.entries.size, bool)
            self._read(access, arena, wanted, everything, staging, out, deadline)


def read_scattered(
    access: Access, arena: Arena, ids: np.ndarray, positions: np.ndarray, out: int | None
) -> np.ndarray:
    """Look for single entries in DRAM, one order at a time; returns the positions still missing."""
    part_at, part_bytes = access.part if out is not None else (0, 0)
    found = np.empty((positions.size, part_bytes), np.uint8)
    missing = np.zeros(positions.size, bool)
    orders = access.orders_of(positions)
    for order in range(access.orders):
        chosen = np.flatnonzero(orders == order)
        rows = np.empty((chosen.size, part_bytes), np.uint8)
        owner = access.table.owner + order
        lost, _ = arena.read(ids[positions[chosen]], owner, 1, (part_at, part_bytes), rows.ctypes.data)
        found[chosen] = rows
        missing[chosen[lost]] = True
    have = np.flatnonzero(~missing)
    if out is not None:
        copy_parts(found.ctypes.data, have, part_bytes, 0, part_bytes, positions[have], out)
    return positions[missing]
