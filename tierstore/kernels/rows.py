"""From keys to row ids, and parts of records to where they are wanted."""

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
def copy_parts(source, places, source_stride, part_at, part_bytes, targets, out):
    """Copy a part of record places[i] to entry targets[i] of `out` (part_bytes each)."""
    for i in range(places.size):
        copy_bytes(out + targets[i] * part_bytes, source + places[i] * source_stride + part_at, part_bytes)
