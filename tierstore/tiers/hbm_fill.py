"""Rows from NVMe straight into device memory, past DRAM: in bulk, one sorted sweep over many records.

Filling a hot set record by record reads each page as often as records want it and copies each row twice. Here
all rows that are wanted are sorted, near pages are joined into runs of up to megabytes, and the pages travel:

    pinned    io_uring or pread -> pinned memory -> one copy a window -> device
    direct    cuFile, from the disk's controller into device memory (GPUDirect Storage)

Either way the device checks every page's checksum and copies the rows out of it (hbm_pages.py). A window is
read while the device works on the one before. Nothing is waited for but reads, and, at the very end, whether
all pages were good: rows count only then. Pages that were not, or could not be read, are read once more by
themselves; then it is an error that names page, file and rows.

`direct` is taken where a probe found that it is real and the runs are long: each of its reads goes through
Python (tierstore/devices/gds.py). Should it fail or hang while serving, it is left for good, which is said
once, and `pinned` serves.

Checked on CPU tensors against the row file, with a stand-in for kvikio; not yet run on a GPU.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, DeadlineExceeded, StorageError
from engram_client.gpu import Event, pinned_bytes, record_current
from engram_client.gpu.probe import out_of_memory
from engram_client.gpu.streams import HOST_EVENT
from tierstore.devices.base import PageRead, PageReader, PageReadFailed
from tierstore.devices.files import OpenFile
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.rowfile import RowFile
from tierstore.tiers.counters import Counters
from tierstore.tiers.hbm_pages import PAGE_WORDS, bad_pages, gather_rows
from tierstore.tiers.nvme import corrupt_page, unreadable_page
from tierstore.tiers.plan import ReadPlan, Window, plan_reads

log = logging.getLogger(__name__)
HALVES = 2
LOOK_AGAIN_S = 0.05
_hanging: list[Way] = []  # never used again, and never freed: reads that hang may still write there


class Way:
    """How pages come into device memory: a reader, where it reads to, and what is left to do after that.

    name:  as the log and records say it
    pages: int64 [HALVES, capacity, 512] on the device
    """

    def __init__(self, name: str, reader: PageReader, device: torch.device, capacity_pages: int) -> None:
        """Raises BadRequest where there is no memory for the pages."""
        self.name, self._reader = name, reader
        try:
            with torch.inference_mode(False):
                shape = (HALVES, capacity_pages, PAGE_WORDS)
                self.pages = torch.empty(shape, dtype=torch.int64, device=device)
        except RuntimeError as error:
            raise BadRequest(
                f"{device} has no {HALVES * capacity_pages * PAGE_BYTES} bytes to land pages in: "
                f"{str(error).partition(chr(10))[0]}; lower hbm.staging_bytes or the HBM budget"
            ) from error
        self._free: list[Event] = [HOST_EVENT] * HALVES  # when the device has done with each half
        self._reads: list[PageRead] = []

    @property
    def capacity_pages(self) -> int:
        """Of one half."""
        return self.pages.shape[1]

    def start(self, fd: int, window: Window, half: int) -> PageRead:
        """Begin to read a window, once the device has done with what was in its half."""
        self._free[half].synchronize()
        runs = (window.run_first_pages, window.run_page_counts, window.run_slots)
        return self._reader.start(fd, *runs, self._address(half), hint=False, reads=self._reads)

    def let_end(self) -> None:
        """Begin nothing more; what is under way still writes into the pages until `at_rest`."""
        for read in self._reads:
            read.withdraw()

    def at_rest(self) -> bool:
        """Whether nothing is being read into the pages, or into the memory in front of them."""
        self._reads = [read for read in self._reads if not read.ended()]
        return not self._reads

    def wait_for_rest(self, deadline: Deadline) -> None:
        """Before its pages may be used anew, after somebody gave up. Raises DeadlineExceeded."""
        while not self.at_rest():
            deadline.check("waiting for reads that an earlier request gave up")
            time.sleep(LOOK_AGAIN_S)

    def _address(self, half: int) -> int:
        return self.pages[half].data_ptr()

    def bring(self, half: int, pages: int) -> Tensor:
        """The first `pages` slots of a half, which have been read: int64 [pages, 512] on the device."""
        return self.pages[half, :pages]

    def done_with(self, half: int) -> None:
        """The device has been given all that it does with a half."""
        self._free[half] = record_current(self.pages.device)


class PinnedWay(Way):
    """By a reader into host memory, and one copy."""

    def __init__(self, reader: PageReader, device: torch.device, capacity_pages: int) -> None:
        super().__init__("pinned", reader, device, capacity_pages)
        memory = pinned_bytes(HALVES * capacity_pages * PAGE_BYTES, device)
        self._host = memory.view(torch.int64).view(self.pages.shape)

    def _address(self, half: int) -> int:
        return self._host[half].data_ptr()

    def bring(self, half: int, pages: int) -> Tensor:
        there = super().bring(half, pages)
        there.copy_(self._host[half, :pages], non_blocking=True)
        return there


class DirectWay(Way):
    """By cuFile into device memory: `reader` takes addresses there."""

    def __init__(self, reader: PageReader, device: torch.device, capacity_pages: int) -> None:
        super().__init__("direct", reader, device, capacity_pages)


@dataclass(frozen=True)
class Bulk:
    """What one call of `read_rows` wants."""

    table: RowFile
    file: OpenFile
    row_ids: np.ndarray
    targets: np.ndarray
    out: Tensor
    deadline: Deadline

    def part(self, which: np.ndarray) -> Bulk:
        """Only the rows `which`, int64."""
        return Bulk(self.table, self.file, self.row_ids[which], self.targets[which], self.out, self.deadline)


class DeviceFill:
    """Reads rows in bulk into tensors of one device; one call at a time.

    Raises BadRequest where the device has no memory for pages. `make_direct(capacity_pages)` gives the direct
    way, or None where there is none; it is asked when runs are first long enough, as the probe takes a while.
    """

    def __init__(
        self,
        reader: PageReader,
        counters: Counters,
        device: torch.device,
        *,
        staging_bytes: int,
        gap_pages_max: int,
        run_pages_max: int,
        direct_run_bytes: int,
        direct_timeout_s: float,
        make_direct: Callable[[int], DirectWay | None],
    ) -> None:
        self.device = device
        self._counters = counters
        capacity = max(1, staging_bytes // PAGE_BYTES // HALVES)
        self._pinned = PinnedWay(reader, device, capacity)
        self._make_direct, self._tried = make_direct, False
        self._direct: DirectWay | None = None
        self._gap_pages_max, self._run_pages_max = gap_pages_max, min(run_pages_max, capacity)
        self._direct_run_bytes, self._direct_timeout_s = direct_run_bytes, direct_timeout_s
        self._using = threading.Lock()
        self._unreadable: StorageError | None = None  # of the last sweep

    def read_rows(
        self, table: RowFile, file: OpenFile, row_ids: np.ndarray, targets: np.ndarray, out: Tensor,
        deadline: Deadline,
    ) -> str:  # fmt: skip
        """Row `row_ids[i]` goes to row `targets[i]` of `out`, uint8 [k, row_bytes] on the device, contiguous.

        row_ids and targets int64 [n]. Returns the way that was taken, in a word. Raises StorageError or
        DataCorrupt naming file, page and rows, DeadlineExceeded, BadRequest for rows larger than a page;
        then the content of `out` is undefined.
        """
        if table.geometry.epochs:
            raise BadRequest(
                f"table {table.spec.name!r} is in training: its pages have epochs, which are not checked on "
                "a device; look its rows up"
            )
        if not table.geometry.rows_per_page:
            raise BadRequest(
                f"table {table.spec.name!r}: rows of {table.geometry.row_bytes} bytes are larger than a page "
                "and are not read in bulk; look them up"
            )
        if not row_ids.size:
            return "none"
        bulk = Bulk(table, file, row_ids, targets, out, deadline)
        left_s = deadline.remaining_s()
        if not self._using.acquire(timeout=-1 if left_s is None else left_s):
            raise deadline.exceeded("waiting for another read in bulk")
        try:
            return self._read(bulk)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise BadRequest(
                f"{self.device} ran out of memory while {row_ids.size} rows were read in bulk: "
                f"{str(error).partition(chr(10))[0]}; ask for fewer at a time"
            ) from error
        finally:
            self._using.release()

    def _read(self, bulk: Bulk) -> str:
        plan = self._plan(bulk, self._gap_pages_max, self._run_pages_max)
        way = self._way_for(plan)
        self._counters.add(nvme_rows=bulk.row_ids.size, nvme_pages=plan.pages.size)
        if way is not self._pinned:
            failed = self._try_direct(bulk, plan, way)
            if not failed.size:
                return way.name
            bulk, way = bulk.part(failed), self._pinned
            plan = self._plan(bulk, self._gap_pages_max, self._run_pages_max)
        failed = self._sweep(bulk, plan, way)
        if failed.size:
            self._again(bulk.part(failed))
        return way.name

    def _plan(self, bulk: Bulk, gap_pages_max: int, run_pages_max: int) -> ReadPlan:
        """Of pieces whose targets are places in `bulk.row_ids`."""
        places = np.arange(bulk.row_ids.size)
        geometry = bulk.table.geometry
        return plan_reads(
            geometry, bulk.row_ids, places, gap_pages_max=gap_pages_max, run_pages_max=run_pages_max
        )

    def _way_for(self, plan: ReadPlan) -> Way:
        run_bytes = int(plan.run_page_counts.sum()) * PAGE_BYTES // plan.run_page_counts.size
        if run_bytes < self._direct_run_bytes:
            return self._pinned
        if not self._tried:
            self._tried = True
            self._direct = self._make_direct(self._pinned.capacity_pages)
        return self._direct or self._pinned

    def _try_direct(self, bulk: Bulk, plan: ReadPlan, way: Way) -> np.ndarray:
        """As `_sweep`; what it does not do in time, and all later reads, are done the other way."""
        left_s = bulk.deadline.remaining_s()
        patience = Deadline.after(min(self._direct_timeout_s, math.inf if left_s is None else left_s))
        try:
            failed = self._sweep(bulk, plan, way, patience)
            if not failed.size:
                return failed
            told = f"{failed.size} of {bulk.row_ids.size} rows did not arrive whole"
        except DeadlineExceeded as error:
            bulk.deadline.check("reading rows in bulk")
            told, failed = str(error), np.arange(bulk.row_ids.size)
        log.warning(
            "GPUDirect Storage is not used any more (%s): pages go through pinned memory and one copy", told
        )
        self._direct = None
        if not way.at_rest():
            _hanging.append(way)
        return failed

    def _sweep(self, bulk: Bulk, plan: ReadPlan, way: Way, patience: Deadline | None = None) -> np.ndarray:
        """Work off a plan; the places in `row_ids` of rows whose pages were not good, int64."""
        uuid = torch.from_numpy(np.array(bulk.table.uuid_words, np.uint64).view(np.int64)).to(self.device)
        targets = torch.from_numpy(bulk.targets).to(self.device)
        self._unreadable = None
        checked: list[Tensor] = []  # bool, of the plan's wanted pages in order
        unread: list[np.ndarray] = []
        landing: list[tuple[Window, int, PageRead]] = []

        def finish(window: Window, half: int, read: PageRead) -> None:
            try:
                read.wait(patience or bulk.deadline)
            except PageReadFailed as failure:
                self._counters.add(nvme_read_errors=1)
                self._unreadable = unreadable_page(bulk.table, failure)
                unread.append(plan.pieces.targets[window.pieces])
                checked.append(torch.zeros(window.pages.size, dtype=torch.bool, device=self.device))
                return
            checked.append(self._use(window, plan, way, half, uuid, targets, bulk.out))

        way.wait_for_rest(patience or bulk.deadline)
        try:
            for number, window in enumerate(plan.windows(way.capacity_pages)):
                if len(landing) == HALVES:
                    finish(*landing.pop(0))
                self._counters.add(
                    nvme_reads=window.run_first_pages.size, nvme_bytes=window.pages_read * PAGE_BYTES
                )
                half = number % HALVES
                landing.append((window, half, way.start(bulk.file.fd, window, half)))
            while landing:
                finish(*landing.pop(0))
        finally:
            way.let_end()
        bad = torch.cat(checked).cpu().numpy()  # the one wait for the device
        wrong = plan.pieces.targets[bad[plan.piece_page]]
        if wrong.size:
            self._counters.add(nvme_checksum_failures=int(bad.sum()))
        return np.concatenate([wrong, *unread])

    def _use(
        self, window: Window, plan: ReadPlan, way: Way, half: int, uuid: Tensor, targets: Tensor, out: Tensor
    ) -> Tensor:
        """Check the wanted pages of a window that has landed and copy their rows; which are bad."""

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

        pages = way.bring(half, window.pages_read)
        bad = bad_pages(pages, on_device(window.page_slots), on_device(window.pages), uuid)
        rows = on_device(plan.pieces.targets[window.pieces])
        gather_rows(
            pages, on_device(window.piece_slots), on_device(plan.pieces.page_offsets[window.pieces]),
            targets.index_select(0, rows), out, out.shape[1],
        )  # fmt: skip
        way.done_with(half)
        return bad

    def _again(self, bulk: Bulk) -> None:
        """Each page by itself, the plain way; a second failure is an error."""
        geometry = bulk.table.geometry
        pages = geometry.first_page + bulk.row_ids // geometry.rows_per_page
        for page in np.unique(pages).tolist():
            part = bulk.part(np.flatnonzero(pages == page))
            if self._sweep(part, self._plan(part, 0, 1), self._pinned).size:
                raise self._unreadable or corrupt_page(bulk.table, page)
