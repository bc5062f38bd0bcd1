"""Page reads by cuFile, from the disk's controller into device memory; through kvikio.

`buffer` of `PageReader` is an address in device memory here. Worker threads claim runs of the job table as
those of pread do, but each read is an entry into Python and back (kvikio lets others have the interpreter
meanwhile), some ten microseconds: so it is for long runs, and a hundred thousand runs a second are beyond it
whatever the disk can do.

A read that hangs in the driver keeps its thread. Whoever waits for it gives up at his deadline and goes
another way; `close` waits for such a thread only a moment.

Only `open_gds_reader` imports kvikio, and only where a probe said that this is GPUDirect Storage. Tested with
a stand-in for kvikio on the host, never on a GPU.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from tierstore.devices.gds_probe import GdsProbe
from tierstore.devices.job_table import PLACES, JobReader, rehearse
from tierstore.kernels.claim import (
    ADDRESS,
    CLAIM_WORDS,
    DESCRIPTOR,
    FIRST_PAGE,
    PAGES,
    PLACE,
    end_claim,
    wait_for_run,
)

log = logging.getLogger(__name__)
PAGE_BYTES = 4096
FILES_MAX = 16  # registered with cuFile at once, beyond those being read
CLOSE_TIMEOUT_S = 5.0


class CuFile(Protocol):
    """What is used of kvikio.CuFile."""

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int: ...

    def close(self) -> None: ...


OpenCuFile = Callable[[str], CuFile]


def open_gds_reader(probe: GdsProbe, threads: int) -> GdsReader:
    """The reader, where the probe said that it is there."""
    assert probe.usable, "kvikio may hang or end this process where it was not tried before"
    import kvikio
    import kvikio.defaults

    kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF)  # a file that cannot is an error, not a copy
    return GdsReader(lambda path: kvikio.CuFile(path, "r"), threads)


class DeviceBytes:
    """Memory of a device by its address, as kvikio wants to be told of it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class CuFiles:
    """Files that cuFile knows, by what they are: a descriptor's number may be another file's next time.

    A file that is registered stays open, so its inode names nothing else meanwhile. Thread safe.
    """

    def __init__(self, open_file: OpenCuFile) -> None:
        self._open_file = open_file
        self._files: dict[tuple[int, int], CuFile] = {}  # the one used longest ago first
        self._users: Counter[tuple[int, int]] = Counter()
        self._changing = threading.Lock()

    @contextmanager
    def file(self, fd: int) -> Iterator[CuFile]:
        """The file behind a descriptor, kept open meanwhile. Raises OSError, and what opening raises."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        with self._changing:
            file = self._files.pop(key, None) or self._open_file(f"/proc/self/fd/{fd}")
            self._files[key] = file
            self._users[key] += 1
            self._close_some()
        try:
            yield file
        finally:
            with self._changing:
                self._users[key] -= 1

    def _close_some(self) -> None:
        idle = [key for key in self._files if not self._users[key]]
        for key in idle[: max(0, len(self._files) - FILES_MAX)]:
            self._files.pop(key).close()
            del self._users[key]

    def close(self) -> None:
        """Close what nobody reads; what hangs in a read is left to the end of the process."""
        with self._changing:
            for key in [key for key in self._files if not self._users[key]]:
                self._files.pop(key).close()


class GdsReader(JobReader):
    """See `PageReader`; buffers are addresses in device memory. `open_file` is kvikio's CuFile."""

    def __init__(self, open_file: OpenCuFile, threads: int) -> None:
        super().__init__()
        self._files = CuFiles(open_file)
        self._said = False
        rehearse(self._rehearse)
        spread = max(1, PLACES // threads)
        self._table.start_workers(threads, "gds", lambda i: self._work(i * spread))

    @staticmethod
    def _rehearse(table: int) -> None:
        claim = np.zeros(CLAIM_WORDS, np.int64)
        wait_for_run(table, PLACES, 0, claim)
        end_claim(table, claim, 0, 0)

    def _work(self, start: int) -> None:
        claim = np.zeros(CLAIM_WORDS, np.int64)
        while wait_for_run(self._table.address, PLACES, start, claim):
            start = int(claim[PLACE]) + 1
            end_claim(self._table.address, claim, *self._read(claim))

    def _read(self, claim: np.ndarray) -> tuple[int, int]:
        """Read one run whole: 0, or an errno and the page that failed. A file that ends too early: EIO."""
        first, size, done = int(claim[FIRST_PAGE]), int(claim[PAGES]) * PAGE_BYTES, 0
        target = DeviceBytes(int(claim[ADDRESS]), size)
        try:
            with self._files.file(int(claim[DESCRIPTOR])) as file:
                while done < size:
                    got = file.raw_read(target, size - done, first * PAGE_BYTES + done, done)
                    if got <= 0:
                        return errno.EIO, first + done // PAGE_BYTES
                    done += got
        except Exception as error:  # kvikio raises RuntimeError and others
            number = getattr(error, "errno", None) or errno.EIO
            if not self._said:
                self._said = True
                log.warning("a read by GPUDirect Storage failed (said once): %s", error)
            return number, first + done // PAGE_BYTES
        return 0, 0

    def close(self) -> None:
        """As `PageReader`; a thread that hangs in the driver is waited for only so long."""
        self._table.close(CLOSE_TIMEOUT_S)
        self._files.close()
