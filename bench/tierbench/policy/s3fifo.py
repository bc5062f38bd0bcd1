"""S3-FIFO (Yang et al., SOSP 2023), fully associative, as published.

A tenth of the room is a small queue for newcomers, the rest a main queue; both are FIFOs. A record
that was read more than once by the time it leaves the small queue moves to the main one, any other
is evicted and remembered by name in a ghost queue as long as the main one. A miss that the ghost
remembers goes straight to the main queue. The main queue gives a record one more round for each
of its up to three reads.

The arguments are those of `classical`.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator

FREQUENCY_MAX = 3
PROMOTED_ABOVE = 1  # reads in the small queue


@simulator
def _push(queue, ends, x):
    queue[ends[1] % queue.size] = x
    ends[1] += 1


@simulator
def _pop(queue, ends):
    x = queue[ends[0] % queue.size]
    ends[0] += 1
    return x


@simulator
def _remember(ghost, ends, ghost_at, x):
    """Put x into the ghost queue; an entry is valid while `ghost_at` names its place."""
    ghost_at[x] = ends[1]
    _push(ghost, ends, x)


@simulator
def s3_fifo(ids, distinct, capacity, found):
    small_max = max(1, capacity // 10)
    small, main = np.empty(capacity + 1, np.int32), np.empty(capacity + 1, np.int32)
    ghost = np.empty(max(1, capacity - small_max), np.int32)
    small_ends, main_ends, ghost_ends = np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64)
    frequency = np.full(distinct, -1, np.int8)  # -1: not here
    ghost_at = np.full(distinct, -1, np.int64)
    for i in range(ids.size):
        x = ids[i]
        if frequency[x] >= 0:
            found[i] = 1
            frequency[x] = min(FREQUENCY_MAX, frequency[x] + 1)
            continue
        while small_ends[1] - small_ends[0] + main_ends[1] - main_ends[0] >= capacity:
            if small_ends[1] - small_ends[0] >= small_max:
                y = _pop(small, small_ends)
                if frequency[y] > PROMOTED_ABOVE:
                    _push(main, main_ends, y)
                    frequency[y] = 0
                else:
                    frequency[y] = -1
                    _remember(ghost, ghost_ends, ghost_at, y)
            else:
                y = _pop(main, main_ends)
                if frequency[y] > 0:
                    frequency[y] -= 1
                    _push(main, main_ends, y)
                else:
                    frequency[y] = -1
        if ghost_at[x] >= 0 and ghost_at[x] >= ghost_ends[1] - ghost.size:
            _push(main, main_ends, x)
            ghost_at[x] = -1
        else:
            _push(small, small_ends, x)
        frequency[x] = 0
