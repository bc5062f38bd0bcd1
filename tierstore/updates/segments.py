"""The files of the update log: DIR/training/log/NNNNNNNN.seg, one following the other.

    page 0   offset size
                  0    8  magic "TSUPDSEG"
                  8    4  version: 1
                 12    4  zero
                 16   16  uuid of the store
                 32    8  number of the segment, as in its name
                 40    8  base: position of its first block
               4088    8  XXH64 of the 4088 bytes before, seed 0
    then     blocks (blocks.py): position p lies at byte 4096 + p - base

Room for a segment is set aside when its file is made, so a full disk shows there. That is done ahead where it
can be; the file has a name then but no first page, and an opening removes it, as it does after a crash. A
segment that an opening finds is never appended to again.
"""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client.errors import DataCorrupt
from tierstore.updates.blocks import ALIGN, checksum_of
from tierstore.updates.disk import Disk

MAGIC, VERSION = b"TSUPDSEG", 1
FIELDS = struct.Struct("<8sII16sqq")


class SyncFailed(OSError):
    """fdatasync failed: whatever the reason, what was written before may be gone."""


@dataclass
class Segment:
    """One file, open. `users` read it; the one that was dropped is closed by the last of them."""

    number: int
    base: int
    end: int  # position behind its last block
    path: Path
    fd: int  # to append by, and for recovery
    direct: int  # to read rows by, past the page cache
    users: int = 0
    dropped: bool = False

    def offset(self, position: int) -> int:
        """Byte of the file."""
        return ALIGN + position - self.base


class Segments:
    """All live segments, ascending. `lock` guards the list; no file is read or written under it."""

    def __init__(self, disk: Disk, folder: Path, uuid: bytes, segment_bytes: int, lock: threading.Condition):
        self.folder = folder / "log"
        self._disk, self._uuid, self._segment_bytes, self._lock = disk, uuid, segment_bytes, lock
        self.all: list[Segment] = []
        self._tail: Segment | None = None  # what is appended to
        self._spare: Segment | None = None  # made ahead, without its first page
        self._written: list[Segment] = []  # to since the last `tidy`, and the tail

    def open_all(self) -> None:
        """Open what lies there; files without a whole first page were never part of the log."""
        for name in self._disk.names(self.folder):
            path = self.folder / name
            fd = self._disk.open(path)
            found = self._decode(fd, name)
            if found:
                self.all.append(Segment(*found, found[1], path, fd, self._disk.open_direct(path)))
            else:
                self._disk.close(fd)
        self.all.sort(key=lambda segment: segment.number)

    def append(self, block: np.ndarray, position: int) -> Segment:
        """Write a block behind all others; a new segment where it does not fit. Raises OSError."""
        tail = self._tail
        if tail is None or tail.offset(position) + block.size > self._segment_bytes:
            tail = self._begin(position)
        self._disk.write_out(tail.fd, block, tail.offset(position))
        tail.end = position + block.size
        return tail

    def sync(self) -> None:
        """Everything appended is on the disk once this returns."""
        try:
            for segment in self._written:
                self._disk.sync(segment.fd)
        except OSError as error:
            raise SyncFailed(error.errno, error.strerror) from error

    def tidy(self) -> None:
        """After a sync, when nobody waits: give the page cache back, and make the next segment ahead."""
        with self._lock:
            synced = [s for s in self._written if not s.dropped]
            for segment in synced:
                segment.users += 1
        for segment in synced:
            self._disk.forget(segment.fd)
        self.unpin(synced)
        self._written = [s for s in synced if s is self._tail]
        tail = self._tail
        if tail and not self._spare and tail.offset(tail.end) > self._segment_bytes // 2:
            with suppress(OSError):  # told when it is needed
                self._spare = self._make()

    def pin(self, low: int, high: int) -> list[Segment]:
        """Keep the segments that hold positions in [low, high); the lock is held. Give them to `unpin`."""
        found = [s for s in self.all if s.base < high and s.end > low]
        for segment in found:
            segment.users += 1
        return found

    def unpin(self, segments: list[Segment]) -> None:
        with self._lock:
            for segment in segments:
                segment.users -= 1
            unused = [s for s in segments if s.dropped and s.users == 0]
        for segment in unused:  # without the lock: a file that has no name frees its blocks here
            self._close(segment)

    def drop_before(self, position: int) -> None:
        """Remove segments that end at or before `position`."""
        self._drop([s for s in self.all if s.end <= position and s is not self._tail])

    def cut(self, position: int) -> None:
        """Remove what lies at `position` or behind: a crash left it. Durable when this returns."""
        for segment in [s for s in self.all if s.base < position][-1:]:
            self._disk.truncate(segment.fd, segment.offset(position))
            self._disk.sync_size(segment.fd)
            segment.end = position
        self._drop([s for s in reversed(self.all) if s.base >= position])

    def remove_strangers(self) -> None:
        """Remove files that are no segments: one that was being made when the machine went down."""
        known = {segment.path.name for segment in self.all}
        for name in self._disk.names(self.folder):
            if name not in known:
                self._disk.unlink(self.folder / name)
        self._disk.sync_folder(self.folder)

    def damaged(self, segment: Segment, position: int, what: str) -> DataCorrupt:
        """What to tell when the log does not hold what was committed."""
        return DataCorrupt(
            f"{segment.path}: {what} at byte {segment.offset(position)} (position {position} of the log), "
            "which had been committed, is not what was written; nothing was changed: restore the training "
            "folder from a copy, or start again from an exported snapshot"
        )

    def close(self) -> None:
        if self._spare:
            with suppress(OSError):  # the next opening does it
                self._disk.unlink(self._spare.path)
        for segment in [*self.all, *([self._spare] if self._spare else [])]:
            self._close(segment)
        self.all, self._spare, self._tail = [], None, None

    def _begin(self, base: int) -> Segment:
        """Append to a new segment from here on. Its first page survives with the first commit's sync."""
        self._spare = segment = self._spare or self._make()
        segment.base = segment.end = base
        fields = FIELDS.pack(MAGIC, VERSION, 0, self._uuid, segment.number, base)
        payload = fields.ljust(ALIGN - 8, b"\0")
        page = payload + checksum_of(payload).to_bytes(8, "little")
        self._disk.write_out(segment.fd, np.frombuffer(page, np.uint8), 0)
        self._written.append(segment)
        self._tail, self._spare = segment, None
        with self._lock:
            self.all.append(segment)
        return segment

    def _make(self) -> Segment:
        """A file with room and a name that survives, but nothing in it."""
        with self._lock:
            number = self.all[-1].number + 1 if self.all else 0
        path = self.folder / f"{number:08d}.seg"
        fd = self._disk.open(path, create=True)
        try:
            self._disk.truncate(fd, 0)  # what an attempt before this may have left
            self._disk.reserve(fd, self._segment_bytes)
            self._disk.sync(fd)
            self._disk.sync_folder(self.folder)
            direct = self._disk.open_direct(path)
        except BaseException:
            self._disk.close(fd)
            with suppress(OSError):
                self._disk.unlink(path)
            raise
        return Segment(number, 0, 0, path, fd, direct)

    def _decode(self, fd: int, name: str) -> tuple[int, int] | None:
        page = np.zeros(ALIGN, np.uint8)
        self._disk.read(fd, page, 0)
        raw = page.tobytes()
        magic, version, _, uuid, number, base = FIELDS.unpack_from(raw)
        whole = checksum_of(raw[:-8]) == int.from_bytes(raw[-8:], "little")
        is_ours = (magic, version, uuid) == (MAGIC, VERSION, self._uuid) and name == f"{number:08d}.seg"
        return (number, base) if whole and is_ours else None

    def _drop(self, segments: list[Segment]) -> None:
        for segment in segments:
            with suppress(FileNotFoundError):  # an attempt before this failed behind it
                self._disk.unlink(segment.path)
        if segments:
            self._disk.sync_folder(self.folder)
        with self._lock:
            for segment in segments:
                self.all.remove(segment)
                segment.dropped = True
            unused = [s for s in segments if s.users == 0]
        for segment in unused:
            self._close(segment)

    def _close(self, segment: Segment) -> None:
        self._disk.close(segment.fd)
        self._disk.close(segment.direct)
        segment.fd = segment.direct = -1
