"""LRU, CLOCK and SIEVE, fully associative, as published.

Every simulator takes `ids` int32 [n], records numbered 0..distinct-1 in any order; how many
distinct ones there are; the capacity in records; and `found` uint8 [n], all 0, where it sets a 1 for
every access that hits. A miss is always admitted.

LRU evicts what was used longest ago. CLOCK (Corbato, 1968) keeps records in a ring with one
reference bit each; the hand clears bits until it meets a clear one. SIEVE (Zhang et al., NSDI 2024)
keeps them in order of arrival; its hand walks from the oldest to the newest, clears bits as it goes
and evicts the first unvisited record where it stands, so newcomers stay near the head and are
looked at soon.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator


@simulator
def lru(ids, distinct, capacity, found):
    older = np.full(distinct + 1, -1, np.int32)  # towards the least recent; `distinct` is the list's head
    newer = np.full(distinct + 1, -1, np.int32)
    head = distinct
    older[head] = newer[head] = head
    size = 0
    for i in range(ids.size):
        x = ids[i]
        if newer[x] >= 0:
            found[i] = 1
            older[newer[x]] = older[x]
            newer[older[x]] = newer[x]
        elif size == capacity:
            victim = newer[head]
            newer[head] = newer[victim]
            older[newer[victim]] = head
            newer[victim] = -1
        else:
            size += 1
        newer[x], older[x] = head, older[head]
        newer[older[head]] = x
        older[head] = x


@simulator
def clock(ids, distinct, capacity, found):
    frame_of = np.full(distinct, -1, np.int32)
    ring = np.full(capacity, -1, np.int32)
    referenced = np.zeros(capacity, np.uint8)
    hand = size = 0
    for i in range(ids.size):
        x = ids[i]
        if frame_of[x] >= 0:
            found[i] = 1
            referenced[frame_of[x]] = 1
            continue
        if size < capacity:
            frame = size
            size += 1
        else:
            while referenced[hand]:
                referenced[hand] = 0
                hand = hand + 1 if hand + 1 < capacity else 0
            frame = hand
            frame_of[ring[frame]] = -1
            hand = hand + 1 if hand + 1 < capacity else 0
        ring[frame], frame_of[x], referenced[frame] = x, frame, 0


@simulator
def sieve(ids, distinct, capacity, found):
    newer = np.full(distinct + 1, -1, np.int32)  # `distinct` stands before the oldest and after the newest
    older = np.full(distinct + 1, -1, np.int32)
    head = distinct
    newer[head] = older[head] = head
    visited = np.zeros(distinct + 1, np.uint8)
    hand = head
    size = 0
    for i in range(ids.size):
        x = ids[i]
        if newer[x] >= 0:
            found[i] = 1
            visited[x] = 1
            continue
        if size == capacity:
            victim = hand if hand != head else newer[head]
            while visited[victim]:
                visited[victim] = 0
                victim = newer[victim] if newer[victim] != head else newer[head]
            hand = newer[victim]
            newer[older[victim]] = newer[victim]
            older[newer[victim]] = older[victim]
            newer[victim] = -1
        else:
            size += 1
        newest = older[head]
        older[x], newer[x] = newest, head
        newer[newest] = x
        older[head] = x
        visited[x] = 0
