"""Writing records into an extent, one after another, round and round, in the background.

Records are copied into a write buffer, which answers for them until they are written: what DRAM has just
dropped is the likeliest to be asked for again. A full buffer is sealed and written in one go by a thread.
Before a group is overwritten its old records count as gone.
Nobody waits for a write: what finds no free buffer, or would exceed the configured bytes a second, is
dropped and counted. A disk that refuses a write ends writing, not serving.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from engram_client.errors import StorageError
from tierstore.format.direct import aligned_bytes, write_all
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.header import uuid_words
from tierstore.kernels.checksum import seal_pages
from tierstore.kernels.extent import pack_entries, take_unwritten
from tierstore.tiers.counters import Counters
from tierstore.tiers.extent_file import ExtentFile
from tierstore.tiers.extent_index import ExtentIndex

log = logging.getLogger(__name__)
BUFFERS = 32  # of a quarter of a MiB by default: large writes, and little that waits in a buffer half full
Clock = Callable[[], float]


class ByteAllowance:
    """So many bytes a second on average, at most a second's worth saved up. Thread safe."""

    def __init__(self, bytes_per_s: int, least: int, clock: Clock = time.monotonic) -> None:
        """`least`: what can be saved up however low the rate is, or nothing would ever be allowed."""
        self._rate = bytes_per_s
        self._most = float(max(bytes_per_s, least))
        self._left = self._most
        self._clock = clock
        self._at = clock()
        self._changing = threading.Lock()

    def take(self, units: int, unit_bytes: float) -> int:
        """How many of `units` may be written now; they are."""
        with self._changing:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._at) * self._rate)
            self._at = now
            taken = min(units, max(0, int(self._left // unit_bytes)))
            self._left -= taken * unit_bytes
        return taken

    def spend(self, count: int) -> None:
        """Bytes that were written in any case."""
        with self._changing:
            self._left -= count


class WriteBuffer:
    """Pages for records `first`, `first + 1`, ..., of which `count` are there and `room` fit."""

    def __init__(self, pages: int, records: int) -> None:
        self.pages = aligned_bytes(pages * PAGE_BYTES).view(np.uint64).reshape(pages, -1)
        self.hashes = np.empty(records, np.int64)
        self.first = self.count = self.room = 0


class ExtentWriter:
    """The buffers and the thread of one extent. All methods are thread safe."""

    def __init__(
        self,
        file: ExtentFile,
        index: ExtentIndex,
        identities: np.ndarray,
        allowance: ByteAllowance,
        counters: Counters,
        *,
        buffer_bytes: int,
        period_s: float,
    ) -> None:
        """`buffer_bytes` of memory at most, if that is enough for two groups of records."""
        self.file, self.index, self.identities = file, index, identities
        g = self._geometry = file.geometry
        self._allowance, self._counters, self._period_s = allowance, counters, period_s
        buffers = max(2, min(BUFFERS, buffer_bytes // g.group_bytes))
        groups = max(1, min(buffer_bytes // buffers // g.group_bytes, g.groups // buffers))
        self._buffer_records = groups * g.group.records
        self._free = [WriteBuffer(groups * g.group.pages, self._buffer_records) for _ in range(buffers)]
        self._filling: WriteBuffer | None = None
        self._full: deque[WriteBuffer] = deque()
        self._unwritten: deque[WriteBuffer] = deque()  # the one being written, the full ones, the one filled
        self._next = file.next_sequence
        self._broken = self._closing = self._busy = self._unsaved = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tierstore-extent", daemon=True)
        self._thread.start()

    @property
    def oldest(self) -> int:
        """Sequence of the oldest record that nobody overwrites or has overwritten."""
        return self._next - self._geometry.slots

    def offer(self, keys: np.ndarray, owners: np.ndarray, source: int, places: np.ndarray) -> None:
        """Keep what can be kept; record i lies at address `source`, place `places[i]`."""
        record_bytes = self._geometry.bytes_per_record
        allowed = 0 if self._broken else self._allowance.take(keys.size, record_bytes)
        done = 0
        while done < allowed:
            part = slice(done, allowed)
            copied = self._copy(keys[part], owners[part], source, places[part])
            if not copied:
                break
            done += copied
        self._counters.add(extent_dropped=keys.size - done)

    def _copy(self, keys: np.ndarray, owners: np.ndarray, source: int, places: np.ndarray) -> int:
        """Fill one buffer as far as these records go; how many went in."""
        with self._changed:
            buffer = self._buffer()
            if buffer is None:
                return 0
            count = min(keys.size, buffer.room - buffer.count)
            pack_entries(
                buffer.pages.ctypes.data, buffer.count, self._geometry.shape, keys[:count], owners[:count],
                self.identities, source, places[:count], buffer.hashes,
            )  # fmt: skip
            self.index.insert(buffer.hashes[buffer.count :], buffer.first + buffer.count, count)
            buffer.count += count
            if buffer.count == buffer.room:
                self._hand_over()
            return count

    def _buffer(self) -> WriteBuffer | None:
        """The buffer that is being filled; a new one ends where the file does."""
        if self._filling is None and self._free and not self._closing:
            buffer = self._filling = self._free.pop()
            buffer.first, buffer.count = self._next, 0
            slots = self._geometry.slots
            buffer.room = min(self._buffer_records, slots - self._next % slots)
            self._unwritten.append(buffer)
        return self._filling

    def take(
        self, sequences: np.ndarray, keys: np.ndarray, owners: np.ndarray, out: int, fates: np.ndarray
    ) -> np.ndarray:
        """Copy records that are not written yet; positions int64 of those that were here.

        Record i goes to address `out`, place i. `fates` uint8 [n] tells which are another's.
        """
        taken = np.zeros(sequences.size, bool)
        with self._changed:
            first = self._unwritten[0].first if self._unwritten else self._next
            recent = np.flatnonzero(sequences >= first)
            for buffer in self._unwritten if recent.size else ():
                places = sequences[recent] - buffer.first
                here = (places >= 0) & (places < buffer.count)
                take_unwritten(
                    buffer.pages.ctypes.data, self._geometry.shape, places[here], recent[here], keys, owners,
                    self.identities, out, fates,
                )  # fmt: skip
                taken[recent[here]] = True
        return np.flatnonzero(taken)

    def _hand_over(self) -> None:
        """Let the thread write what there is; from now on its place in the file is its own."""
        buffer, self._filling = self._filling, None
        if buffer is not None:
            records = self._geometry.group.records
            self._next = buffer.first + -(-buffer.count // records) * records
            self._full.append(buffer)
            self._changed.notify_all()

    def _work(self) -> None:
        due = time.monotonic() + self._period_s
        while True:
            with self._changed:
                left_s = max(0.0, due - time.monotonic())
                self._changed.wait_for(lambda: self._full or self._closing, left_s)
                is_due = time.monotonic() >= due
                if is_due or self._closing:
                    self._hand_over()
                buffer = self._full.popleft() if self._full else None
                self._busy, closing = buffer is not None, self._closing
            if buffer:
                self._write(buffer)
            if is_due or (closing and not buffer):
                self._save()
                due = time.monotonic() + self._period_s
            if closing and not buffer:
                return

    def _write(self, buffer: WriteBuffer) -> None:
        g, written = self._geometry, 0
        pages = buffer.pages[: -(-buffer.count // g.group.records) * g.group.pages]
        if not self._broken:
            page = g.group_page(buffer.first)
            seal_pages(pages, page, *uuid_words(self.file.uuid), 0, len(pages))
            try:
                data = pages.reshape(-1).view(np.uint8)
                write_all(self.file.write_fd, self.file.path, data, page * PAGE_BYTES)
                written = buffer.count
            except (StorageError, OSError) as error:
                self._give_up(error)
        if written:
            self._allowance.spend(int(pages.nbytes - written * g.bytes_per_record))  # a group begun
            self._unsaved = True
        else:
            self.index.withdraw(buffer.hashes, buffer.first, buffer.count)
        self._counters.add(
            extent_written=written,
            extent_dropped=buffer.count - written,
            extent_bytes_written=pages.nbytes if written else 0,
        )
        with self._changed:
            self._unwritten.popleft()
            self._free.append(buffer)
            self._busy = False
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        log.error(
            "the record extent %s is not written any more until the next start: %s; records that DRAM "
            "drops cost a read for each of their rows again",
            self.file.path,
            error,
        )

    def _save(self) -> None:
        """Write the index down, if it says anything new."""
        if not self._unsaved or self._broken:
            return
        self._unsaved = False
        try:
            os.fdatasync(self.file.write_fd)
            written = self.index.save(self.file.index_path, self.file.uuid, self._next)
        except (StorageError, OSError) as error:
            self._give_up(error)
            return
        self._allowance.spend(written)
        self._counters.add(extent_bytes_written=written)

    def flush(self) -> None:
        """Wait until all that was offered is written or dropped; for tests and benchmarks."""
        with self._changed:
            self._hand_over()
            self._changed.wait_for(lambda: not self._full and not self._busy)

    def close(self) -> None:
        """Write what there is, and the index; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
