"""Which rows an arena in training holds, for moving them into another one."""

from __future__ import annotations

from engram_client.arena.atomics import load_half
from engram_client.arena.layout import LINE_BYTES, TAGS_AT, WAYS
from engram_client.jit import kernel
from tierstore.kernels.trained_arena import first_to_write_back


@kernel
def list_rows(index, first, last, ways):
    """List the ways of sets [first, last) that hold rows as set * WAYS + way in `ways` int64; how many.

    Of each set the row that would leave first comes first: taken in one after another elsewhere, those that
    are worth most are the last to leave.
    """
    listed = 0
    for which in range(first, last):
        line, left = index + which * LINE_BYTES, 0
        for way in range(WAYS):
            left |= (load_half(line + TAGS_AT + 2 * way) != 0) << way
        while left:
            way = first_to_write_back(line, left)
            left &= ~(1 << way)
            ways[listed] = which * WAYS + way
            listed += 1
    return listed
