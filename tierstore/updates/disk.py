"""Everything that durable training state asks of a disk: the seam where tests put one that loses power.

Methods raise OSError as the system does; callers say what that means. `sync` is fdatasync: data and size of
one file. Names (created, renamed, unlinked) survive once their folder is synced, and not before.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

from tierstore.devices.base import RunReader
from tierstore.devices.opening import open_reader
from tierstore.format.direct import (
    aligned_bytes,
    begin_writing,
    end_writing,
    leave_direct,
    open_direct,
    sync_folder,
)
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.trained_pages import write_pages
from tierstore.store.lock import acquire_lock
from tierstore.updates.step_index import LmdbSteps, StepIndex


class Owned(Protocol):
    """A folder that is ours until this is closed."""

    def close(self) -> None: ...


CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP)
SECTOR_BYTES = 512
WRITE_BYTES = 8 << 20  # of one system call, so that none holds a signal up for long
WRITE_OUT_BYTES = 1 << 20  # the disk works on these while the next is copied
ON_THEIR_WAY = 2  # as many of them, where others are not to wait


class Disk:
    """The disk of this machine."""

    def open(self, path: Path, *, create: bool = False) -> int:
        """A descriptor to read and write `path`."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)

    def open_direct(self, path: Path) -> int:
        """A descriptor to read `path` past the page cache, where that can be: aligned memory, whole pages."""
        fd = open_direct(path, os.O_RDONLY)
        try:
            os.preadv(fd, [aligned_bytes(SECTOR_BYTES).data], 0)
        except OSError as error:  # some file systems refuse only now
            if error.errno != errno.EINVAL or not leave_direct(fd, path):
                os.close(fd)
                raise
        return fd

    def bring(self, source: Path, target: Path) -> None:
        """Have a file that nobody changes under another name: linked, or copied and synced."""
        try:
            os.link(source.resolve(strict=True), target)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
            copy_synced(source, target)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def write(self, fd: int, data: np.ndarray, offset: int) -> None:
        """All of `data`, uint8, at byte `offset`."""
        view, done = data.data, 0
        while done < len(view):
            done += os.pwrite(fd, view[done : done + WRITE_BYTES], offset + done)

    def write_out(self, fd: int, data: np.ndarray, offset: int) -> None:
        """As `write`, and the disk begins with it at once; `sync` waits for what is left."""
        for start in range(0, data.size, WRITE_OUT_BYTES):
            part = data[start : start + WRITE_OUT_BYTES]
            self.write(fd, part, offset + start)
            begin_writing(fd, offset + start, part.size)

    def write_pages(self, fd: int, images: np.ndarray, page_numbers: np.ndarray) -> None:
        """Pages uint64 [n, 512] to their places in a file: int64 [n], ascending.

        Little at a time is on its way to the disk, so that reads of others find their way between.
        """
        step, ranges = WRITE_OUT_BYTES // PAGE_BYTES, list[tuple[int, int]]()
        for start in range(0, page_numbers.size, step):
            part = page_numbers[start : start + step]
            failed = write_pages(fd, images[start : start + step], part)
            if failed:
                raise OSError(-failed, os.strerror(-failed))
            first, last = int(part[0]), int(part[-1])
            ranges.append((first * PAGE_BYTES, (last + 1 - first) * PAGE_BYTES))
            begin_writing(fd, *ranges[-1])
            if len(ranges) > ON_THEIR_WAY:
                end_writing(fd, *ranges[-1 - ON_THEIR_WAY])

    def read(self, fd: int, into: np.ndarray, offset: int) -> int:
        """Fill `into`, uint8, from byte `offset`; fewer bytes only at the file's end."""
        view, done = into.data, 0
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or done % SECTOR_BYTES == 0:
                    raise
                break  # a file ended within a sector, which direct reads cannot ask for more of
            if count == 0:
                break
            done += count
        return done

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def forget(self, fd: int) -> None:
        """Leave what the page cache holds of a file, as far as it is synced, to others."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync_size(self, fd: int) -> None:
        """As `sync`, also where a file has become shorter, which fdatasync may leave for later."""
        os.fsync(fd)

    def reserve(self, fd: int, count: int) -> None:
        """Have room for the first `count` bytes of a file set aside; they read as zeros.

        File systems that set nothing aside give the file its size alone: a full disk shows later there.
        """
        try:
            os.posix_fallocate(fd, 0, count)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.ftruncate(fd, count)

    def truncate(self, fd: int, count: int) -> None:
        os.ftruncate(fd, count)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """With those above it, each of which survives."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)

    def sync_folder(self, path: Path) -> None:
        sync_folder(path)

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))

    def exists(self, path: Path) -> bool:
        return path.exists()

    def free_bytes(self, folder: Path) -> int:
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def lock(self, folder: Path) -> Owned:
        """Own `folder` until the result is closed. Raises StoreLocked, which names the owner."""
        return acquire_lock(
            folder / "owner.lock",
            f"training store {folder}",
            "one process trains a store: send updates to that one, or stop it first",
        )

    def open_reader(self, depth: int) -> RunReader:
        """Many page reads at a time of descriptors that `open` gave."""
        return open_reader("auto", queue_depth=depth, threads=depth)

    def open_steps(self, folder: Path) -> StepIndex:
        return LmdbSteps(folder)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file in bounded memory; no room is told before anything is written, and nothing is left then."""
    try:
        with source.open("rb") as read, target.open("wb") as written:
            size_bytes = os.fstat(read.fileno()).st_size
            if size_bytes > os.fstatvfs(written.fileno()).f_bavail * os.fstatvfs(written.fileno()).f_frsize:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {size_bytes} bytes of {source}")
            shutil.copyfileobj(read, written, WRITE_BYTES)
            written.flush()
            os.fsync(written.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


REAL_DISK = Disk()
