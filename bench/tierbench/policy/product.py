"""The arena itself, its own kernels over memory of its own, replaying a trace.

Records have no content here, which changes nothing for their keys. One access at a time, a miss is
admitted before the next access, as in every simulator. In batches, all of a batch is read first and
what was missing is admitted after, as a look-up does it; what a batch wants twice is then read from
disk once, and counts as one miss.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.layout import LINE_BYTES, WAYS, ArenaGeometry
from engram_client.arena.read import count_read, find_way, mix, set_of, tag_of
from tierbench.policy.compiled import simulator
from tierbench.policy.traces import RecordTrace
from tierstore.kernels.admit import ADMITTED, admit_record


def arena_memory(geometry: ArenaGeometry) -> np.ndarray:
    """Zeroed bytes for an arena, on a cache line."""
    raw = np.zeros(geometry.total_bytes + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + geometry.total_bytes]


def tierstore(trace: RecordTrace, capacity: int, hits: np.ndarray, *, batch: int = 1) -> None:
    """Add the hits of the first and of the second half to `hits` int64 [2]."""
    geometry = ArenaGeometry(max(1, capacity // WAYS), 0)
    memory = arena_memory(geometry)
    index = memory.ctypes.data
    places = (index, index + geometry.index_bytes, index + geometry.ghosts_at)
    keys, owners = trace.keys[trace.ids], trace.owners[trace.ids]
    half = keys.size // 2
    for i, part in enumerate((slice(0, half), slice(half, None))):
        hits[i] += _replay(*places, geometry.sets, geometry.slot_bytes, keys[part], owners[part], batch)


@simulator
def _replay(index, slots, ghosts, sets, slot_bytes, keys, owners, batch):
    counts = np.zeros(2, np.int64)
    missing = np.empty(batch, np.int64)
    for start in range(0, keys.size, batch):
        missed = 0
        for i in range(start, min(start + batch, keys.size)):
            h = mix(keys[i], owners[i])
            which = set_of(h, sets)
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            way = find_way(line, set_slots, slot_bytes, tag_of(h), keys[i], owners[i])
            if way >= 0:
                count_read(line, way)
            else:
                missing[missed] = i
                missed += 1
        for j in range(missed):
            i = missing[j]
            admit_record(index, slots, ghosts, sets, slot_bytes, 0, keys[i], owners[i], 0, 0, counts)
    return keys.size - counts[ADMITTED]
