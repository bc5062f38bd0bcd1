"""W-TinyLFU (Einziger, Friedman, Manes, ACM TOS 2017), fully associative, as published.

One hundredth of the room is an LRU window for newcomers; the rest is a segmented LRU, a fifth of it
on probation and four fifths protected. What leaves the window is admitted only if a count-min
sketch (four rows of 4-bit counters, all halved after ten accesses a record of room) says it is
asked for more often than the record that probation would evict.

The arguments are those of `classical`.
"""

from __future__ import annotations

import numpy as np

from tierbench.policy.compiled import simulator

ROWS, COUNT_MAX = 4, 15
SAMPLES_PER_RECORD = 10
WINDOW, PROBATION, PROTECTED = 0, 1, 2


@simulator
def _cell(x, row, width):
    h = np.uint64(x + 1) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(row + 1) * np.uint64(0xD1B54A32D192ED03)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((h >> np.uint64(29)) & np.uint64(width - 1))


@simulator
def _estimate(sketch, x):
    least = COUNT_MAX
    for row in range(ROWS):
        least = min(least, sketch[row, _cell(x, row, sketch.shape[1])])
    return least


@simulator
def _count(sketch, x):
    for row in range(ROWS):
        cell = _cell(x, row, sketch.shape[1])
        if sketch[row, cell] < COUNT_MAX:
            sketch[row, cell] += 1


@simulator
def _halve(sketch):
    for row in range(ROWS):
        for cell in range(sketch.shape[1]):
            sketch[row, cell] //= 2


@simulator
def _unlink(older, newer, x):
    older[newer[x]] = older[x]
    newer[older[x]] = newer[x]


@simulator
def _link_newest(older, newer, head, x):
    newest = older[head]
    older[x], newer[x] = newest, head
    newer[newest] = x
    older[head] = x


@simulator
def _touch(older, newer, segment, sizes, protected_max, distinct, x):
    """A hit: newest of its segment; from probation up to protected, whose oldest comes down."""
    _unlink(older, newer, x)
    if segment[x] == PROBATION:
        segment[x] = PROTECTED
        sizes[PROTECTED] += 1
        sizes[PROBATION] -= 1
        if sizes[PROTECTED] > protected_max:
            y = newer[distinct + PROTECTED]
            _unlink(older, newer, y)
            segment[y] = PROBATION
            sizes[PROTECTED] -= 1
            sizes[PROBATION] += 1
            _link_newest(older, newer, distinct + PROBATION, y)
    _link_newest(older, newer, distinct + segment[x], x)


@simulator
def w_tinylfu(ids, distinct, capacity, found):
    window_max = max(1, capacity // 100)
    main_max = max(1, capacity - window_max)
    protected_max = main_max * 4 // 5
    width = 16
    while width < 4 * capacity:
        width *= 2
    sketch = np.zeros((ROWS, width), np.uint8)
    older, newer = np.empty(distinct + 3, np.int32), np.empty(distinct + 3, np.int32)
    for segment_ in range(3):
        older[distinct + segment_] = newer[distinct + segment_] = distinct + segment_
    segment = np.full(distinct, -1, np.int8)
    sizes = np.zeros(3, np.int64)
    counted = 0
    for i in range(ids.size):
        x = ids[i]
        _count(sketch, x)
        counted += 1
        if counted == SAMPLES_PER_RECORD * capacity:
            _halve(sketch)
            counted //= 2
        if segment[x] >= 0:
            found[i] = 1
            _touch(older, newer, segment, sizes, protected_max, distinct, x)
            continue
        segment[x] = WINDOW
        sizes[WINDOW] += 1
        _link_newest(older, newer, distinct + WINDOW, x)
        if sizes[WINDOW] <= window_max:
            continue
        candidate = newer[distinct + WINDOW]
        _unlink(older, newer, candidate)
        sizes[WINDOW] -= 1
        if sizes[PROBATION] + sizes[PROTECTED] >= main_max:
            holder = PROBATION if sizes[PROBATION] else PROTECTED
            victim = newer[distinct + holder]
            if _estimate(sketch, candidate) <= _estimate(sketch, victim):
                segment[candidate] = -1
                continue
            _unlink(older, newer, victim)
            segment[victim] = -1
            sizes[holder] -= 1
        segment[candidate] = PROBATION
        sizes[PROBATION] += 1
        _link_newest(older, newer, distinct + PROBATION, candidate)
