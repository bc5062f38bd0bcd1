"""Rows into the blocks of the update log and out of them, and finding them while they wait to be written.

A block of the log (tierstore/updates/blocks.py draws it) holds `count` ids and then as many entries of
`stride` bytes: a row, zeros up to a multiple of 8, and the row's checksum, XXH64 with a seed made of the
table's uuid, the row's id and the block's salt. So a row can be read and checked alone, and a row of
another place, table or time is as wrong as a flipped bit.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes, load_word, store_word, zero_bytes
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.checksum import hash_bytes, page_seed

U64 = np.uint64


@inline_kernel
def row_sum(address, row_bytes, row, low, high, salt):
    return hash_bytes(address, row_bytes, page_seed(row, low ^ salt, high))


@kernel
def pack_entries(rows, row_bytes, stride, ids, low, high, salt, target):
    """Write the entries of rows uint8 [n, row_bytes] with `ids` int64 [n] at address `target`."""
    source = np.int64(rows.ctypes.data)
    for i in range(ids.size):
        entry = target + i * stride
        zero_bytes(entry + stride - 16, 16)
        copy_bytes(entry, source + i * row_bytes, row_bytes)
        store_word(entry + stride - 8, np.int64(row_sum(entry, row_bytes, ids[i], low, high, salt)))
    return rows.size


@kernel
def first_bad_entry(entries, row_bytes, stride, ids, low, high, salt):
    """The first i whose entry is not what was written for ids[i], or -1; entries uint8 [n * stride]."""
    source, found = np.int64(entries.ctypes.data), -1
    for i in range(ids.size):
        entry = source + i * stride
        if row_sum(entry, row_bytes, ids[i], low, high, salt) != U64(load_word(entry + stride - 8)):
            found = i
            break
    return found if entries.size >= 0 else -1


@kernel
def copy_waiting(positions, starts, ends, addresses, stride, row_bytes, out):
    """Copy rows that lie in blocks not written yet; how many were found.

    Row i goes to row i of `out` where `positions[i]` falls into [starts[b], ends[b]) of a block b, whose
    rows lie at addresses[b], densely; all int64, blocks ascending. `stride` is that of the entries in the
    log.
    """
    found = 0
    for i in range(positions.size):
        b = np.searchsorted(starts, positions[i], side="right") - 1
        if b >= 0 and positions[i] < ends[b]:
            place = (positions[i] - starts[b]) // stride
            copy_bytes(out + i * row_bytes, addresses[b] + place * row_bytes, row_bytes)
            found += 1
    return found


@kernel
def copy_pieces(pages, slots, page_offsets, lengths, targets, out):
    """Piece i, lengths[i] bytes at page_offsets[i] of the page in slot slots[i], goes to byte targets[i].

    `pages`: address of 4096-byte slots; the others int64 [n]; `out` an address.
    """
    for i in range(slots.size):
        copy_bytes(out + targets[i], pages + slots[i] * 4096 + page_offsets[i], lengths[i])
