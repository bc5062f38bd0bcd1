"""From keys to row ids, and from pages to rows."""

from __future__ import annotations

from engram_client.arena.atomics import copy_bytes
from engram_client.jit import kernel


@kernel
def derive_row_ids(keys, orders, head_sizes, head_offsets, row_ids):
    """Row ids of records: key mod head size + head offset.

    `keys`, `orders` int64 [m]; `head_sizes`, `head_offsets` int64 [orders, heads]; writes
    `row_ids` int64 [m, heads].
    """
    for i in range(keys.size):
        order = orders[i]
        for h in range(head_sizes.shape[1]):
            row_ids[i, h] = keys[i] % head_sizes[order, h] + head_offsets[order, h]


@kernel
def scatter_rows(buffer, page_slots, page_offsets, row_bytes, targets, out):
    """Copy rows out of pages.

    Row i lies at buffer + page_slots[i] * 4096 + page_offsets[i] and goes to out + targets[i];
    `buffer` and `out` are addresses, the arrays int64 [n].
    """
    for i in range(page_slots.size):
        copy_bytes(out + targets[i], buffer + page_slots[i] * 4096 + page_offsets[i], row_bytes)


@kernel
def scatter_pieces(buffer, page_slots, lengths, targets, out):
    """Copy the pieces of rows larger than a page; piece i is lengths[i] bytes at a page's start."""
    for i in range(page_slots.size):
        copy_bytes(out + targets[i], buffer + page_slots[i] * 4096, lengths[i])


@kernel
def copy_parts(source, places, source_stride, part_at, part_bytes, targets, out):
    """Copy a part of record places[i] to entry targets[i] of `out` (part_bytes each)."""
    for i in range(places.size):
        copy_bytes(out + targets[i] * part_bytes, source + places[i] * source_stride + part_at, part_bytes)
