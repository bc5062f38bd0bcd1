"""The arena itself, its own kernels over memory of its own, replaying look-ups.

Records have no content here, which changes nothing for their keys. A look-up is a batch, as the service
answers it: all its entries are looked for, then every record that was missing is admitted, once
and in order of first appearance. So an entry whose record is brought for an earlier entry of the same
look-up is a miss that costs no read. Where there is a record extent, its own index is asked for all that
is missing first, and then offered what the arena drops; the ring of its file is a number that counts on,
and what is offered is written at once, as by a disk that keeps up. `tierstore` takes one access at a
time, as every simulator does.
`hinted` reads window by window and hints each window before it reads the one ahead of it, as a server
does that knows its prompts.

All keys are known here, so index lines are asked for long before they are wanted, also across look-ups.
That saves time and changes nothing else.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import equal_halves, load_word, lowest_bit, prefetch_line
from engram_client.arena.layout import (
    GHOST_BYTES,
    KEY_AT,
    LINE_BYTES,
    ORDER_BITS,
    OWNER_AT,
    SMALL,
    TAGS_AT,
    WANTED,
    WAYS,
    ArenaGeometry,
)
from engram_client.arena.read import count_read, find_way, mix, set_of, tag_of
from tierbench.policy.compiled import simulator
from tierbench.policy.traces import RecordTrace
from tierstore.kernels.admit import COUNTS, admit_record
from tierstore.kernels.distinct import find_distinct
from tierstore.kernels.dueling import new_duel, note_eviction
from tierstore.kernels.extent import WAYS as INDEX_WAYS
from tierstore.kernels.extent import hash_of, insert_into_index, probe_index
from tierstore.tiers.extent_layout import ExtentGeometry

HINT, DEMAND = 0, 1  # bytes read by each
# What became of an entry: DRAM had it, its rows were read, it was missing and is brought for another entry,
# HBM had it, the record extent had it.
FOUND, READ, REPEATED, HELD, KEPT = range(5)
AHEAD = 64  # entries; a power of two
SOON = AHEAD // 2
TABLES_MAX = 1 << 15 >> ORDER_BITS  # of one extent here
ROOM = 2  # times as many slots as there are accesses: hardly a set overflows, so more change nothing


def room_for(capacity: int, accesses: int) -> int:
    """Records that an arena of this capacity need hold under so many accesses: memory is not for show."""
    return min(capacity, ROOM * accesses)


class Ring:
    """What an extent of this geometry holds: its index, and how far it has been written."""

    def __init__(self, geometry: ExtentGeometry) -> None:
        shape = (geometry.index_sets, INDEX_WAYS) if geometry.pages else (0, INDEX_WAYS)
        self.words = np.zeros(shape, np.int64)
        self.written = np.array([geometry.slots, geometry.slots], np.int64)  # next sequence, slots
        self.pages = np.diff(geometry.group.starts).astype(np.uint8)  # of each record of a group
        tables = np.arange(1, TABLES_MAX + 1, dtype=np.int64)
        self.identities = np.stack([tables * 0x5DEECE66D, tables], axis=1)


class Replay:
    """An empty arena for so many records, at least one set of them; with 0 none. An empty extent, if any."""

    def __init__(self, capacity: int, extent: ExtentGeometry | None = None) -> None:
        sets = max(1, capacity // WAYS) if capacity else 0
        geometry = ArenaGeometry(max(1, sets), 0)
        self._memory = np.zeros(geometry.total_bytes + LINE_BYTES, np.uint8)
        index = self._memory.ctypes.data + -self._memory.ctypes.data % LINE_BYTES
        slots, ghosts = index + geometry.index_bytes, index + geometry.ghosts_at
        self._places = (index, slots, ghosts, sets, geometry.slot_bytes)
        self.duel = new_duel(geometry.sets)
        self._ring = Ring(extent or ExtentGeometry(8, 0))

    def look_up(
        self,
        keys: np.ndarray,
        owners: np.ndarray,
        ends: np.ndarray,
        outcome: np.ndarray,
        part_bytes: int = DEMAND,
    ) -> np.ndarray:
        """Answer look-ups, of which number i ends before entry ends[i]; ends int64 [m].

        `keys`, `owners` int64 [n]. Writes FOUND, READ, REPEATED or KEPT to `outcome` uint8 [n]; returns the
        pages of the extent that each entry has read, uint8 [n], none without an extent.
        """
        ring = self._ring
        pages = np.zeros(keys.size if ring.words.size else 0, np.uint8)
        _replay(
            *self._places, self.duel, ring.words, ring.written, ring.pages, ring.identities, keys, owners,
            ends, part_bytes, outcome, pages,
        )  # fmt: skip
        return pages

    def play(self, keys: np.ndarray, owners: np.ndarray, part_bytes: int) -> np.ndarray:
        """Read the keys one after another, admit each that is missing; uint8 [n], 1 where one was there."""
        outcome = np.empty(keys.size, np.uint8)
        self.look_up(keys, owners, np.arange(1, keys.size + 1), outcome, part_bytes)
        return np.equal(outcome, FOUND).view(np.uint8)


def tierstore(trace: RecordTrace, capacity: int, found: np.ndarray) -> None:
    """Set a 1 in `found` uint8 [n] for each access that hits."""
    found[:] = Replay(capacity).play(trace.keys[trace.ids], trace.owners[trace.ids], DEMAND)


def hinted(trace: RecordTrace, capacity: int, window: int) -> tuple[float, float]:
    """Shares of the accesses: found by their reader, and read from disk by hint or reader.

    `window` is in accesses.
    """
    replay = Replay(capacity)
    found = read = 0
    for start in range(-window, trace.ids.size, window):
        ahead = trace.ids[start + window : start + 2 * window]
        read += ahead.size - int(replay.play(trace.keys[ahead], trace.owners[ahead], HINT).sum())
        now = trace.ids[max(start, 0) : start + window]
        here = int(replay.play(trace.keys[now], trace.owners[now], DEMAND).sum())
        found, read = found + here, read + now.size - here
    return found / trace.ids.size, read / trace.ids.size


@simulator
def _ask_for_set(index, sets, keys, owners, hashes, i):
    """Hash entry i and have its index line come closer."""
    h = mix(keys[i], owners[i])
    hashes[i & AHEAD - 1] = h
    prefetch_line(index + set_of(h, sets) * LINE_BYTES)


@simulator
def _ask_for_slot(index, slots, ghosts, sets, slot_bytes, h):
    """Have the slot that an entry may lie in come closer, or what admitting it will touch."""
    which = set_of(h, sets)
    ways = equal_halves(index + which * LINE_BYTES + TAGS_AT, tag_of(h))
    if ways != 0:
        prefetch_line(slots + (which * WAYS + lowest_bit(ways)) * slot_bytes)
    else:
        prefetch_line(ghosts + which * GHOST_BYTES)


@simulator
def _distinct_misses(keys, owners, misses, places, first, inverse, missing_keys, missing_owners):
    """The first entry of each record among entries `misses`; writes them to `first`, returns how many."""
    for m in range(misses.size):
        missing_keys[m], missing_owners[m] = keys[misses[m]], owners[misses[m]]
    size = 16
    while size < 2 * misses.size:
        size *= 2
    places[:size] = -1
    n = misses.size
    count = find_distinct(missing_keys[:n], missing_owners[:n], places[:size], first, inverse)
    for d in range(count):
        first[d] = misses[first[d]]
    return count


@simulator
def _ask_extent(words, written, record_pages, identities, keys, owners, first, outcome, pages, sequences):
    """Which of the records that entries `first` stand for the extent has: KEPT, and pages that it reads."""
    probe_index(words, keys, owners, identities, written[0] - written[1], sequences)
    for d in range(first.size):
        if sequences[d] >= 0:
            outcome[first[d]] = KEPT
            pages[first[d]] = record_pages[sequences[d] % written[1] % record_pages.size]


@simulator
def _offer(words, written, identities, keys, owners, sequences):
    """Write what is not among the younger half of the extent; a key of -1 is none."""
    probe_index(words, keys, owners, identities, written[0] - written[1] + written[1] // 2, sequences)
    hashes, count = np.empty(keys.size, np.int64), 0
    for d in range(keys.size):
        if keys[d] >= 0 and sequences[d] < 0:
            hashes[count] = np.int64(hash_of(keys[d], owners[d], identities))
            count += 1
    insert_into_index(words, hashes, written[0], count)
    written[0] += count


@simulator
def _admit(index, slots, ghosts, sets, slot_bytes, duel, state, counts, left, keys, owners):
    """Admit records, each of which becomes the one that had to leave for it, or -1."""
    for d in range(keys.size):
        at = np.int64(left.ctypes.data)  # here, so that `left` lives as long as the loop
        which = admit_record(
            index, slots, ghosts, sets, slot_bytes, duel, 0, keys[d], owners[d], 0, state, counts, at
        )
        keys[d] = -1
        if which >= 0:
            note_eviction(duel, which, sets)
            keys[d], owners[d] = load_word(at + KEY_AT), load_word(at + OWNER_AT)


@simulator
def _replay(
    index, slots, ghosts, sets, slot_bytes, duel, words, written, record_pages, identities, keys, owners,
    ends, part_bytes, outcome, pages,
):  # fmt: skip
    counts, left = np.zeros(COUNTS, np.int64), np.empty(slot_bytes, np.uint8)
    state = SMALL | WANTED if part_bytes == HINT else SMALL
    hashes = np.empty(AHEAD, np.uint64)
    longest = start = 0
    for end in ends:
        longest, start = max(longest, end - start), end
    misses, scratch = np.empty(longest, np.int64), np.empty((4, longest), np.int64)
    places = np.empty(4 * longest + 16, np.int64)
    for i in range(min(AHEAD, keys.size) if sets else 0):
        _ask_for_set(index, sets, keys, owners, hashes, i)
    start = 0
    for end in ends:
        missing = _look(
            index, slots, ghosts, sets, slot_bytes, hashes, keys, owners, start, end, part_bytes, outcome,
            misses,
        )  # fmt: skip
        if missing:
            read = _distinct_misses(
                keys, owners, misses[:missing], places, scratch[0], scratch[1], scratch[2], scratch[3]
            )
            first, wanted, theirs = scratch[0, :read], scratch[2, :read], scratch[3, :read]
            for d in range(read):
                outcome[first[d]] = READ
                wanted[d], theirs[d] = keys[first[d]], owners[first[d]]
            if words.size:
                _ask_extent(
                    words, written, record_pages, identities, wanted, theirs, first, outcome, pages,
                    scratch[1, :read],
                )  # fmt: skip
            if sets:
                _admit(index, slots, ghosts, sets, slot_bytes, duel, state, counts, left, wanted, theirs)
            if words.size:
                _offer(words, written, identities, wanted, theirs, scratch[1, :read])
        start = end


@simulator
def _look(
    index, slots, ghosts, sets, slot_bytes, hashes, keys, owners, start, end, part_bytes, outcome, misses
):
    """Look for the entries of one look-up; returns how many are missing, which are written to `misses`."""
    missing = 0
    for i in range(start, end):
        way = np.int64(-1)
        if sets:
            h = hashes[i & AHEAD - 1]
            which = set_of(h, sets)
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            way = find_way(line, set_slots, slot_bytes, tag_of(h), keys[i], owners[i])
            if i + AHEAD < keys.size:
                _ask_for_set(index, sets, keys, owners, hashes, i + AHEAD)
            if i + SOON < keys.size:
                _ask_for_slot(index, slots, ghosts, sets, slot_bytes, hashes[i + SOON & AHEAD - 1])
        if way >= 0:
            count_read(line, way, part_bytes)
            outcome[i] = FOUND
        else:
            outcome[i] = REPEATED
            misses[missing] = i
            missing += 1
    return missing
