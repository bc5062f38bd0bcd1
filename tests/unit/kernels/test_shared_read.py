"""One-sided reads: what they find, what they leave behind, and that they are never wrong."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
from tierbench.mapped_arena import MappedArena, admit, content, make_arena
from tierbench.one_sided import stress

from engram_client import jit
from engram_client.arena import read, shared_read
from engram_client.arena.layout import MAIN, MAIN_READ, SMALL, SMALL_READ, STATES_AT, WANTED, WAYS
from engram_client.arena.mailbox import HITS, KEYS, LOOKUPS, MASKED
from tierstore.kernels.mailbox import COUNTED, LOST, WRONG, count_touches
from tierstore.tiers.dram import Arena

RECORD_BYTES = 2112
SOME = np.arange(1, 60)
READS = 300_000  # of the stress in the test suite; `tierbench shm` does ten million


def drained(arena: Arena, client: MappedArena) -> dict[str, int]:
    """Count what the client touched, as the daemon does."""
    regions, counts = np.zeros((256, 2), np.int64), np.zeros(3, np.int64)
    for region in arena.regions():
        regions[region.number % 256] = region.index, region.geometry.sets
    guest = client.guest
    guest.touches_seen = count_touches(
        guest.mailbox, guest.geometry.touches, guest.touches_seen, regions, counts
    )
    return {"counted": int(counts[COUNTED]), "wrong": int(counts[WRONG]), "lost": int(counts[LOST])}


def states(arena: Arena) -> np.ndarray:
    """Of all ways that hold something, uint8."""
    lines = [arena._region.index_line(i) for i in range(arena.geometry.sets)]
    return np.concatenate(
        [line[STATES_AT : STATES_AT + WAYS][line[:32].view(np.uint16) != 0] for line in lines]
    )


@pytest.mark.parametrize("part", [(0, RECORD_BYTES), (264, 528)])
def test_hits_misses_and_masked(part: tuple[int, int]) -> None:
    arena = make_arena(4096, RECORD_BYTES)
    admit(arena, SOME)
    client = MappedArena(arena, part)
    keys = np.array([5, -1, 1000, 7, 5, 2000, -1])
    rows, misses, masked = client.read(keys)
    assert (misses.tolist(), masked) == ([2, 5], 2)
    expected = content(keys, RECORD_BYTES)[:, part[0] : part[0] + part[1]]
    assert np.array_equal(rows[[0, 3, 4]], expected[[0, 3, 4]])
    assert not rows[[1, 6]].any()
    assert (rows[[2, 5]] == 0xEE).all()
    assert client.guest.said_counters().tolist() == [0, 0, 0, 0], "whoever brings the rest counts"
    rows, misses, _ = client.read(SOME)
    assert not misses.size
    assert np.array_equal(rows, content(SOME, RECORD_BYTES)[:, part[0] : part[0] + part[1]])


def test_all_or_nothing_counts_what_it_answers() -> None:
    arena = make_arena(4096, RECORD_BYTES)
    admit(arena, SOME)
    client = MappedArena(arena)
    assert client.read_whole(np.array([1, 2, 1000]))[1] == 1
    assert drained(arena, client) == {"counted": 0, "wrong": 0, "lost": 0}
    rows, missed = client.read_whole(np.array([1, -1, 3]))
    assert missed == 0
    assert np.array_equal(rows[[0, 2]], content(np.array([1, 3]), RECORD_BYTES))
    counters = client.guest.said_counters()
    assert counters[[LOOKUPS, KEYS, MASKED, HITS]].tolist() == [1, 3, 1, 2]
    assert drained(arena, client)["counted"] == 2


def test_a_read_changes_nothing_in_the_arena_and_is_counted_later() -> None:
    arena = make_arena(256, RECORD_BYTES)
    admit(arena, SOME)
    before = states(arena)
    client = MappedArena(arena)
    client.read(SOME)
    assert np.array_equal(states(arena), before)
    assert drained(arena, client)["counted"] == SOME.size
    assert np.array_equal(states(arena), before + 1)
    for _ in range(SMALL_READ - SMALL):
        client.read(SOME)
        drained(arena, client)
    assert np.array_equal(states(arena), before + SMALL_READ - SMALL)
    client.read(SOME)
    assert drained(arena, client)["counted"] == 0, "on trial more reads tell nothing"


def test_a_record_that_was_read_often_is_not_touched_again() -> None:
    arena = make_arena(256, RECORD_BYTES)
    admit(arena, SOME)
    for i in range(arena.geometry.sets):  # as after moves to the main queue
        line = arena._region.index_line(i)
        line[STATES_AT : STATES_AT + WAYS] = line[STATES_AT : STATES_AT + WAYS] & 0xF0 | MAIN
    client, counted = MappedArena(arena), []
    for _ in range(MAIN_READ - MAIN + 3):
        client.read(SOME)
        counted.append(drained(arena, client)["counted"] // SOME.size)
    assert counted == [1] * (MAIN_READ - MAIN) + [0] * 3


def test_a_reader_a_hint_announced_is_told_of() -> None:
    arena = make_arena(256, RECORD_BYTES)
    admit(arena, SOME, wanted_soon=True)
    assert (states(arena) & WANTED).all()
    client = MappedArena(arena)
    client.read(SOME)
    drained(arena, client)
    assert not (states(arena) & WANTED).any()


def test_touches_that_nobody_takes_are_written_over() -> None:
    arena = make_arena(4096, RECORD_BYTES)
    admit(arena, SOME)
    client = MappedArena(arena)
    for _ in range(20):  # states stay as they are, so each read is news
        client.read(SOME)
    found = drained(arena, client)
    assert found["lost"] == 20 * SOME.size - client.guest.geometry.touches
    assert found["counted"] == client.guest.geometry.touches


def test_touches_of_records_that_are_gone_count_for_nobody() -> None:
    arena = make_arena(WAYS, RECORD_BYTES)
    admit(arena, SOME[:WAYS])
    client = MappedArena(arena)
    client.read(SOME[:WAYS])
    admit(arena, np.arange(5000, 5000 + 4 * WAYS))
    found = drained(arena, client)
    assert found["counted"] + found["wrong"] == WAYS
    assert found["wrong"] >= WAYS // 2


def test_made_up_touches_are_harmless() -> None:
    arena = make_arena(64, RECORD_BYTES)
    admit(arena, SOME)
    client, random = MappedArena(arena), np.random.default_rng(3)
    ring = client.guest._bytes[4096 + 64 * 1024 :].view(np.int64)[: client.guest.geometry.touches]
    head = client.guest._bytes[128:136].view(np.int64)
    before = [arena._region.index_line(i)[:STATES_AT].copy() for i in range(arena.geometry.sets)]
    for _ in range(50):
        ring[:] = random.integers(-(2**63), 2**63 - 1, ring.size, endpoint=True)
        ring[::2] &= (1 << 61) - 1
        ring[::2] |= 1 << 60
        head[0] = random.integers(-(2**63), 2**63 - 1, endpoint=True)
        drained(arena, client)
    after = [arena._region.index_line(i)[:STATES_AT] for i in range(arena.geometry.sets)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    rows, misses, _ = client.read(SOME)
    found = np.setdiff1d(np.arange(SOME.size), misses)
    assert np.array_equal(rows[found], content(SOME, RECORD_BYTES)[found])


def test_a_daemon_that_stops_serving_is_not_read() -> None:
    arena = make_arena(256, RECORD_BYTES)
    admit(arena, SOME)
    client = MappedArena(arena)
    client.control[0] = 0
    assert client.read_whole(SOME)[1] == shared_read.NOT_SERVING


def test_while_records_move_both_regions_are_read() -> None:
    arena = make_arena(2048, RECORD_BYTES)
    admit(arena, SOME)
    client = MappedArena(arena)
    seen: list[int] = []

    def look() -> None:
        client.follow(arena)
        rows, misses, _ = client.read(SOME)
        assert np.array_equal(rows, content(SOME, RECORD_BYTES))
        seen.append(misses.size)

    arena.on_change = look
    arena.resize(2 * arena.geometry.total_bytes)
    assert seen == [0, 0]


def changed(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """The module as it would be with one line another."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1
    found = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), found.__dict__)
    return found


def test_no_read_is_wrong_while_a_writer_evicts_and_refills() -> None:
    found = stress(READS, 120)
    assert found.wrong == 0
    assert found.reads >= READS
    assert found.hits > READS // 100
    assert found.written > 0


def test_without_the_second_look_at_the_sequence_reads_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stress above is worth something: the same kernel without its check is caught."""
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    careless = changed(read, "if load_relaxed(line + SEQUENCE_AT) == before:", "if before >= 0:")
    monkeypatch.setattr(read, "copy_if_present", careless.copy_if_present)
    kernel = changed(shared_read, "NOT_SERVING = -1", "NOT_SERVING = -1").read_shared
    found = stress(1 << 40, 60, kernel)
    assert found.wrong > 0, f"nothing wrong in {found}"
