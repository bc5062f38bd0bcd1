"""Reading and writing large runs of pages, mostly past the page cache, with errors a user can act on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from engram_client.errors import StorageError

log = logging.getLogger(__name__)

LIBC = ctypes.CDLL(None, use_errno=True)
SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT = 2, 1 | 4  # wait: before and after
NOT_OFFERED = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE)  # by the kernel, or for this kind of file
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def aligned_bytes(count: int, *, huge: bool = False) -> np.ndarray:
    """uint8 [count] of zeros that starts on a page boundary, as O_DIRECT wants it; on huge pages if asked."""
    memory = mmap.mmap(-1, max(1, count))
    if huge:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:count]


def open_direct(path: Path, flags: int) -> int:
    """Open past the page cache where the file system can; says so where it cannot."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    _say_buffered(path)
    return os.open(path, flags | os.O_CLOEXEC, 0o644)


def write_all(fd: int, path: Path, data: np.ndarray, offset: int) -> None:
    """Write all of `data`, uint8 and page-aligned, at byte `offset`. Raises StorageError."""
    view = data.data
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and leave_direct(fd, path):
                continue
            raise write_error(path, error, len(view) - done) from error


def reserve(fd: int, path: Path, offset: int, count: int) -> None:
    """Have the file system set bytes aside, so that a full disk shows before they are written.

    It also lets writes to one file run side by side, which those that extend it cannot. File
    systems that cannot do it are left alone. Raises StorageError where there is no room.
    """
    try:
        os.posix_fallocate(fd, offset, count)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise write_error(path, error, count) from error


def read_up_to(fd: int, path: Path, into: np.ndarray, offset: int) -> int:
    """Fill `into`, uint8 and page-aligned, from byte `offset`; fewer bytes only at the file's end."""
    view = into.data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and leave_direct(fd, path):
                continue
            raise StorageError(
                f"{path}: reading {len(view)} bytes at {offset} failed: {error.strerror}; check the disk"
            ) from error
        if count == 0:
            break
        done += count
    return done


def leave_direct(fd: int, path: Path) -> bool:
    """Turn `fd` into a buffered one; False where it is one already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    _say_buffered(path)
    return True


def begin_writing(fd: int, offset: int, count: int) -> None:
    """Have the kernel begin to write what lies in the page cache of these bytes. Raises OSError."""
    _write_range(fd, offset, count, SYNC_FILE_RANGE_WRITE)


def end_writing(fd: int, offset: int, count: int) -> None:
    """Return when these bytes have been written; that they stay, only a sync says. Raises OSError."""
    _write_range(fd, offset, count, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT)


def _write_range(fd: int, offset: int, count: int, flags: int) -> None:
    if LIBC.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), flags):
        number = ctypes.get_errno()
        if number not in NOT_OFFERED:
            raise OSError(number, os.strerror(number))


def write_error(path: Path, error: OSError, needed_bytes: int) -> StorageError:
    """What to tell a user when a write to `path` failed."""
    if error.errno not in OUT_OF_SPACE:
        return StorageError(f"{path}: writing {needed_bytes} bytes failed: {error.strerror}; check the disk")
    free_bytes = shutil.disk_usage(path.parent).free
    limit = "a file size limit was reached" if error.errno == errno.EFBIG else "the disk is full"
    return StorageError(
        f"{path}: {limit} ({error.strerror}): {needed_bytes} more bytes were to be written, "
        f"{free_bytes} are free; make room and run the same command again, it goes on where it stopped"
    )


def sync_folder(path: Path) -> None:
    """Make a rename or a new name in folder `path` survive a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make folder `path` and what is missing above it, each of which then survives a crash."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    if not missing:
        sync_folder(path.parent)  # who made it may have been killed before this


def _say_buffered(path: Path) -> None:
    log.warning(
        "%s: this file system has no direct I/O; going through the page cache, "
        "which costs one more copy and displaces what others have cached there",
        path,
    )
