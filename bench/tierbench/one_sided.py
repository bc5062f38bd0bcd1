"""Reading sets that a writer evicts and refills as fast as it can, every record checked by its content."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.arena.layout import WAYS
from tierbench.mapped_arena import OWNER, MappedArena, content, make_arena

RECORD_BYTES = 2112
SETS, KEYS_A_SET = 2, 3 * WAYS  # of which a third fit


@dataclass
class Tally:
    """What a stress came to."""

    reads: int = 0
    hits: int = 0
    wrong: int = 0
    written: int = 0
    seconds: float = 0.0


def stress(reads: int, timeout_s: float, kernel: Any = None) -> Tally:
    """At least `reads` one-sided reads, or fewer where one is wrong or the time is up.

    The reader maps the arena a second time, read-only, as another process does. Reader and writer are
    two threads that spend their time in kernels, without the GIL. `kernel` reads instead of the
    product's.
    """
    arena = make_arena(SETS * WAYS, RECORD_BYTES)
    client, keys = MappedArena(arena, kernel=kernel), np.arange(SETS * KEYS_A_SET)
    expected, done, tally = content(keys, RECORD_BYTES), threading.Event(), Tally()
    owners = np.full(keys.size, OWNER)

    def write() -> None:
        random = np.random.default_rng(3)
        while not done.is_set():
            order = random.permutation(keys)
            arena.admit(order, owners, expected.ctypes.data, order, wanted_soon=False)
            tally.written += keys.size

    writer = threading.Thread(target=write)
    writer.start()
    started = time.monotonic()
    try:
        while tally.reads < reads and not tally.wrong and time.monotonic() < started + timeout_s:
            rows, misses, _ = client.read(keys)
            there = np.delete(keys, misses)
            tally.wrong += int((rows[there] != expected[there]).any(axis=1).sum())
            tally.hits += there.size
            tally.reads += keys.size
    finally:
        done.set()
        writer.join()
    tally.seconds = time.monotonic() - started
    return tally
