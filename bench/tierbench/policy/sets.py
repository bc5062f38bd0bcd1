"""Policies within sets of 16, as an arena can have them: CLOCK, and two queues with ghosts.

`two_queues` is the policy of `tierstore.kernels.replacement` on plain arrays, with its choices as
arguments: ways on trial, reads that pass the trial, ghosts a set, bits of their fingerprints (at
most 12), reads counted in the main queue. With (3, 1, 16, 12, 4) it hits exactly where an arena does
whose sets all stay neutral, with (1, 1, 16, 12, 4) all eager, with (4, 2, 16, 12, 4) all patient.
Records are spread over the sets as the arena spreads them.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.layout import WAYS
from engram_client.arena.read import mix, set_of, tag_of
from tierbench.policy.compiled import simulator


@simulator
def set_clock(ids, keys, owners, capacity, found):
    sets = max(1, capacity // WAYS)
    holds = np.full((sets, WAYS), -1, np.int32)
    read, hand = np.zeros((sets, WAYS), np.uint8), np.zeros(sets, np.uint8)
    way_of = np.full(keys.size, -1, np.int8)
    for i in range(ids.size):
        x = ids[i]
        s = set_of(mix(keys[x], owners[x]), sets)
        if way_of[x] >= 0:
            found[i] = 1
            read[s, way_of[x]] = 1
            continue
        way = hand[s]
        while read[s, way]:
            read[s, way] = 0
            way = (way + 1) % WAYS
        hand[s] = (way + 1) % WAYS
        if holds[s, way] >= 0:
            way_of[holds[s, way]] = -1
        holds[s, way], way_of[x] = x, way


@simulator
def _oldest(in_main, arrived, used, trial):
    small = main = -1
    count = 0
    for way in range(used):
        if in_main[way]:
            if main < 0 or arrived[way] < arrived[main]:
                main = way
        else:
            count += 1
            if small < 0 or arrived[way] < arrived[small]:
                small = way
    return small if count >= trial or main < 0 else main


@simulator
def _fingerprint(tag, bits):
    return max(1, tag >> (16 - bits))


@simulator
def _recall(ghosts, newest, fingerprint):
    """Forget the newest ghost with this fingerprint; whether there was one."""
    for back in range(ghosts.size):
        place = (newest - back) % ghosts.size
        if ghosts[place] == fingerprint:
            ghosts[place] = 0
            return True
    return False


@simulator
def two_queues(ids, keys, owners, capacity, found, trial, passes, ghosts_max, bits, reads_max):
    sets = max(1, capacity // WAYS)
    holds = np.full((sets, WAYS), -1, np.int32)
    reads, in_main = np.zeros((sets, WAYS), np.uint8), np.zeros((sets, WAYS), np.uint8)
    arrived, now = np.zeros((sets, WAYS), np.int32), np.zeros(sets, np.int32)
    used = np.zeros(sets, np.int8)
    ghosts, newest = np.zeros((sets, max(1, ghosts_max)), np.int16), np.zeros(sets, np.int64)
    way_of = np.full(keys.size, -1, np.int8)
    for i in range(ids.size):
        x = ids[i]
        h = mix(keys[x], owners[x])
        s = set_of(h, sets)
        if way_of[x] >= 0:
            found[i] = 1
            way = way_of[x]
            if reads[s, way] < (reads_max if in_main[s, way] else passes):
                reads[s, way] += 1
            continue
        known = ghosts_max > 0 and _recall(ghosts[s], newest[s], _fingerprint(tag_of(h), bits))
        if used[s] < WAYS:
            way = np.int64(used[s])
            used[s] += 1
        else:
            way = _oldest(in_main[s], arrived[s], WAYS, trial)
            while reads[s, way] >= (1 if in_main[s, way] else passes):
                reads[s, way] = reads[s, way] - 1 if in_main[s, way] else 0
                in_main[s, way] = 1
                now[s] += 1
                arrived[s, way] = now[s]
                way = _oldest(in_main[s], arrived[s], WAYS, trial)
            gone = holds[s, way]
            way_of[gone] = -1
            if ghosts_max > 0:
                newest[s] = (newest[s] + 1) % ghosts_max
                ghosts[s, newest[s]] = _fingerprint(tag_of(mix(keys[gone], owners[gone])), bits)
        now[s] += 1
        holds[s, way], way_of[x], arrived[s, way] = x, way, now[s]
        reads[s, way], in_main[s, way] = 0, known
