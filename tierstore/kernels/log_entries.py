"""Rows out of the update log: which pages to read, then each row checked and copied where its pages landed.

Also the newest version of each row among blocks of the log, in the order of row ids.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes, load_word
from engram_client.jit import kernel
from tierstore.kernels.runs import FEW, insert_sort, sort_by_digits
from tierstore.kernels.update_log import row_sum

U64 = np.uint64
PAGE_BYTES = 4096


@kernel
def plan_entries(starts, stride, gap_pages_max, run_pages_max, first_pages, page_counts, run_of):
    """Runs of pages that cover entries of `stride` bytes at bytes `starts` int64 [n] of a file, ascending.

    An entry lies in one run whole: run_of[i]. Entries share a run where at most `gap_pages_max` pages lie
    between them and the run has no more than `run_pages_max`. Returns the number of runs.
    """
    runs = 0
    for i in range(starts.size):
        first, end = starts[i] // PAGE_BYTES, (starts[i] + stride - 1) // PAGE_BYTES + 1
        if runs:
            begin = first_pages[runs - 1]
            gap = first - begin - page_counts[runs - 1]
            if gap <= gap_pages_max and end - begin <= run_pages_max:
                page_counts[runs - 1] = max(page_counts[runs - 1], end - begin)
                run_of[i] = runs - 1
                continue
        first_pages[runs], page_counts[runs] = first, end - first
        run_of[i] = runs
        runs += 1
    return runs


@kernel
def take_entries(
    buffer, starts, run_of, first_run, first_pages, slots, stride, row_bytes, ids, positions, blocks, salts,
    low, high, targets, out,
):  # fmt: skip
    """Check entry i, of row ids[i], and copy its row to row targets[i] of `out`; the first bad i, or -1.

    Runs, from number `first_run` on, landed at slots[run] of `buffer` from page first_pages[run] on; starts,
    run_of, ids, positions, targets int64 [n], positions in the log ascending; `blocks` int64 and `salts`
    uint64 [b]: where each block starts, ascending, and its salt; buffer and out are addresses.
    """
    block = np.searchsorted(blocks, positions[0], side="right") - 1 if positions.size else 0
    for i in range(starts.size):
        while block + 1 < blocks.size and blocks[block + 1] <= positions[i]:
            block += 1
        run = run_of[i] - first_run
        entry = buffer + (slots[run] - first_pages[run]) * PAGE_BYTES + starts[i]
        found = U64(load_word(entry + stride - 8))
        if row_sum(entry, row_bytes, ids[i], low, high, salts[block]) != found:
            return i
        copy_bytes(out + targets[i] * row_bytes, entry, row_bytes)
    return -1


@kernel
def newest_rows(ids, counts, first_entries, stride, order, rows, positions):
    """The distinct rows of blocks, ascending, and where in the log each lies last; how many there are.

    `ids` int64 [n]: those of all blocks, one block after the other as they lie in the log; counts and
    first_entries int64 [blocks]; order, rows and positions int64 [n] to write to.
    """
    if ids.size <= FEW:
        insert_sort(ids, order)
    else:
        least, most, bits = ids.min(), ids.max(), 0
        while (most - least) >> bits:
            bits += 1
        sort_by_digits(ids, order, least, bits)
    ends = np.cumsum(counts)
    found = 0
    for i in range(ids.size):
        place = order[i]
        if i + 1 < ids.size and ids[order[i + 1]] == ids[place]:
            continue  # the sort is stable: a newer one follows
        block = np.searchsorted(ends, place, side="right")
        rows[found] = ids[place]
        positions[found] = first_entries[block] + (place - (ends[block] - counts[block])) * stride
        found += 1
    return found
