"""Memory for arenas lies on huge-page boundaries, and one refusal does not end the gathering."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from engram_client.arena.layout import ArenaGeometry
from engram_client.arena.mapping import HUGE_PAGE_BYTES, SharedMapping
from tierstore.tiers import region
from tierstore.tiers.region import COLLAPSE_BYTES, COLLAPSE_TRIES, Region


@pytest.fixture
def memory() -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 2 * HUGE_PAGE_BYTES)
    return fd


def test_every_mapping_is_aligned_and_shared(memory: int) -> None:
    mappings = [SharedMapping(memory, 2 * HUGE_PAGE_BYTES) for _ in range(5)]
    assert [m.address % HUGE_PAGE_BYTES for m in mappings] == [0] * 5
    np.asarray(mappings[0])[5] = 77
    assert all(np.asarray(m)[5] == 77 for m in mappings)
    assert os.pread(memory, 1, 5) == bytes([77])
    os.close(memory)


def test_an_array_keeps_the_mapping_and_the_last_one_lets_go(memory: int) -> None:
    array = np.asarray(SharedMapping(memory, 2 * HUGE_PAGE_BYTES))
    os.close(memory)
    gc.collect()
    array[:] = 3
    assert int(array[-1]) == 3
    address = f"{array.ctypes.data:x}-"
    assert address in Path("/proc/self/maps").read_text()
    del array
    gc.collect()
    assert address not in Path("/proc/self/maps").read_text()


def test_a_file_that_cannot_be_mapped_leaves_nothing_reserved() -> None:
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(20):
        with pytest.raises(OSError, match="Bad file descriptor"):
            SharedMapping(-1, HUGE_PAGE_BYTES)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before + 2


@pytest.mark.parametrize(("number", "tries"), [(errno.EINVAL, 1), (errno.EAGAIN, COLLAPSE_TRIES)])
def test_refused_pieces_do_not_end_the_gathering(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, tries: int
) -> None:
    arena = Region(ArenaGeometry.within(3 * COLLAPSE_BYTES, 2112))
    asked: list[int] = []

    def refuse_first(self: SharedMapping, advice: int, start: int, size_bytes: int) -> None:
        asked.append(start // COLLAPSE_BYTES)
        if start == 0:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(SharedMapping, "madvise", refuse_first)
    monkeypatch.setattr(region, "COLLAPSE_PAUSE_S", 0)
    arena.collapse(threading.Event())
    assert asked == [0] * tries + [1, 2]
    assert not caplog.records
