"""Snapshots of the cache: what comes back, what is left out, and what must never come back."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from engram_client.arena.layout import WAYS, ArenaGeometry
from engram_client.errors import FormatError
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.snapshot import (
    CHUNK_HEADER_BYTES,
    HEADER_BYTES,
    ChunkShape,
    load_snapshot,
    write_snapshot,
)

RECORD_BYTES = 2112
OWNERS = {"aa/0": 256, "aa/1": 257, "bb/0": 512}
GO_ON = threading.Event()


def make_arena(records: int, record_bytes: int = RECORD_BYTES) -> Arena:
    budget = ArenaGeometry(-(-records // WAYS), record_bytes).total_bytes
    return Arena(budget, record_bytes, Counters())


def content(keys: np.ndarray, owners: np.ndarray, record_bytes: int) -> np.ndarray:
    mixed = (keys.astype(np.uint64) + owners.astype(np.uint64))[:, None] * np.uint64(0x9E3779B97F4A7C15)
    words = mixed + np.arange(-(-record_bytes // 8), dtype=np.uint64)
    return np.ascontiguousarray(words).view(np.uint8).reshape(keys.size, -1)[:, :record_bytes]


def fill(arena: Arena, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    keys, owners = rng.integers(0, 2**63 - 1, count), rng.choice(list(OWNERS.values()), count)
    rows = np.ascontiguousarray(content(keys, owners, arena.geometry.record_bytes))
    arena.admit(keys, owners, rows.ctypes.data, np.arange(count), wanted_soon=False)
    return keys, owners


def found(arena: Arena, keys: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Which are there; what is there must be right."""
    present = np.zeros(keys.size, bool)
    for i, (key, owner) in enumerate(zip(keys, owners, strict=True)):
        out = np.zeros((1, arena.geometry.record_bytes), np.uint8)
        part = (0, arena.geometry.record_bytes)
        misses, _ = arena.read(np.array([key]), int(owner), 1, part, out.ctypes.data)
        present[i] = not misses.size
        if present[i]:
            expected = content(keys[i : i + 1], owners[i : i + 1], arena.geometry.record_bytes)
            np.testing.assert_array_equal(out, expected)
    return present


@pytest.mark.parametrize("record_bytes", [84, 264, 2112, 90_000])
def test_a_snapshot_brings_every_record_back(tmp_path: Path, record_bytes: int) -> None:
    arena = make_arena(1200, record_bytes)
    keys, owners = fill(arena, 800)
    there = found(arena, keys, owners)
    assert write_snapshot(tmp_path / "x.warm", arena, OWNERS, GO_ON) == there.sum()
    fresh = make_arena(1200, record_bytes)
    load_snapshot(tmp_path / "x.warm", fresh, OWNERS, GO_ON)
    np.testing.assert_array_equal(found(fresh, keys, owners), there)


def test_owners_are_found_by_what_they_are_not_by_number(tmp_path: Path) -> None:
    arena = make_arena(1000)
    keys, owners = fill(arena, 300)
    write_snapshot(tmp_path / "x.warm", arena, OWNERS, GO_ON)
    fresh = make_arena(1000)
    load_snapshot(tmp_path / "x.warm", fresh, {"aa/0": 1024, "aa/1": 256}, GO_ON)
    renamed = {256: 1024, 257: 256}
    for old, new in renamed.items():
        chosen = keys[owners == old]
        out = np.zeros((chosen.size, RECORD_BYTES), np.uint8)
        misses, _ = fresh.read(chosen, new, 1, (0, RECORD_BYTES), out.ctypes.data)
        assert not misses.size
        np.testing.assert_array_equal(out, content(chosen, np.full(chosen.size, old), RECORD_BYTES))
    assert not found(fresh, keys[owners == 512], owners[owners == 512]).any()


def test_a_smaller_arena_takes_what_fits(tmp_path: Path) -> None:
    arena = make_arena(1000)
    keys, owners = fill(arena, 900)
    write_snapshot(tmp_path / "x.warm", arena, OWNERS, GO_ON)
    small = make_arena(200)
    load_snapshot(tmp_path / "x.warm", small, OWNERS, GO_ON)
    assert 150 < found(small, keys, owners).sum() <= small.geometry.capacity_records


def test_a_damaged_chunk_is_left_out_and_the_others_are_not(tmp_path: Path) -> None:
    arena = make_arena(3000)
    keys, owners = fill(arena, 2000)
    path = tmp_path / "x.warm"
    write_snapshot(path, arena, OWNERS, GO_ON)
    chunks = (path.stat().st_size - HEADER_BYTES) // ChunkShape(RECORD_BYTES).bytes
    assert chunks >= 3
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + ChunkShape(RECORD_BYTES).bytes + CHUNK_HEADER_BYTES + 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    fresh = make_arena(3000)
    load_snapshot(path, fresh, OWNERS, GO_ON)
    there = found(fresh, keys, owners).sum()
    assert 0 < there < keys.size
    assert there >= keys.size * (chunks - 1.5) / chunks


@pytest.mark.parametrize("damage", ["empty", "foreign", "header", "other records"])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, damage: str) -> None:
    path, arena = tmp_path / "x.warm", make_arena(64)
    fill(arena, 10)
    write_snapshot(path, arena, OWNERS, GO_ON)
    whole = bytearray(path.read_bytes())
    if damage == "header":
        whole[40] ^= 1
    path.write_bytes({"empty": b"", "foreign": b"x" * 100_000}.get(damage, bytes(whole)))
    reader = make_arena(64, 264) if damage == "other records" else arena
    with pytest.raises(FormatError, match=r"x\.warm"):
        load_snapshot(path, reader, OWNERS, GO_ON)


def test_a_truncated_snapshot_gives_what_is_whole(tmp_path: Path) -> None:
    arena = make_arena(3000)
    keys, owners = fill(arena, 2000)
    path = tmp_path / "x.warm"
    write_snapshot(path, arena, OWNERS, GO_ON)
    with open(path, "r+b") as file:
        file.truncate(HEADER_BYTES + ChunkShape(RECORD_BYTES).bytes + 1000)
    fresh = make_arena(3000)
    load_snapshot(path, fresh, OWNERS, GO_ON)
    assert 300 < found(fresh, keys, owners).sum() < 600


def test_stopping_leaves_the_old_snapshot(tmp_path: Path) -> None:
    arena, path = make_arena(64), tmp_path / "x.warm"
    fill(arena, 10)
    write_snapshot(path, arena, OWNERS, GO_ON)
    before = path.read_bytes()
    stop = threading.Event()
    stop.set()
    assert write_snapshot(path, arena, OWNERS, stop) is None
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.warm"]


def test_copying_out_while_a_writer_evicts_is_never_torn(tmp_path: Path) -> None:
    arena, done = make_arena(64), threading.Event()

    def write() -> None:
        count = 100
        while not done.is_set():
            fill(arena, count)
            count += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copied = 0
        for n in range(20):
            path = tmp_path / f"{n}.warm"
            write_snapshot(path, arena, OWNERS, GO_ON)
            fresh = make_arena(64)
            load_snapshot(path, fresh, OWNERS, GO_ON)
            for keys, owners, rows in entries_of(fresh):
                np.testing.assert_array_equal(rows, content(keys, owners, RECORD_BYTES))
                copied += keys.size
        assert copied > 0
    finally:
        done.set()
        writer.join()


def entries_of(arena: Arena) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    shape = ChunkShape(arena.geometry.record_bytes)
    buffer = np.zeros((shape.entries, shape.entry_bytes), np.uint8)
    found = []
    for count in arena.copy_out(buffer.ctypes.data, shape.entries):
        if not count:
            continue
        words = buffer[:count, :16].copy().view(np.int64)
        owners = words[:, 1] & ((1 << 62) - 1)
        found.append((words[:, 0], owners, buffer[:count, 16 : 16 + RECORD_BYTES].copy()))
    return found
