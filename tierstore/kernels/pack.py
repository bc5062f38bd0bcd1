"""Interleaving the fields of rows into pages, and sealing the pages while they are in cache.

A checkpoint keeps the fields of a table apart (all weights, then all scales); a row file keeps
the fields of a row together. `staging` holds a batch's fields, each dense: field f of row r
starts at byte `starts[f] + r * sizes[f]`. Bytes of a page between its last row and its checksum
become zero, whatever the buffer held before.

Fields are 8 to some thousand bytes at any alignment, so each is one memcpy: 3 to 15 times as fast
as numba's own element loops, which must allow for overlapping arrays. The kernels trust their
arguments: the caller checks that `staging` and `pages` are large enough.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes, zero_bytes
from engram_client.jit import kernel
from tierstore.kernels.checksum import PAYLOAD_WORDS, page_checksum

PAGE_BYTES = 4096
PAYLOAD_BYTES = PAYLOAD_WORDS * 8


@kernel
def pack_rows(staging, starts, sizes, rows, rows_per_page, pages, first_page_number, low, high):
    """Fill and seal pages with `rows` rows, `rows_per_page` to a page; the number of pages filled.

    staging: uint8 [m]; starts, sizes: int64 [fields], bytes; pages: uint64 [n, 512]; low, high:
    the words of the file's uuid.
    """
    filled = (rows + rows_per_page - 1) // rows_per_page
    origin = np.int64(staging.ctypes.data)
    for p in range(filled):
        page = pages[p]
        target = np.int64(page.ctypes.data)
        end = target + PAYLOAD_BYTES
        for row in range(p * rows_per_page, min((p + 1) * rows_per_page, rows)):
            for f in range(sizes.size):
                copy_bytes(target, origin + starts[f] + row * sizes[f], sizes[f])
                target += sizes[f]
        zero_bytes(target, end - target)
        page[PAYLOAD_WORDS] = page_checksum(page, first_page_number + p, low, high)
    return filled


@kernel
def pack_large_rows(staging, starts, sizes, rows, pages_per_row, pages, first_page_number, low, high):
    """As `pack_rows`, for rows that own `pages_per_row` pages each."""
    origin = np.int64(staging.ctypes.data)
    for row in range(rows):
        p = row * pages_per_row
        target = np.int64(pages[p].ctypes.data)
        room = PAYLOAD_BYTES
        for f in range(sizes.size):
            source = origin + starts[f] + row * sizes[f]
            left = sizes[f]
            while left > 0:
                if room == 0:
                    p += 1
                    target = np.int64(pages[p].ctypes.data)
                    room = PAYLOAD_BYTES
                count = min(left, room)
                copy_bytes(target, source, count)
                target += count
                source += count
                room -= count
                left -= count
        zero_bytes(target, room)
    for p in range(rows * pages_per_row):
        pages[p, PAYLOAD_WORDS] = page_checksum(pages[p], first_page_number + p, low, high)
    return rows * pages_per_row
