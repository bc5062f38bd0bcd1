"""The arena itself, its own kernels over memory of its own, replaying a trace.

Records have no content here, which changes nothing for their keys. `tierstore` takes one access at a
time and admits a miss before the next, as every simulator does. `hinted` reads window by window and
hints each window before it reads the one ahead of it, as a server does that knows its prompts.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.layout import LINE_BYTES, SMALL, WANTED, WAYS, ArenaGeometry
from engram_client.arena.read import count_read, find_way, mix, set_of, tag_of
from tierbench.policy.compiled import simulator
from tierbench.policy.traces import RecordTrace
from tierstore.kernels.admit import ADMITTED, COUNTS, admit_record
from tierstore.kernels.dueling import new_duel, note_eviction

HINT, DEMAND = 0, 1  # bytes read by each


class Replay:
    """An empty arena for so many records."""

    def __init__(self, capacity: int) -> None:
        geometry = ArenaGeometry(max(1, capacity // WAYS), 0)
        self._memory = np.zeros(geometry.total_bytes + LINE_BYTES, np.uint8)
        index = self._memory.ctypes.data + -self._memory.ctypes.data % LINE_BYTES
        slots, ghosts = index + geometry.index_bytes, index + geometry.ghosts_at
        self._places = (index, slots, ghosts, geometry.sets, geometry.slot_bytes)
        self.duel = new_duel(geometry.sets)

    def play(self, keys: np.ndarray, owners: np.ndarray, part_bytes: int) -> int:
        """Read the keys one after another, admit each that is missing; returns how many were there."""
        return int(_replay(*self._places, self.duel, keys, owners, part_bytes))


def tierstore(trace: RecordTrace, capacity: int, hits: np.ndarray) -> None:
    """Add the hits of the first and of the second half to `hits` int64 [2]."""
    replay, half = Replay(capacity), trace.ids.size // 2
    for i, ids in enumerate((trace.ids[:half], trace.ids[half:])):
        hits[i] += replay.play(trace.keys[ids], trace.owners[ids], DEMAND)


def hinted(trace: RecordTrace, capacity: int, window: int) -> tuple[float, float]:
    """Shares of the accesses: found by their reader, and read from disk by hint or reader.

    `window` is in accesses.
    """
    replay = Replay(capacity)
    found = read = 0
    for start in range(-window, trace.ids.size, window):
        ahead = trace.ids[start + window : start + 2 * window]
        read += ahead.size - replay.play(trace.keys[ahead], trace.owners[ahead], HINT)
        now = trace.ids[max(start, 0) : start + window]
        here = replay.play(trace.keys[now], trace.owners[now], DEMAND)
        found, read = found + here, read + now.size - here
    return found / trace.ids.size, read / trace.ids.size


@simulator
def _replay(index, slots, ghosts, sets, slot_bytes, duel, keys, owners, part_bytes):
    counts = np.zeros(COUNTS, np.int64)
    state = SMALL | WANTED if part_bytes == HINT else SMALL
    for i in range(keys.size):
        h = mix(keys[i], owners[i])
        which = set_of(h, sets)
        line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
        way = find_way(line, set_slots, slot_bytes, tag_of(h), keys[i], owners[i])
        if way >= 0:
            count_read(line, way, part_bytes)
        else:
            which = admit_record(
                index, slots, ghosts, sets, slot_bytes, duel, 0, keys[i], owners[i], 0, state, counts, 0
            )
            if which >= 0:
                note_eviction(duel, which, sets)
    return keys.size - counts[ADMITTED]
