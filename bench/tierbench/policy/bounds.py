"""What a policy can be held against: the clairvoyant optimum, and a profile that never moves.

Belady's rule with bypass: of what is here and what has just come, drop what is wanted latest. No
policy hits more often. The pinned profile holds the records read most in the first half of the
trace; it has no hits there, so it is to be judged by the second half alone.

The arguments are those of `classical`.
"""

from __future__ import annotations

import heapq

import numpy as np

from tierbench.policy.compiled import simulator

NEVER = 2**31 - 1


@simulator
def next_uses(ids, distinct):
    """int32 [n]: the position of the next access to the same record, NEVER where there is none."""
    following = np.empty(ids.size, np.int32)
    last = np.full(distinct, NEVER, np.int32)
    for i in range(ids.size - 1, -1, -1):
        following[i] = last[ids[i]]
        last[ids[i]] = i
    return following


@simulator
def belady(ids, distinct, capacity, found):
    following = next_uses(ids, distinct)
    wanted_at = np.full(distinct, -1, np.int64)  # of the records that are here
    latest = [(np.int64(0), np.int64(0)) for _ in range(0)]  # heap of (-wanted_at, record), stale ones too
    size = 0
    for i in range(ids.size):
        x, then = ids[i], np.int64(following[i])
        if wanted_at[x] >= 0:
            found[i] = 1
            if then == NEVER:
                wanted_at[x] = -1
                size -= 1
                continue
        elif then == NEVER:
            continue
        elif size == capacity:
            while wanted_at[latest[0][1]] != -latest[0][0]:
                heapq.heappop(latest)
            if -latest[0][0] <= then:
                continue
            wanted_at[heapq.heappop(latest)[1]] = -1
        else:
            size += 1
        wanted_at[x] = then
        heapq.heappush(latest, (-then, np.int64(x)))


def pinned(ids, distinct, capacity, found):
    half = ids.size // 2
    counts = np.bincount(ids[:half], minlength=distinct)
    kept = np.zeros(distinct, bool)
    kept[np.argsort(counts, kind="stable")[::-1][:capacity]] = True
    found[half:] = kept[ids[half:]]
