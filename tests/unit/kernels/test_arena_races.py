"""Readers and a writer in one set at the same time, with records so long that they are sure to meet."""

from __future__ import annotations

import threading

import numpy as np

from engram_client.arena.layout import WAYS, ArenaGeometry
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

RECORD_BYTES = 128 << 10
KEYS = 4 * WAYS  # of which 16 fit
OWNER = 256
COPIES = 1500


def test_a_record_overwritten_while_it_is_copied_is_a_miss() -> None:
    """Every record holds its key in every word, so a copy of two halves shows."""
    arena = Arena(ArenaGeometry(1, RECORD_BYTES).total_bytes, RECORD_BYTES, Counters())
    assert arena.geometry.sets == 1
    source = np.repeat(np.arange(KEYS, dtype=np.int64), RECORD_BYTES // 8).reshape(KEYS, -1)
    done = threading.Event()

    def write() -> None:
        random = np.random.default_rng(1)
        while not done.is_set():
            keys = random.integers(0, KEYS, 8)
            arena.admit(keys, np.full(8, OWNER), source.ctypes.data, keys, wanted_soon=False)

    writer = threading.Thread(target=write)
    writer.start()
    found = 0
    try:
        every = np.arange(KEYS)
        out = np.empty((KEYS, RECORD_BYTES // 8), np.int64)
        while found < COPIES:
            misses, _ = arena.read(every, OWNER, 1, (0, RECORD_BYTES), out.ctypes.data)
            for key in np.setdiff1d(every, misses):
                found += 1
                assert (out[key] == key).all(), f"a torn record: asked for {key}, got {np.unique(out[key])}"
    finally:
        done.set()
        writer.join()
