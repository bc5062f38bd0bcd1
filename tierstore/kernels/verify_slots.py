"""Checking wanted pages inside a staging buffer that may also hold pages nobody wants."""

from __future__ import annotations

from engram_client.jit import kernel
from tierstore.kernels.checksum import PAYLOAD_WORDS, page_checksum


@kernel
def first_bad_slot(pages, slots, page_numbers, start, uuid_lo, uuid_hi):
    """First i >= start whose page is damaged or misplaced, or -1.

    `pages` uint64 [capacity, 512]; page_numbers[i] of the file should lie in pages[slots[i]].
    """
    for i in range(start, slots.size):
        words = pages[slots[i]]
        if words[PAYLOAD_WORDS] != page_checksum(words, page_numbers[i], uuid_lo, uuid_hi):
            return i
    return -1
