"""A disk in memory that loses power: what was not synced is kept, lost or torn, by a seed.

It is one `Disk` (tierstore/updates/disk.py), kept in this process, without threads. Until a file is synced
every 512-byte sector of it may, after a crash, be as it was at the last sync or as any write since has left
it, each sector by itself, so writes are dropped, reordered and torn. What was done to the names in a folder
since that was synced (creating, renaming, unlinking) may have happened or not, each for itself. The same
seed breaks the same things.

`lose_power_at` names the operation that raises PowerLost, `lose_power_when` is asked at each; `crash` then
makes of what survives the disk that one finds after the restart. `refuse` and `capacity_bytes` make
operations fail while the power is on.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import StoreLocked
from tierstore.devices.base import PageRead, PageReadFailed
from tierstore.updates.disk import Disk
from tierstore.updates.step_index import StepPlace

SECTOR, PAGE = 512, 4096
ZEROS = bytes(SECTOR)
HARMLESS = ("read", "size", "names")
KEPT, LOST, IN_ORDER, TORN = range(4)


class PowerLost(BaseException):
    """The machine is off. No handler of errors should stop it."""


@dataclass
class File:
    """An inode: sectors that are not zero, and what they may be after a crash."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    synced: dict[int, bytes] = field(default_factory=dict)
    synced_size: int = 0
    versions: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)  # unsynced: (write, content)
    writes: int = 0
    synced_writes: int = 0
    reserved: int = 0

    def write(self, data: np.ndarray, offset: int) -> None:
        raw, done = data.tobytes(), 0
        self.writes += 1
        while done < len(raw):
            number, inside = divmod(offset + done, SECTOR)
            count = min(SECTOR - inside, len(raw) - done)
            old = self.sectors.get(number, ZEROS)
            new = old[:inside] + raw[done : done + count] + old[inside + count :]
            self.sectors[number] = new
            self.versions.setdefault(number, []).append((self.writes, new))
            done += count
        self.size = max(self.size, offset + len(raw))

    def read(self, offset: int, count: int) -> bytes:
        count = max(0, min(count, self.size - offset))
        first, last = offset // SECTOR, -(-(offset + count) // SECTOR)
        found = b"".join(self.sectors.get(number, ZEROS) for number in range(first, last))
        return found[offset - first * SECTOR :][:count]

    def truncate(self, size: int) -> None:
        self.size = size
        for number in [n for n in self.sectors if n * SECTOR >= size]:
            del self.sectors[number]
            self.versions.setdefault(number, []).append((self.writes, ZEROS))

    def sync(self) -> None:
        for number in self.versions:
            if number in self.sectors:
                self.synced[number] = self.sectors[number]
            else:
                self.synced.pop(number, None)
        self.synced_size, self.synced_writes, self.versions = self.size, self.writes, {}

    def crash(self, random: np.random.Generator) -> None:
        """Become what the disk holds after the restart."""
        how = min(TORN, int(random.integers(6)))
        sectors, last = dict(self.synced), int(random.integers(self.synced_writes, self.writes + 1))
        for number in sorted(self.versions):
            choices = [self.synced.get(number, ZEROS), *(content for _, content in self.versions[number])]
            if how == KEPT:
                sectors[number] = choices[-1]
            elif how == TORN:
                sectors[number] = choices[int(random.integers(len(choices)))]
            elif how == IN_ORDER:
                before = [content for write, content in self.versions[number] if write <= last]
                sectors[number] = before[-1] if before else choices[0]
        self.size = self.size if how == KEPT or random.integers(2) else self.synced_size
        self.sectors = {n: s for n, s in sectors.items() if n * SECTOR < self.size}
        self.synced, self.synced_size, self.versions = dict(self.sectors), self.size, {}
        self.synced_writes = self.writes
        self.reserved = 0


Names = dict[str, File]


@dataclass
class Folder:
    """What names there are, and what was done to them since the folder was synced."""

    names: Names = field(default_factory=dict)
    synced: Names = field(default_factory=dict)
    changes: list[Callable[[Names], object]] = field(default_factory=list)

    def change(self, change: Callable[[Names], object]) -> None:
        change(self.names)
        self.changes.append(change)

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def crash(self, random: np.random.Generator) -> None:
        how, names = int(random.integers(4)), dict(self.synced)
        kept = int(random.integers(len(self.changes) + 1))
        if how in (KEPT, LOST):
            kept = len(self.changes) if how == KEPT else 0
        for number, change in enumerate(self.changes):
            if random.integers(2) if how == TORN else number < kept:
                change(names)
        self.names, self.synced, self.changes = names, dict(names), []


class CrashingDisk(Disk):
    """See the module. Paths are those of no real disk."""

    def __init__(self, *, lose_power_at: int | None = None, capacity_bytes: int | None = None) -> None:
        self.operations = 0
        self.lose_power_when: Callable[[str, Path], bool] = lambda operation, path: False
        self._off = False
        self.lose_power_at = lose_power_at
        self.capacity_bytes = capacity_bytes
        self.refuse: Callable[[str, Path], int | None] = lambda operation, path: None
        self._folders: dict[Path, Folder] = {}
        self._open: dict[int, tuple[File, Path]] = {}
        self._next_fd = 1000
        self._owned: set[Path] = set()
        self.steps: dict[Path, dict[int, StepPlace]] = {}  # of each store
        self._steps_before: list[tuple[Path, dict[int, StepPlace]]] = []

    def crash(self, random: np.random.Generator) -> None:
        """Lose power and start again; whoever had something open must forget it."""
        for folder in self._folders.values():
            folder.crash(random)
        for file in {id(f): f for folder in self._folders.values() for f in folder.names.values()}.values():
            file.crash(random)
        self._open, self._owned, self._off = {}, set(), False
        self.keep_power()
        if self._steps_before and random.integers(2):  # an index may lag, as far as it likes
            store, steps = self._steps_before[int(random.integers(len(self._steps_before)))]
            self.steps[store] = steps
        self._steps_before = []

    def keep_power(self) -> None:
        self.lose_power_at, self.lose_power_when = None, lambda operation, path: False

    def _begin(self, operation: str, path: Path) -> None:
        self.operations += operation not in HARMLESS
        reached = self.lose_power_at is not None and self.operations >= self.lose_power_at
        if self._off or reached or self.lose_power_when(operation, path):
            self._off = True
            raise PowerLost
        if number := self.refuse(operation, path):
            raise OSError(number, os.strerror(number))

    def _file(self, operation: str, fd: int) -> File:
        file, path = self._open[fd]
        self._begin(operation, path)
        return file

    def open(self, path: Path, *, create: bool = False) -> int:
        self._begin("open", path)
        folder = self._folder(path.parent)
        if path.name not in folder.names:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            made = File()
            folder.change(lambda names: names.__setitem__(path.name, made))
        self._next_fd += 1
        self._open[self._next_fd] = folder.names[path.name], path
        return self._next_fd

    def open_direct(self, path: Path) -> int:
        return self.open(path)

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def path_of(self, fd: int) -> Path:
        return self._open[fd][1]

    def size(self, fd: int) -> int:
        return self._file("size", fd).size

    def write(self, fd: int, data: np.ndarray, offset: int) -> None:
        file = self._file("write", fd)
        self._check_room(max(file.reserved, offset + data.size) - max(file.reserved, file.size))
        file.write(data, offset)

    def write_out(self, fd: int, data: np.ndarray, offset: int) -> None:
        self.write(fd, data, offset)

    def write_pages(self, fd: int, images: np.ndarray, page_numbers: np.ndarray) -> None:
        cuts = np.flatnonzero(np.diff(page_numbers) != 1) + 1
        for number, run in zip(page_numbers[[0, *cuts]].tolist(), np.split(images, cuts), strict=True):
            self.write(fd, run.reshape(-1).view(np.uint8), number * PAGE)

    def read(self, fd: int, into: np.ndarray, offset: int) -> int:
        found = self._file("read", fd).read(offset, into.size)
        into[: len(found)] = np.frombuffer(found, np.uint8)
        return len(found)

    def sync(self, fd: int) -> None:
        self._file("sync", fd).sync()

    def forget(self, fd: int) -> None:
        pass

    def sync_size(self, fd: int) -> None:
        self._file("sync", fd).sync()

    def reserve(self, fd: int, count: int) -> None:
        file = self._file("reserve", fd)
        self._check_room(count - max(file.reserved, file.size))
        file.reserved = max(file.reserved, count)
        file.size = max(file.size, count)

    def truncate(self, fd: int, count: int) -> None:
        file = self._file("truncate", fd)
        file.truncate(count)
        file.reserved = min(file.reserved, count)

    def rename(self, old: Path, new: Path) -> None:
        self._begin("rename", new)
        folder = self._folder(old.parent)
        moved = folder.names[old.name]

        def change(names: Names) -> None:
            names.pop(old.name, None)
            names[new.name] = moved

        folder.change(change)

    def unlink(self, path: Path) -> None:
        self._begin("unlink", path)
        if path.name not in self._folder(path.parent).names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._folder(path.parent).change(lambda names: names.pop(path.name, None))

    def make_folder(self, path: Path) -> None:
        self._begin("make_folder", path)
        self._folders.setdefault(path, Folder())
        self._folders.setdefault(path.parent, Folder())

    def sync_folder(self, path: Path) -> None:
        self._begin("sync_folder", path)
        self._folder(path).sync()

    def names(self, folder: Path) -> list[str]:
        self._begin("names", folder)
        return sorted(self._folder(folder).names)

    def exists(self, path: Path) -> bool:
        return path.name in self._folders.get(path.parent, Folder()).names

    def free_bytes(self, folder: Path) -> int:
        return 0 if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes())

    def used_bytes(self) -> int:
        """By every file that has a name or is open; holes of files that were not reserved take nothing."""
        files = {id(f): f for folder in self._folders.values() for f in folder.names.values()}
        files |= {id(f): f for f, _ in self._open.values()}
        return sum(max(f.reserved, len(f.sectors) * SECTOR) for f in files.values())

    def lock(self, folder: Path) -> Owner:
        if folder in self._owned:
            raise StoreLocked(f"training store {folder} is open already")
        self._owned.add(folder)
        return Owner(self._owned, folder)

    def open_reader(self, depth: int) -> CrashingReader:
        return CrashingReader(self)

    def open_steps(self, folder: Path) -> CrashingSteps:
        return CrashingSteps(self, folder)

    def change_steps(self, folder: Path, put: Mapping[int, StepPlace], drop: list[int]) -> None:
        self._begin("steps", Path("index"))
        before = self.steps.get(folder, {})
        self._steps_before.append((folder, before))
        self.steps[folder] = {s: p for s, p in before.items() if s not in drop} | dict(put)

    def _folder(self, path: Path) -> Folder:
        if path not in self._folders:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self._folders[path]

    def _check_room(self, more_bytes: int) -> None:
        if self.capacity_bytes is not None and more_bytes > 0 and self.free_bytes(Path()) < more_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Owner:
    """What `lock` gives."""

    def __init__(self, owned: set[Path], folder: Path) -> None:
        self._owned, self._folder = owned, folder

    def close(self) -> None:
        self._owned.discard(self._folder)


class CrashingSteps:
    """See `StepIndex`."""

    def __init__(self, disk: CrashingDisk, folder: Path) -> None:
        self._disk, self._folder = disk, folder

    def load(self) -> dict[int, StepPlace]:
        return dict(self._disk.steps.get(self._folder, {}))

    def change(self, put: Mapping[int, StepPlace], drop: list[int]) -> None:
        self._disk.change_steps(self._folder, put, drop)

    def close(self) -> None:
        pass


class CrashingReader:
    """See `PageReader`; a read has ended when `start` returns."""

    def __init__(self, disk: CrashingDisk) -> None:
        self._disk = disk

    def start(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        reads: list[PageRead],
    ) -> PageRead:
        failed, runs = None, (first_pages.tolist(), page_counts.tolist(), slots.tolist())
        for first, count, slot in zip(*runs, strict=True):
            memory = (ctypes.c_uint8 * (count * PAGE)).from_address(buffer + slot * PAGE)
            try:
                self._disk.read(fd, np.frombuffer(memory, np.uint8), first * PAGE)
            except OSError as error:
                failed = PageReadFailed(first, error.errno or errno.EIO)
        reads.append(EndedRead(failed))
        return reads[-1]

    def close(self) -> None:
        pass


class EndedRead:
    """See `PageRead`."""

    def __init__(self, failed: PageReadFailed | None) -> None:
        self._failed = failed

    def wait(self, deadline: Deadline) -> None:
        if self._failed:
            raise self._failed

    def withdraw(self) -> None:
        pass

    def ended(self) -> bool:
        return True
