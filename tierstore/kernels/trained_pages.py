"""Pages of tables that are trained: as those of a packed one, with the page's epoch in word 510.

The epoch is the number of the fold that wrote the page. A page whose epoch is lower than expected is a
stale one: a write that the disk had acknowledged is not there.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes
from engram_client.jit import kernel
from tierstore.kernels.checksum import PAYLOAD_WORDS, page_checksum
from tierstore.kernels.libc import EINTR, EIO, pwrite

PAGE_BYTES = 4096
EPOCH_WORD = 510
U64 = np.uint64


@kernel
def first_wrong_page(pages, slots, page_numbers, expected, low, high):
    """The first i whose page, in slot slots[i], is damaged, misplaced or older than expected[i]; or -1.

    pages uint64 [m, 512]; slots, page_numbers int64 [n]; expected uint32 [n].
    """
    for i in range(slots.size):
        page = pages[slots[i]]
        if page_checksum(page, page_numbers[i], low, high) != page[PAYLOAD_WORDS]:
            return i
        if page[EPOCH_WORD] < expected[i]:
            return i
    return -1


@kernel
def seal_pages_of_epoch(pages, page_numbers, epoch, low, high):
    """Write epoch and checksum of pages uint64 [n, 512], which are to become `page_numbers` int64 [n]."""
    for i in range(page_numbers.size):
        pages[i, EPOCH_WORD] = U64(epoch)
        pages[i, PAYLOAD_WORDS] = page_checksum(pages[i], page_numbers[i], low, high)


@kernel
def put_rows(rows, ids, units, rows_per_page, pages_per_row, room_bytes, pages):
    """Copy rows uint8 [n, row_bytes], whose ids ascend, to where they lie in pages uint64 [m, 512].

    `units` int64 [u], ascending: the page (or, where a row owns pages, the row) whose pages_per_row pages of
    the array come one after another. Every row's unit must be among them.
    """
    row_bytes, number = rows.shape[1], 0
    source, target = np.int64(rows.ctypes.data), np.int64(pages.ctypes.data)
    for i in range(ids.size):
        unit = ids[i] // rows_per_page if rows_per_page else ids[i]
        while units[number] != unit:
            number += 1
        at = target + number * pages_per_row * PAGE_BYTES
        if rows_per_page:
            copy_bytes(at + ids[i] % rows_per_page * row_bytes, source + i * row_bytes, row_bytes)
            continue
        for part in range(pages_per_row):
            done = part * room_bytes
            copy_bytes(
                at + part * PAGE_BYTES, source + i * row_bytes + done, min(room_bytes, row_bytes - done)
            )
    return rows.size + pages.size


@kernel
def write_pages(fd, images, page_numbers):
    """Write images uint64 [n, 512] to pages `page_numbers` int64 [n], ascending, of a file.

    Adjacent ones go together. Returns 0, or minus errno.
    """
    start, source = 0, np.int64(images.ctypes.data)
    while start < page_numbers.size:
        stop = start + 1
        while stop < page_numbers.size and page_numbers[stop] == page_numbers[stop - 1] + 1:
            stop += 1
        done, count = 0, (stop - start) * PAGE_BYTES
        while done < count:
            offset = page_numbers[start] * PAGE_BYTES + done
            wrote = pwrite(fd, source + start * PAGE_BYTES + done, count - done, offset)
            if wrote <= 0 and wrote != -EINTR:
                return wrote if wrote < 0 else -EIO
            done += max(0, wrote)
        start = stop
    return 0 if images.size >= 0 else -EIO
