"""A sample of the records, by their hash: SHARDS (Waldspurger et al., FAST 2015), and its miniature caches.

A record is in the sample if a hash of its key and owner lies below a threshold, so all of its accesses
are or none. A cache of a share R of the size that sees a share R of the records misses R times as often
(Waldspurger et al., ATC 2017). The hash is independent of the one that spreads
records over sets and of its tags.

What a few records are asked for over and over is a large and chancy share of a sample, but those hit in
any cache. So misses are counted, and divided by R times the accesses there really were: this is
SHARDS' own correction. Records fall into GROUPS by other bits of the hash; how the misses of groups
differ tells the standard error.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.read import mix
from tierbench.policy.compiled import simulator

THRESHOLD_BITS = 24
SALT = np.int64(0x2545F4914F6CDD1D)
GROUPS = 64
FAR = 2**62  # the distance of a first access


@simulator
def _sample_hash(key, owner):
    return mix(np.int64(mix(key, owner) >> np.uint64(1)), SALT)


@simulator
def group_of(key, owner):
    """Which of GROUPS a record belongs to."""
    return np.int64(_sample_hash(key, owner) & np.uint64(GROUPS - 1))


@simulator
def pick(keys, owners, ends, first_lookup, threshold, picked, lookups):
    """The entries of consecutive look-ups whose record is in the sample.

    Writes their places to `picked` int64 [n] and the numbers of their look-ups, counted from
    `first_lookup`, to `lookups` int64 [n]; returns how many there are.
    """
    start = count = 0
    for lookup in range(ends.size):
        for i in range(start, ends[lookup]):
            h = _sample_hash(keys[i], owners[i]) >> np.uint64(64 - THRESHOLD_BITS)
            if np.int64(h) < threshold:
                picked[count], lookups[count] = i, first_lookup + lookup
                count += 1
        start = ends[lookup]
    return count


@simulator
def pick_rows(
    keys, owners, ends, first_lookup, first_owners, orders, sizes, offsets, threshold, rows, found, lookups
):
    """The same for the single rows of records: rows and their owners are written to `rows` and `found`.

    `first_owners` int64 [layers]; `sizes`, `offsets` int64 [layers * orders, heads] of the hash. All three
    outputs are int64 [n * heads].
    """
    start = count = 0
    for lookup in range(ends.size):
        layer = (first_lookup + lookup) % first_owners.size
        owner = first_owners[layer]
        for i in range(start, ends[lookup]):
            kind = layer * orders + owners[i] - owner
            for head in range(sizes.shape[1]):
                row = np.int64(np.uint64(keys[i]) % np.uint64(sizes[kind, head])) + offsets[kind, head]
                h = _sample_hash(row, owner) >> np.uint64(64 - THRESHOLD_BITS)
                if np.int64(h) < threshold:
                    rows[count], found[count], lookups[count] = row, owner, first_lookup + lookup
                    count += 1
        start = ends[lookup]
    return count


@simulator
def hash_records(keys, owners, hashes, groups):
    """64 bits that name a record, uint64 [n], and its group, uint8 [n]."""
    for i in range(keys.size):
        hashes[i] = mix(keys[i], owners[i])
        groups[i] = group_of(keys[i], owners[i])


@simulator
def merge_repeats(ids, lookups, distinct, merged, weights):
    """One access for each record of a look-up, in order of first appearance.

    `ids` int32, `lookups` int64 [n]. Writes `merged` int64 [n], the places of those accesses in the trace,
    and `weights` int64 [n], how many entries each stands for; returns how many there are.
    """
    place_of = np.full(distinct, -1, np.int64)
    count = 0
    for i in range(ids.size):
        place = place_of[ids[i]]
        if place >= 0 and lookups[merged[place]] == lookups[i]:
            weights[place] += 1
            continue
        place_of[ids[i]] = count
        merged[count], weights[count] = i, 1
        count += 1
    return count


@simulator
def reuse_distances(ids, distinct, distances):
    """How many other records were asked for since the last access to the same one; FAR for a first access.

    `ids` int32 [n]; writes `distances` int64 [n]. An LRU cache hits where the distance is below its capacity.
    A Fenwick tree over the accesses holds a 1 where a record was asked for last.
    """
    tree = np.zeros(ids.size + 1, np.int32)
    last = np.full(distinct, -1, np.int64)
    here = 0
    for i in range(ids.size):
        before = last[ids[i]]
        distances[i] = FAR
        if before >= 0:
            older, at = 0, before + 1
            while at > 0:
                older += tree[at]
                at -= at & -at
            distances[i] = here - older
            at = before + 1
            while at <= ids.size:
                tree[at] -= 1
                at += at & -at
        else:
            here += 1
        at = i + 1
        while at <= ids.size:
            tree[at] += 1
            at += at & -at
        last[ids[i]] = i
