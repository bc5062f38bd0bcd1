"""Choosing a page reader: io_uring where it is allowed, else threads; said once."""

from __future__ import annotations

import logging
from typing import Literal

from engram_client.errors import StorageError
from tierstore.devices.base import PageReader
from tierstore.devices.pread import PreadReader
from tierstore.devices.uring import UringReader

log = logging.getLogger(__name__)
Engine = Literal["auto", "io_uring", "pread"]


def open_reader(engine: Engine, *, queue_depth: int, threads: int) -> PageReader:
    """The reader for `engine`. Raises StorageError where "io_uring" is asked for and not allowed."""
    if engine == "pread":
        return PreadReader(threads)
    try:
        return UringReader(queue_depth)
    except OSError as error:
        if engine == "io_uring":
            raise StorageError(
                f"nvme.engine is 'io_uring', and the system refuses it: {error.strerror}; containers need a "
                "seccomp profile that allows io_uring_setup and io_uring_enter; or use 'auto'"
            ) from error
        log.warning(
            "io_uring is not available (%s): pages are read by %d threads with pread, which costs more "
            "processor time at the same rate",
            error.strerror,
            threads,
        )
    return PreadReader(threads)
