"""The table of records being read right now: (key, owner) -> ticket, open addressing.

One read serves everybody who wants the record: whoever finds it here waits for the ticket instead
of reading. Deletion shifts later entries back, so there are no tombstones and a long-lived table
stays as fast as a new one. Callers hold the table's lock.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.read import mix
from engram_client.jit import inline_kernel, kernel

EMPTY = -1


@inline_kernel
def home_of(key, owner, mask):
    return np.int64(mix(key, owner) & np.uint64(mask))


@inline_kernel
def place_of(keys, owners, key, owner):
    """Where this record stands, or the empty place where it would."""
    mask = keys.size - 1
    place = home_of(key, owner, mask)
    while keys[place] != EMPTY and not (keys[place] == key and owners[place] == owner):
        place = (place + 1) & mask
    return place


@kernel
def claim(keys, owners, tickets, wanted_keys, wanted_owners, ticket, room, found):
    """Enter the wanted records that nobody reads yet under `ticket`.

    `keys`, `owners`, `tickets` int64 are the table; `room` bounds the new entries. Writes
    `found` int64 [n]: the ticket that reads each record, `ticket` itself where it is the
    caller's to read. Returns the number of entries made.
    """
    made = 0
    for i in range(wanted_keys.size):
        place = place_of(keys, owners, wanted_keys[i], wanted_owners[i])
        if keys[place] != EMPTY:
            found[i] = tickets[place]
            continue
        found[i] = ticket
        if made < room:
            keys[place], owners[place], tickets[place] = wanted_keys[i], wanted_owners[i], ticket
            made += 1
    return made


@inline_kernel
def remove_at(keys, owners, tickets, place):
    """Empty one place and close the gap."""
    mask = keys.size - 1
    gap, probe = place, place
    while True:
        probe = (probe + 1) & mask
        if keys[probe] == EMPTY:
            break
        home = home_of(keys[probe], owners[probe], mask)
        if ((probe - home) & mask) >= ((probe - gap) & mask):
            keys[gap], owners[gap], tickets[gap] = keys[probe], owners[probe], tickets[probe]
            gap = probe
    keys[gap] = EMPTY


@kernel
def release(keys, owners, tickets, done_keys, done_owners, ticket):
    """Remove the caller's entries. Returns how many were removed."""
    removed = 0
    for i in range(done_keys.size):
        place = place_of(keys, owners, done_keys[i], done_owners[i])
        if keys[place] != EMPTY and tickets[place] == ticket:
            remove_at(keys, owners, tickets, place)
            removed += 1
    return removed
