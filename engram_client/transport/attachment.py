"""What a client has mapped of a daemon's memory, and the views that kernels read it through.

An attachment lasts as long as the connection it came over; a new layout of the arenas gives a new one that
shares the mailbox and the regions that stayed. Whoever reads holds the attachment, so nothing is unmapped
under a kernel, and the last one to let go of it unmaps.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

import numpy as np

from engram_client.arena import requests
from engram_client.arena import shared_read as kernels
from engram_client.arena.layout import ORDER_BITS, ArenaGeometry
from engram_client.arena.mailbox import (
    BY_KEY,
    BY_ROW,
    TOUCH_REGION_SHIFT,
    TOUCH_REGIONS,
    TOUCHES_AT,
    WHOLE,
    MailboxGeometry,
    aligned,
)
from engram_client.arena.mapping import SharedMapping
from engram_client.transport.handoff import (
    CONTROL_BYTES,
    FIXED_DESCRIPTORS,
    HbmNote,
    Layout,
    NoSharedMemory,
    RegionNote,
    TableNote,
)
from engram_client.transport.mailbox import Mailbox

PAGE_BYTES = 4096
STAGED_SHARE = 2  # a look-up that is waited for later takes at most this part of the mailbox's memory
NO_MISSES, NO_COUNT = np.empty(0, np.int64), np.empty(1, np.int64)  # for who takes all or nothing
ViewKey = tuple[str, str, str, tuple[int, int] | None]  # table, generation, address, heads


class MappedRegion:
    """One region of an arena, read-only."""

    def __init__(self, note: RegionNote, descriptor: int) -> None:
        geometry = ArenaGeometry(note.sets, note.record_bytes)
        self.mapping = _mapped(descriptor, aligned(geometry.total_bytes, PAGE_BYTES))
        self.number = note.number
        index = self.mapping.address
        self.words = (
            index,
            index + geometry.index_bytes,
            geometry.sets,
            geometry.slot_bytes,
            note.number % TOUCH_REGIONS << TOUCH_REGION_SHIFT,
        )


class OfferedHbm:
    """An arena in device memory, to be opened by who wants it; a descriptor of it is kept meanwhile."""

    def __init__(self, note: HbmNote, descriptors: list[int]) -> None:
        """Raises OSError, NoSharedMemory."""
        self.note = note
        self.descriptor: int | None = None
        if note.descriptor is None:
            return
        if note.descriptor >= len(descriptors):
            raise NoSharedMemory("its file descriptors did not come along; may this process open more files?")
        self.descriptor = os.dup(descriptors[note.descriptor])
        weakref.finalize(self, os.close, self.descriptor).atexit = False


def _mapped(descriptor: int, size_bytes: int) -> SharedMapping:
    """Read-only. Raises OSError, NoSharedMemory where there is less."""
    _check_size(descriptor, size_bytes)
    return SharedMapping(descriptor, size_bytes, writable=False)


def _check_size(descriptor: int, size_bytes: int) -> None:
    have_bytes = os.fstat(descriptor).st_size
    if have_bytes < size_bytes:
        raise NoSharedMemory(f"{size_bytes} bytes of shared memory were announced, {have_bytes} are there")


class Fixed:
    """What stays for as long as the connection does: the control word and the mailbox."""

    def __init__(self, layout: Layout, descriptors: list[int]) -> None:
        """Raises OSError where memory cannot be mapped, NoSharedMemory."""
        if len(descriptors) < FIXED_DESCRIPTORS:
            raise NoSharedMemory("its file descriptors did not come along; may this process open more files?")
        control, memory, doorbell = descriptors[:FIXED_DESCRIPTORS]
        self.control = _mapped(control, CONTROL_BYTES)
        geometry = MailboxGeometry(layout.touches, layout.data_bytes)
        _check_size(memory, geometry.total_bytes)
        self.mailbox = Mailbox(memory, doorbell, geometry)


class Attachment:
    """One layout, mapped. `view` gives what a look-up needs; unchanging, so it needs no lock."""

    def __init__(
        self, layout: Layout, fixed: Fixed, descriptors: list[int], before: Attachment | None = None
    ) -> None:
        """`descriptors` are those of the regions alone. Raises OSError, NoSharedMemory."""
        self.fixed = fixed
        self.mailbox = fixed.mailbox
        self._serving = layout.serving
        self.request_ids_max = layout.request_ids_max
        known = before._regions if before else {}
        self._regions: dict[int, MappedRegion] = {}
        for note in _regions_of(layout):
            if note.descriptor >= len(descriptors):
                raise NoSharedMemory(
                    "its file descriptors did not come along; may this process open more files?"
                )
            found = known.get(note.number) or MappedRegion(note, descriptors[note.descriptor])
            self._regions[note.number] = found
        self._places = {
            arena.region.record_bytes: tuple(
                self._regions[note.number] for note in (arena.region, arena.old) if note
            )
            for arena in layout.arenas
        }
        self._hbm = {note.record_bytes: OfferedHbm(note, descriptors) for note in layout.hbm}
        self._tables = {(table.name, table.generation): table for table in layout.tables}
        self._views: dict[ViewKey, View | None] = {}

    def hbm_offer(self, name: str, generation: str) -> tuple[OfferedHbm, int] | None:
        """The daemon's arena in device memory with a table's records, and the table's number there."""
        table = self._tables.get((name, generation))
        offered = self._hbm.get(table.entry_bytes) if table is not None else None
        if table is None or offered is None or table.addressing != "record":
            return None
        return offered, table.number

    def view(self, key: ViewKey) -> View | None:
        """How to look up these things here; None where the daemon serves no such table that way."""
        try:
            return self._views[key]
        except KeyError:
            found = self._views[key] = self._make_view(key)
            return found

    def _make_view(self, key: ViewKey) -> View | None:
        name, generation, address, heads = key
        table = self._tables.get((name, generation))
        if table is None or (address == "ngram" and table.addressing != "record"):
            return None
        cached = address == "ngram" or table.addressing == "row"
        regions = self._places.get(table.entry_bytes, ()) if cached else ()
        return View(self, table, address == "ngram", heads, regions, self._serving)


def _regions_of(layout: Layout) -> Iterable[RegionNote]:
    for arena in layout.arenas:
        yield arena.region
        if arena.old:
            yield arena.old


class View:
    """One table, one way of addressing it and one range of heads, in one attachment."""

    def __init__(
        self,
        attachment: Attachment,
        table: TableNote,
        by_key: bool,
        heads: tuple[int, int] | None,
        regions: tuple[MappedRegion, ...],
        serving: int,
    ) -> None:
        start, stop = heads or (0, table.heads if by_key else 1)
        self.mailbox = attachment.mailbox
        self.orders = table.orders if by_key else 1
        self.part_bytes = (stop - start) * table.row_bytes
        by, range_of_heads = BY_KEY if by_key else BY_ROW, start << 32 | stop if heads else 0
        self.request = (table.number, by, range_of_heads)
        self.whole_request = (table.number, by | WHOLE, range_of_heads)
        ids_max = attachment.request_ids_max
        self.entries_max = min(ids_max, self.mailbox.entries_max(self.part_bytes))
        self.staged_max = min(ids_max, self.mailbox.entries_max(self.part_bytes, STAGED_SHARE))
        self._fixed = attachment.fixed  # these two are what the words point to
        self._regions = regions
        words = self.words = np.zeros(kernels.VIEW_WORDS, np.int64)
        words[kernels.CONTROL], words[kernels.SERVING] = attachment.fixed.control.address, serving
        words[kernels.TABLE_OWNER] = table.number << ORDER_BITS
        words[kernels.PART_AT], words[kernels.PART_BYTES] = start * table.row_bytes, self.part_bytes
        words[kernels.MAILBOX], words[kernels.TOUCH_MASK] = self.mailbox.address, self.mailbox.touch_mask
        for at, region in zip((kernels.NEW_REGION, kernels.OLD_REGION), regions, strict=False):
            words[at : at + kernels.REGION_WORDS] = region.words

    @property
    def mappings(self) -> tuple[SharedMapping, ...]:
        """Everything that is only read through the words: the control word, and the regions of the arena."""
        return (self._fixed.control, *(region.mapping for region in self._regions))

    def read(self, ids: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Fill what is cached; the positions of entries that are not, int64, and how many are -1.

        `ids` int64 [n, orders], `out` uint8, both C-contiguous. None where the daemon has told its clients
        to stop.
        """
        misses, counts = np.empty(ids.size, np.int64), np.zeros(1, np.int64)
        rows = out.reshape(len(ids), 1, -1)
        missed = kernels.read_shared(self.words, one_kind_of(ids), rows, misses, counts)
        if missed == kernels.NOT_SERVING:
            return None
        return misses[:missed], int(counts[0])

    def count(self, keys: int, masked: int, hits: int) -> None:
        """Add a look-up with misses to this client's counters, once it was answered."""
        kernels.count_lookup(self.words, keys, masked, hits)


def one_kind_of(ids: np.ndarray) -> np.ndarray:
    """As they are, or a copy where they cannot be written: the kernel is compiled for one kind of array."""
    return ids if ids.flags.carray else ids.copy()


def warm_kernels() -> None:
    """Load or compile what a look-up calls, so that the first one does not."""
    memory, words = np.zeros(TOUCHES_AT // 8, np.int64), np.zeros(kernels.VIEW_WORDS, np.int64)
    timespec = np.zeros(2, np.int64)
    mailbox, scratch = int(memory.ctypes.data), int(timespec.ctypes.data)
    words[kernels.CONTROL] = words[kernels.MAILBOX] = mailbox
    kernels.read_shared(words, np.zeros((0, 1), np.int64), np.zeros((0, 1, 1), np.uint8), NO_MISSES, NO_COUNT)
    kernels.count_lookup(words, 0, 0, 0)
    requests.post(mailbox, 0)
    requests.wait_done(mailbox, 0, mailbox, 0, scratch)
    requests.spread_parts(0, 0, 0, 0, 0)
    requests.end_all_waits(mailbox, mailbox)
