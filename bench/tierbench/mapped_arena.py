"""An arena of this process, and the same as a client sees it: mapped read-only, with a mailbox."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np

from engram_client.arena import shared_read
from engram_client.arena.layout import WAYS, ArenaGeometry
from engram_client.arena.mailbox import TOUCH_REGION_SHIFT, MailboxGeometry
from engram_client.arena.mapping import SharedMapping
from tierstore.shm.guests import Guest
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.region import Region

OWNER = 1 << 8


def make_arena(records: int, record_bytes: int) -> Arena:
    budget = ArenaGeometry(-(-records // WAYS), record_bytes).total_bytes
    return Arena(budget, record_bytes, Counters())


def content(keys: np.ndarray, record_bytes: int) -> np.ndarray:
    """Bytes that can only belong to this key, uint8 [n, record_bytes]."""
    words = np.arange(record_bytes // 8, dtype=np.uint64)
    mixed = (keys.astype(np.uint64)[:, None] + words) * np.uint64(0x9E3779B97F4A7C15)
    return np.ascontiguousarray(mixed).view(np.uint8).reshape(keys.size, record_bytes)


def admit(arena: Arena, keys: np.ndarray, *, wanted_soon: bool = False) -> None:
    rows = content(keys, arena.geometry.record_bytes)
    owners = np.full(keys.size, OWNER)
    arena.admit(keys, owners, rows.ctypes.data, np.arange(keys.size), wanted_soon=wanted_soon)


class MappedArena:
    """Reads an arena through `read_shared`, or another kernel of its kind."""

    def __init__(self, arena: Arena, part: tuple[int, int] | None = None, kernel: Any = None) -> None:
        self._kernel = kernel or shared_read.read_shared
        self.record_bytes = arena.geometry.record_bytes
        self.part = part or (0, self.record_bytes)
        self.guest = Guest(socket.socket(), os.getuid(), MailboxGeometry.of(1 << 12, 1 << 16))
        self.control = np.ones(1, np.int64)
        self._words = np.zeros(shared_read.VIEW_WORDS, np.int64)
        for at, value in (
            (shared_read.CONTROL, self.control.ctypes.data),
            (shared_read.SERVING, 1),
            (shared_read.TABLE_OWNER, OWNER),
            (shared_read.PART_AT, self.part[0]),
            (shared_read.PART_BYTES, self.part[1]),
            (shared_read.MAILBOX, self.guest.mailbox),
            (shared_read.TOUCH_MASK, self.guest.geometry.touches - 1),
        ):
            self._words[at] = value
        self._maps: list[SharedMapping] = []
        self.follow(arena)

    def follow(self, arena: Arena) -> None:
        """Map the regions the arena has now."""
        self._words[shared_read.NEW_REGION :] = 0
        places = (shared_read.NEW_REGION, shared_read.OLD_REGION)
        for at, region in zip(places, arena.regions(), strict=False):
            self._words[at : at + shared_read.REGION_WORDS] = self._map(region)

    def _map(self, region: Region) -> tuple[int, ...]:
        fd = region.memory.descriptor(writable=False)
        mapping = SharedMapping(fd, region.memory.mapping.size_bytes, writable=False)
        os.close(fd)
        self._maps.append(mapping)
        geometry, index = region.geometry, mapping.address
        slots = index + geometry.index_bytes
        return index, slots, geometry.sets, geometry.slot_bytes, region.number % 256 << TOUCH_REGION_SHIFT

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows uint8 [n, part bytes], positions of missing entries, how many were masked."""
        out = np.full((keys.size, 1, self.part[1]), 0xEE, np.uint8)
        misses, counts = np.empty(keys.size, np.int64), np.zeros(1, np.int64)
        missed = self._kernel(self._words, keys.reshape(-1, 1), out, misses, counts)
        return out[:, 0], misses[:missed], int(counts[0])

    def read_whole(self, keys: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows if they are all there, and what the kernel returned."""
        out = np.zeros((keys.size, 1, self.part[1]), np.uint8)
        got = self._kernel(
            self._words, keys.reshape(-1, 1), out, np.empty(0, np.int64), np.zeros(1, np.int64)
        )
        return out[:, 0], got
