"""The arena against a dictionary, and under a writer that never rests."""

import os
import threading
from typing import Any

import numpy as np
import pytest

from engram_client.arena.layout import SEQUENCE_AT, WAYS, ArenaGeometry
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

RECORD_BYTES = 88
OWNER = 1 << 8


def make_arena(records: int) -> Arena:
    budget = ArenaGeometry(-(-records // WAYS), RECORD_BYTES).total_bytes
    return Arena(budget, RECORD_BYTES, Counters())


def content(keys: np.ndarray, version: int = 0) -> np.ndarray:
    """Bytes that can only belong to this key: a counter-mode mix of it, repeated to the record's end."""
    words = np.arange(RECORD_BYTES // 8, dtype=np.uint64)
    mixed = (keys.astype(np.uint64)[:, None] + words) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(version)
    return np.ascontiguousarray(mixed).view(np.uint8).reshape(keys.size, RECORD_BYTES)


def admit(arena: Arena, keys: np.ndarray, owner: int = OWNER) -> None:
    rows = content(keys)
    arena.admit(keys, np.full(keys.size, owner), rows.ctypes.data, np.arange(keys.size), wanted_soon=False)


def read(arena: Arena, keys: np.ndarray, owner: int = OWNER, **part: Any) -> tuple[np.ndarray, set[int], int]:
    at, length = part.get("at", 0), part.get("length", RECORD_BYTES)
    out = np.full((keys.size, length), 0xEE, np.uint8)
    misses, masked = arena.read(keys, owner, 1, (at, length), out.ctypes.data)
    return out, set(misses.tolist()), masked


def test_what_is_admitted_is_read_back():
    arena = make_arena(4096)
    keys = np.random.default_rng(1).integers(0, 2**63 - 1, 500)
    admit(arena, keys)
    rows, missing, masked = read(arena, keys)
    assert not missing
    assert masked == 0
    np.testing.assert_array_equal(rows, content(keys))


def test_largest_and_smallest_keys_are_ordinary_keys():
    arena = make_arena(256)
    keys = np.array([0, 1, 2**63 - 1, 2**62])
    admit(arena, keys)
    rows, missing, _ = read(arena, keys)
    assert not missing
    np.testing.assert_array_equal(rows, content(keys))


def test_another_owner_does_not_see_the_record():
    arena = make_arena(4096)
    keys = np.arange(100)
    admit(arena, keys, OWNER)
    _, missing, _ = read(arena, keys, OWNER + 1)
    assert missing == set(range(100))


def test_masked_entries_are_zeros_and_counted():
    arena = make_arena(256)
    keys = np.array([-1, 5, -1])
    admit(arena, np.array([5]))
    rows, missing, masked = read(arena, keys)
    assert masked == 2
    assert not missing
    assert not rows[[0, 2]].any()
    np.testing.assert_array_equal(rows[1:2], content(np.array([5])))


def test_a_miss_leaves_the_output_untouched():
    rows, missing, _ = read(make_arena(256), np.array([7]))
    assert missing == {0}
    assert (rows == 0xEE).all()


def test_a_part_of_each_record():
    arena = make_arena(4096)
    keys = np.arange(50)
    admit(arena, keys)
    rows, missing, _ = read(arena, keys, at=16, length=24)
    assert not missing
    np.testing.assert_array_equal(rows, content(keys)[:, 16:40])


def test_full_arena_keeps_its_size_and_stays_right():
    arena = make_arena(512)
    keys = np.random.default_rng(2).integers(0, 2**63 - 1, 5000)
    for chunk in np.split(keys, 50):
        admit(arena, chunk)
    rows, missing, _ = read(arena, keys)
    found = np.setdiff1d(np.arange(keys.size), sorted(missing))
    assert 0 < found.size <= arena.geometry.capacity_records
    np.testing.assert_array_equal(rows[found], content(keys)[found])


def test_a_record_read_again_outlives_one_that_is_not():
    arena = make_arena(WAYS)  # one set
    loved, stream = np.array([1]), np.arange(100, 100 + 10 * WAYS)
    admit(arena, loved)
    for key in stream:
        read(arena, loved)
        admit(arena, np.array([key]))
    assert not read(arena, loved)[1]


def test_sets_whose_writer_died_are_misses():
    arena = make_arena(64)
    keys = np.arange(40)
    admit(arena, keys)
    for which in range(arena.geometry.sets):
        arena._region.index_line(which)[SEQUENCE_AT] |= 1
    assert read(arena, keys)[1] == set(range(40))
    admit(arena, keys)  # the next writer repairs the set
    rows, missing, _ = read(arena, keys)
    assert not missing
    np.testing.assert_array_equal(rows, content(keys))


def test_budget_covers_index_and_slots():
    for budget in (10_000, 1 << 20, 123_456_789):
        geometry = ArenaGeometry.within(budget, 2112)
        assert geometry.total_bytes <= max(budget, ArenaGeometry(1, 2112).total_bytes)
        assert geometry.index_bytes / geometry.total_bytes < 0.08


def test_readers_never_see_a_torn_record_while_a_writer_evicts():
    """Content is a function of the key, so a torn or mistaken copy cannot pass."""
    arena = make_arena(32)  # two sets: every write meets the readers
    keys = np.arange(96)
    stop = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(3)
        while not stop.is_set():
            admit(arena, rng.permutation(keys))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        expected, hits = content(keys), 0
        for _ in range(3000):
            rows, missing, _ = read(arena, keys)
            found = np.setdiff1d(keys, sorted(missing))
            hits += found.size
            np.testing.assert_array_equal(rows[found], expected[found])
        assert hits > 0
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.4, 4])
def test_resizing_keeps_what_fits(factor):
    arena = make_arena(4096)
    keys = np.random.default_rng(4).integers(0, 2**63 - 1, 3000)
    admit(arena, keys)
    before = keys.size - len(read(arena, keys)[1])
    arena.resize(int(arena.geometry.total_bytes * factor))
    rows, missing, _ = read(arena, keys)
    found = np.setdiff1d(np.arange(keys.size), sorted(missing))
    np.testing.assert_array_equal(rows[found], content(keys)[found])
    capacity = arena.geometry.capacity_records
    expected = before if factor > 1 else min(before, capacity)
    assert found.size >= 0.9 * expected, "a few sets may overflow, no more"


def test_resizing_while_reading_and_admitting_is_never_wrong():
    arena = make_arena(2048)
    keys = np.random.default_rng(5).integers(0, 2**63 - 1, 1500)
    sizes = [int(arena.geometry.total_bytes * f) for f in (3, 0.2, 1, 5, 0.5, 1)]
    done = threading.Event()

    def resize() -> None:
        for size in sizes * 3:
            arena.resize(size)
        done.set()

    resizer = threading.Thread(target=resize)
    resizer.start()
    expected, hits = content(keys), 0
    while True:
        last = done.is_set()
        admit(arena, keys)
        rows, missing, _ = read(arena, keys)
        found = np.setdiff1d(np.arange(keys.size), sorted(missing))
        np.testing.assert_array_equal(rows[found], expected[found])
        hits += found.size
        if last:
            break
    assert hits > 0


def test_shrinking_gives_memory_back():
    arena = Arena(64 << 20, 2112, Counters())
    arena.close()  # huge pages would count memory that was never used
    keys = np.arange(25_000)
    rows = np.zeros((keys.size, 2112), np.uint8)
    arena.admit(keys, np.full(keys.size, OWNER), rows.ctypes.data, keys, wanted_soon=False)
    before = shared_bytes()
    arena.resize(8 << 20)
    arena.close()
    assert shared_bytes() < before - (40 << 20)


def shared_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssShmem"))


def test_arena_memory_belongs_to_its_user_alone():
    """A memfd is born with mode 0777, and a process that may open it for writing can truncate it."""
    arena = make_arena(1024)
    with open("/proc/self/maps") as maps:
        line = next(m for m in maps if _within(m, arena._region.index))
    assert "memfd:tierstore-arena" in line
    address = line.split()[0]
    assert os.stat(f"/proc/self/map_files/{address}").st_mode & 0o777 == 0o600


def _within(line: str, address: int) -> bool:
    low, high = (int(part, 16) for part in line.split()[0].split("-"))
    return low <= address < high


def test_an_arena_that_fills_moves_to_huge_pages_or_says_it_cannot(caplog):
    arena = Arena(32 << 20, 2112, Counters())
    keys = np.arange(arena.geometry.capacity_records)
    rows = np.zeros((keys.size, 2112), np.uint8)
    arena.admit(keys, np.full(keys.size, OWNER), rows.ctypes.data, keys, wanted_soon=False)
    arena.settle()
    assert huge_bytes(arena) >= (16 << 20) or "stays in small pages" in caplog.text
    assert not read_all_missing(arena, keys[:100])


def huge_bytes(arena: Arena) -> int:
    """From /proc/self/smaps: bytes of the arena's mapping in huge pages."""
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if "-" in line.split()[0]:
                inside = _within(line, arena._region.index)
            elif inside and line.startswith("ShmemPmdMapped"):
                return 1024 * int(line.split()[1])
    return 0


def read_all_missing(arena: Arena, keys: np.ndarray) -> bool:
    out = np.ones((keys.size, 2112), np.uint8)
    misses, _ = arena.read(keys, OWNER, 1, (0, 2112), out.ctypes.data)
    return bool(misses.size == keys.size) or bool(np.delete(out, misses, axis=0).any())
