"""Which pages look-ups read for the records that they miss, and how many rows and pages there are at all.

A look-up reads the pages that the rows of its missing records lie on, each once, as the service plans them.
Finding repeats takes no sorting: a page remembers the number of the look-up that read it last. A
number that was never given means a page that nobody has read yet.

Rows are hashed, so each one is a cache miss here too, twice: its page's number and its own bit. So the
records to be read are listed first, and what a record will touch is asked for DEPTH records ahead.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import prefetch_line
from tierbench.policy.compiled import simulator
from tierbench.policy.product import READ

DEPTH = 8  # records; a power of two
ENTRY, LOOKUP, TOKEN, KIND, FIELDS = range(5)  # of a record that is read


@simulator
def list_reads(outcome, ends, first_tokens, layers, columns, first_token, lookups_before, reads):
    """The entries that were read; writes `reads` int64 [n, FIELDS] and returns how many there are.

    Look-ups go through the layers in turn and are numbered from `lookups_before` + 1; the first token of
    the first one is number `first_token`.
    """
    start = count = 0
    for lookup in range(ends.size):
        layer = lookup % layers
        for i in range(start, ends[lookup]):
            if outcome[i] == READ:
                reads[count, ENTRY], reads[count, LOOKUP] = i, lookups_before + lookup + 1
                reads[count, TOKEN] = first_token + first_tokens[lookup] + (i - start) // columns
                reads[count, KIND] = layer * columns + (i - start) % columns
                count += 1
        start = ends[lookup]
    return count


@simulator
def _ask_for_rows(
    keys, read, columns, sizes, offsets, firsts, rows_per_page, read_last, rows_seen, rows, pages
):
    """Derive the rows of one record and have what is known of them come closer."""
    kind = read[KIND]
    layer = kind // columns
    key = np.uint64(keys[read[ENTRY]])
    for head in range(sizes.shape[1]):
        row = np.int64(key % np.uint64(sizes[kind, head])) + offsets[kind, head]
        rows[head] = firsts[layer, 1] + row
        pages[head] = firsts[layer, 0] + row // rows_per_page
        prefetch_line(np.int64(read_last.ctypes.data) + 4 * pages[head])
        prefetch_line(np.int64(rows_seen.ctypes.data) + (rows[head] >> 3))


@simulator
def count_pages(
    keys, reads, columns, sizes, offsets, firsts, rows_per_page, pages_per_row, read_last, rows_seen,
    pages_read,
):  # fmt: skip
    """Count the pages that look-ups read for their missing records, `reads` int64 [m, FIELDS].

    `sizes`, `offsets` int64 [kinds, heads] of the hash; `firsts` int64 [layers, 2]: page and row that a
    layer begins with when all layers lie one after another. `read_last` uint32 [pages of all layers] and
    `rows_seen` uint8 [rows of all layers / 8], bits, are kept from call to call. Adds to `pages_read`
    uint32 [tokens], for each token, the pages that its records are the first of their look-up to want.
    Returns how many rows and pages were never read before.
    """
    rows, pages = np.empty((DEPTH, sizes.shape[1]), np.int64), np.empty((DEPTH, sizes.shape[1]), np.int64)
    new_rows = new_pages = 0
    for asked in range(reads.shape[0] + DEPTH):
        place = asked & DEPTH - 1
        if asked >= DEPTH:
            lookup, token = reads[asked - DEPTH, LOOKUP], reads[asked - DEPTH, TOKEN]
            for head in range(sizes.shape[1]):
                row, page = rows[place, head], pages[place, head]
                bit = 1 << (row & 7)
                if not rows_seen[row >> 3] & bit:
                    rows_seen[row >> 3] |= bit
                    new_rows += 1
                if read_last[page] != lookup:
                    new_pages += pages_per_row if read_last[page] == 0 else 0
                    read_last[page] = lookup
                    pages_read[token] += pages_per_row
        if asked < reads.shape[0]:
            _ask_for_rows(
                keys, reads[asked], columns, sizes, offsets, firsts, rows_per_page, read_last, rows_seen,
                rows[place], pages[place],
            )  # fmt: skip
    return new_rows, new_pages
