"""The HBM tier's replacement as a replay at speed: `engram_client.hbm`, entry by entry, without torch.

The tier stands before all others and sees a look-up whole: which entries it holds, which it marks as read,
then its misses, each once, offered to it in the order in which the table is asked for them. A set of 16
ways looks at no more than eight of them a look-up, and counts the marks of its records before the first.
Then it is two queues and ghosts. `engram_client/hbm/replacement.py` tells the rule and why; a test holds
this to it. (Misses of more than a staging buffer come in several batches, each with its eight; not here.)

What the tier misses goes on as the table asks for it: each key once, the keys of an order ascending in
their column, lines filled from the top (`engram_client.hbm.misses.distinct_lines`). So the DRAM tier
behind it sees another trace than it would alone, in another order.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import prefetch_line
from engram_client.arena.layout import ORDER_BITS
from tierbench.policy.compiled import simulator
from tierbench.policy.product import HELD, ROOM

# Those of engram_client.hbm, which cannot be imported without torch; a test holds them to it.
WAYS = 16
ADMISSIONS_PER_SET = 8
TRIAL_WAYS = 3
UNREAD, READ, MAIN, MAIN_READ = 0, 1, 2, 6
INDEX_BYTES_PER_SET = WAYS * (8 + 2 + 1 + 1 + 2) + 1 + 4

AHEAD = 16  # entries; a power of two
ORDER_MASK = (1 << ORDER_BITS) - 1


def sets_within(budget_bytes: int, record_bytes: int) -> int:
    """Sets that a budget holds records in; below 1 it is too small. One set more, and one record, "
    "hold none."""
    set_bytes = WAYS * record_bytes + INDEX_BYTES_PER_SET
    return (budget_bytes - record_bytes - INDEX_BYTES_PER_SET) // set_bytes


def smallest_bytes(record_bytes: int) -> int:
    """The smallest budget that holds a record."""
    return (WAYS + 1) * record_bytes + 2 * INDEX_BYTES_PER_SET


class HbmReplay:
    """An empty tier of so many sets, at most as many as so many accesses can use.

    `width` is how many ids name the records of one position of a table: its orders, or 1 for rows.
    """

    def __init__(self, sets: int, width: int, accesses: int) -> None:
        self.sets = min(sets, max(1, ROOM * accesses // WAYS))
        self._width = width
        self._keys = np.full((self.sets, WAYS), -1, np.int64)
        self._owners = np.zeros((self.sets, WAYS), np.int16)
        self._queues = np.zeros((self.sets, WAYS), np.uint8)
        self._places = np.tile(np.arange(WAYS, dtype=np.uint8), (self.sets, 1))
        self._touched = np.zeros((self.sets, WAYS), np.uint8)
        self._ghosts = np.zeros((self.sets, WAYS), np.int16)
        self._hands = np.zeros(self.sets, np.int8)

    def look_up(
        self, keys: np.ndarray, owners: np.ndarray, ends: np.ndarray, outcome: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Answer consecutive look-ups: HELD in `outcome` uint8 [n] where the tier holds a record.

        `keys`, `owners` int64 [n], owners as the store numbers them; `ends` int64 [look-ups]. Returns what
        is asked of the table instead: keys and owners int64 [m], where each look-up's ends among them,
        and which of the m each entry wants, int64 [n], -1 where the tier had it.
        """
        asked_keys, asked_owners = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
        asked_ends, source = np.empty_like(ends), np.empty(keys.size, np.int64)
        count = _replay(
            self._keys, self._owners, self._queues, self._places, self._touched, self._ghosts, self._hands,
            self._width, keys, owners, ends, outcome, asked_keys, asked_owners, asked_ends, source,
        )  # fmt: skip
        return asked_keys[:count], asked_owners[:count], asked_ends, source


@simulator
def _mix(key, owner):
    """The products of 32 and 31 bits stay below 2^63."""
    mixed = key ^ (owner * 0x2545F491)
    mixed = ((mixed & 0xFFFFFFFF) * 0x5851F42D) ^ ((mixed >> 32) * 0x14057B7F)
    mixed ^= mixed >> 29
    mixed = ((mixed & 0xFFFFFFFF) * 0x6C078965) ^ ((mixed >> 32) * 0x3C6EF35F)
    return mixed ^ (mixed >> 29)


@simulator
def _set_of(key, owner, sets):
    return (((_mix(key, owner) >> 31) & 0x7FFFFFFF) * sets) >> 31


@simulator
def _fingerprint(key, owner):
    return max(1, _mix(key, owner) & 0x7FFF)


@simulator
def _own(owner, width):
    """The tier numbers the orders of its tables without gaps."""
    return ((owner >> ORDER_BITS) - 1) * width + (owner & ORDER_MASK)


@simulator
def _ask_for(set_keys, set_owners, touched, key, owner):
    which = _set_of(key, owner, len(set_keys))
    line = np.int64(set_keys.ctypes.data) + which * (8 * WAYS)
    prefetch_line(line)
    prefetch_line(line + 64)
    prefetch_line(np.int64(set_owners.ctypes.data) + which * (2 * WAYS))
    prefetch_line(np.int64(touched.ctypes.data) + which * WAYS)
    return which


@simulator
def _way_of(set_keys, set_owners, which, key, owner):
    for w in range(WAYS):
        if set_keys[which, w] == key and set_owners[which, w] == owner:
            return w
    return -1


@simulator
def _count_reads(queues, touched, which):
    for w in range(WAYS):
        if touched[which, w]:
            touched[which, w] = 0
            queues[which, w] = READ if queues[which, w] < MAIN else min(queues[which, w] + 1, MAIN_READ)


@simulator
def _oldest(queues, places, which):
    """The way whose turn it is in a set that is full."""
    small = main = -1
    smalls = 0
    for w in range(WAYS):
        if queues[which, w] < MAIN:
            smalls += 1
            if small < 0 or places[which, w] < places[which, small]:
                small = w
        elif main < 0 or places[which, w] < places[which, main]:
            main = w
    return small if smalls >= TRIAL_WAYS or main < 0 else main


@simulator
def _make_newest(queues, places, which, way, queue):
    for w in range(WAYS):
        if places[which, w] > places[which, way]:
            places[which, w] -= 1
    places[which, way], queues[which, way] = WAYS - 1, queue


@simulator
def _take(set_keys, set_owners, queues, places, ghosts, hands, which, key, owner):
    """Let a newcomer in that the set does not hold."""
    known, way = False, -1
    for w in range(WAYS):
        if ghosts[which, w] == _fingerprint(key, owner):
            known, ghosts[which, w] = True, 0
        if way < 0 and set_keys[which, w] == -1:
            way = w
    if way < 0:
        way = _oldest(queues, places, which)
        while queues[which, way] != UNREAD and queues[which, way] != MAIN:
            queue = MAIN if queues[which, way] == READ else queues[which, way] - 1
            _make_newest(queues, places, which, way, queue)
            way = _oldest(queues, places, which)
        hands[which] = (hands[which] + 1) % WAYS
        ghosts[which, hands[which]] = _fingerprint(set_keys[which, way], np.int64(set_owners[which, way]))
    _make_newest(queues, places, which, way, MAIN if known else UNREAD)
    set_keys[which, way], set_owners[which, way] = key, owner


@simulator
def _find(set_keys, set_owners, touched, width, keys, owners, start, end, outcome, misses):
    """Look for all entries and mark what is read; returns how many were missing."""
    sets_ahead = np.empty(AHEAD, np.int64)
    missing = 0
    for i in range(start, min(start + AHEAD, end)):
        sets_ahead[i & AHEAD - 1] = _ask_for(set_keys, set_owners, touched, keys[i], _own(owners[i], width))
    for i in range(start, end):
        which, owner = sets_ahead[i & AHEAD - 1], _own(owners[i], width)
        if i + AHEAD < end:
            sets_ahead[i & AHEAD - 1] = _ask_for(
                set_keys, set_owners, touched, keys[i + AHEAD], _own(owners[i + AHEAD], width)
            )
        found = _way_of(set_keys, set_owners, which, keys[i], owner)
        if found < 0:
            misses[missing] = i
            missing += 1
        else:
            outcome[i] = HELD
            touched[which, found] = 1
    return missing


@simulator
def _ask_table(keys, owners, misses, width, first, asked_keys, asked_owners, source):
    """Write each missing record once, as the table asks for them; returns where they end, from `first` on.

    Lines are filled column by column: line by line the columns' keys lie one after another.
    """
    names = np.empty(misses.size, np.int64)
    columns = np.empty(misses.size, np.int64)
    places = np.empty(misses.size, np.int64)
    lengths = np.zeros(width, np.int64)
    longest = 0
    starts = np.zeros(width + 1, np.int64)
    for m in range(misses.size):
        columns[m] = owners[misses[m]] & ORDER_MASK
        starts[columns[m] + 1] += 1
    for c in range(width):
        starts[c + 1] += starts[c]
    filled = starts[:-1].copy()
    for m in range(misses.size):
        places[filled[columns[m]]] = misses[m]
        filled[columns[m]] += 1
    order = np.empty(misses.size, np.int64)
    for c in range(width):
        here = places[starts[c] : starts[c + 1]]
        order[starts[c] : starts[c + 1]] = here[np.argsort(keys[here])]
        for m in range(starts[c], starts[c + 1]):
            key = keys[order[m]]
            if m == starts[c] or key != names[starts[c] + lengths[c] - 1]:
                names[starts[c] + lengths[c]] = key
                lengths[c] += 1
            source[order[m]] = lengths[c] - 1  # its line, for now
        longest = max(longest, lengths[c])
    line_starts = np.empty((longest, width), np.int64)
    at = first
    base = owners[misses[0]] & ~ORDER_MASK
    for line in range(longest):
        for c in range(width):
            line_starts[line, c] = at
            if line < lengths[c]:
                asked_keys[at], asked_owners[at] = names[starts[c] + line], base + c
                at += 1
    for m in range(misses.size):
        i = misses[m]
        source[i] = line_starts[source[i], owners[i] & ORDER_MASK]
    return at


@simulator
def _replay(
    set_keys, set_owners, queues, places, touched, ghosts, hands, width, keys, owners, ends, outcome,
    asked_keys, asked_owners, asked_ends, source,
):  # fmt: skip
    start = longest = 0
    for end in ends:
        longest, start = max(longest, end - start), end
    misses = np.empty(longest, np.int64)
    taken = np.zeros(len(set_keys), np.uint8)  # newcomers of this look-up, by set
    asked = start = 0
    for lookup in range(ends.size):
        end = ends[lookup]
        source[start:end] = -1
        missing = _find(set_keys, set_owners, touched, width, keys, owners, start, end, outcome, misses)
        first = asked
        if missing:
            asked = _ask_table(keys, owners, misses[:missing], width, first, asked_keys, asked_owners, source)
            _admit(
                set_keys, set_owners, queues, places, touched, ghosts, hands, width, asked_keys, asked_owners,
                first, asked, taken,
            )  # fmt: skip
        asked_ends[lookup] = asked
        start = end
    return asked


@simulator
def _admit(
    set_keys, set_owners, queues, places, touched, ghosts, hands, width, keys, owners, first, last, taken
):  # fmt: skip
    """Offer records to their sets, in the order in which they were asked for."""
    for i in range(first, last):
        owner = _own(owners[i], width)
        which = _set_of(keys[i], owner, len(set_keys))
        if taken[which] == 0:
            _count_reads(queues, touched, which)
        if taken[which] < ADMISSIONS_PER_SET:
            taken[which] += 1
            _take(set_keys, set_owners, queues, places, ghosts, hands, which, keys[i], owner)
    for i in range(first, last):
        taken[_set_of(keys[i], _own(owners[i], width), len(set_keys))] = 0
