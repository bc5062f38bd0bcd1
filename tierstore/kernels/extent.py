"""The record extent's kernels: its index, its entries in pages, and taking them out again.

The index is int64 [sets, 8], one cache line a set. A word is `fingerprint << 44 | sequence`, 0 where it is
empty. `sequence` numbers the records in the order in which they were written, so it tells both where
a record lies (sequence mod slots) and whether it has been overwritten (sequence < oldest). Words are read and
written whole, so looking needs no lock; who inserts or removes holds one.

An entry is 32 bytes of identity and a piece of a record (tierstore/tiers/extent_layout.py draws it).
`identities` int64 [tables, 2] holds the two words of each table's generation, zeros for tables that
are not kept; a record's table is owner >> ORDER_BITS.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes, load_word, store_word, zero_bytes
from engram_client.arena.layout import ORDER_BITS
from engram_client.arena.read import mix, set_of
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.checksum import PAYLOAD_WORDS, page_checksum

WAYS = 8
SEQUENCE_BITS = 44  # more than fifty years at ten thousand records a second
SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1
FINGERPRINT_MASK = (1 << 19) - 1  # a word stays positive
IDENTITY_BYTES = 32
PAGE_BYTES = 4096
ORDER_MASK = (1 << ORDER_BITS) - 1
UNASKED, GOOD, FOREIGN, DAMAGED, UNREAD = range(5)  # fates of records


@inline_kernel
def hash_of(key, owner, identities):
    """The same in every process: it depends on the generation, not on this process' number for it."""
    return mix(key, identities[owner >> ORDER_BITS, 0] + (owner & ORDER_MASK))


@inline_kernel
def fingerprint_of(h):
    return np.int64(h & np.uint64(FINGERPRINT_MASK))


@inline_kernel
def is_kept(owner, identities):
    table = owner >> ORDER_BITS
    return identities[table, 0] != 0 or identities[table, 1] != 0


@kernel
def probe_index(index, keys, owners, identities, oldest, sequences):
    """Write each record's sequence to `sequences` int64 [n], -1 where none of at least `oldest` is known.

    A fingerprint may be another record's: what lies there must be compared in full.
    """
    for i in range(keys.size):
        sequences[i] = -1
        if not is_kept(owners[i], identities):
            continue
        h = hash_of(keys[i], owners[i], identities)
        which, wanted = set_of(h, len(index)), fingerprint_of(h)
        for way in range(WAYS):
            word = index[which, way]
            sequence = word & SEQUENCE_MASK
            if word >> SEQUENCE_BITS == wanted and sequence >= oldest and sequence > sequences[i]:
                sequences[i] = sequence


@kernel
def insert_into_index(index, hashes, first, count):
    """Enter records `first`, `first + 1`, ... of which hashes[0..count) are the hashes.

    One takes the place of its own fingerprint, else of the oldest of its set; empty is older than any.
    """
    for i in range(count):
        h = np.uint64(hashes[i])
        which, fingerprint = set_of(h, len(index)), fingerprint_of(h)
        chosen = 0
        for way in range(WAYS):
            word = index[which, way]
            if word != 0 and word >> SEQUENCE_BITS == fingerprint:
                chosen = way
                break
            if (word & SEQUENCE_MASK) < (index[which, chosen] & SEQUENCE_MASK):
                chosen = way
        index[which, chosen] = (fingerprint << SEQUENCE_BITS) | (first + i)


@inline_kernel
def forget(index, h, sequence):
    which = set_of(h, len(index))
    word = (fingerprint_of(h) << SEQUENCE_BITS) | sequence
    for way in range(WAYS):
        if index[which, way] == word:
            index[which, way] = 0


@kernel
def remove_from_index(index, keys, owners, identities, sequences):
    """Forget exactly these records at these sequences."""
    for i in range(keys.size):
        forget(index, hash_of(keys[i], owners[i], identities), sequences[i])


@kernel
def withdraw_from_index(index, hashes, first, count):
    """Forget what `insert_into_index` entered."""
    for i in range(count):
        forget(index, np.uint64(hashes[i]), first + i)


@inline_kernel
def detail_of(owner, begin, record_bytes):
    return (owner & ORDER_MASK) | (begin // 8 << 8) | (record_bytes << 32)


@inline_kernel
def write_entry(entry, key, owner, identities, begin, record_bytes, source, count):
    table = owner >> ORDER_BITS
    store_word(entry, key)
    store_word(entry + 8, identities[table, 0])
    store_word(entry + 16, identities[table, 1])
    store_word(entry + 24, detail_of(owner, begin, record_bytes))
    copy_bytes(entry + IDENTITY_BYTES, source, count)


@inline_kernel
def is_entry_of(entry, key, owner, identities, begin, record_bytes):
    """Whether exactly this piece of this record of this generation lies here."""
    table = owner >> ORDER_BITS
    return (
        load_word(entry) == key
        and load_word(entry + 8) == identities[table, 0]
        and load_word(entry + 16) == identities[table, 1]
        and load_word(entry + 24) == detail_of(owner, begin, record_bytes)
    )


@kernel
def pack_entries(buffer, first, shape, keys, owners, identities, source, places, hashes):
    """Put records into a write buffer as its records `first`, `first + 1`, ...; pages are not sealed.

    `buffer` and `source` are addresses; record i lies at source + places[i] * record bytes. `shape`
    is record bytes, pages and records of a group, its starts int64 [records + 1] and pieces int64 [n, 4].
    Writes `hashes` int64, from `first` on. What is left of a group is zeros.
    """
    record_bytes, group_pages, group_records, starts, pieces = shape
    for i in range(keys.size):
        at = first + i
        hashes[at] = np.int64(hash_of(keys[i], owners[i], identities))
        record = source + places[i] * record_bytes
        group, inside = buffer + at // group_records * group_pages * PAGE_BYTES, at % group_records
        if inside == 0:
            zero_bytes(group, group_pages * PAGE_BYTES)
        for p in range(starts[inside], starts[inside + 1]):
            entry, begin = group + pieces[p, 0] * PAGE_BYTES + pieces[p, 1], pieces[p, 2]
            write_entry(
                entry, keys[i], owners[i], identities, begin, record_bytes, record + begin, pieces[p, 3]
            )


@kernel
def take_unwritten(buffer, shape, places, wanted, keys, owners, identities, out, fates):
    """Copy to `out` what still waits in a write buffer; note in `fates` uint8 [n] what is another's.

    Record wanted[i] of `keys` and `owners` is record places[i] of the buffer at this address, `shape` is
    as in `pack_entries`. It goes to out + wanted[i] * record bytes.
    """
    record_bytes, group_pages, group_records, starts, pieces = shape
    for i in range(wanted.size):
        r = wanted[i]
        group, inside = (
            buffer + places[i] // group_records * group_pages * PAGE_BYTES,
            places[i] % group_records,
        )
        for p in range(starts[inside], starts[inside + 1]):
            entry, begin = group + pieces[p, 0] * PAGE_BYTES + pieces[p, 1], pieces[p, 2]
            if is_entry_of(entry, keys[r], owners[r], identities, begin, record_bytes):
                copy_bytes(out + r * record_bytes + begin, entry + IDENTITY_BYTES, pieces[p, 3])
            else:
                fates[r] = FOREIGN


@kernel
def take_entries(
    pages, page_slots, page_numbers, low, high, piece_slots, offsets, lengths, targets, record_bytes, keys,
    owners, identities, out, fates,
):  # fmt: skip
    """Copy to `out` what was wanted and is there; note in `fates` uint8 [records] what is not.

    page_numbers[i] of the file should lie in pages[page_slots[i]] (uint64 [capacity, 512]). Piece i, of
    lengths[i] bytes, lies at byte offsets[i] of pages[piece_slots[i]] and goes to out + targets[i], record
    targets[i] // record_bytes of `keys` and `owners`. `low`, `high` are the file's uuid.
    """
    sound = np.zeros(len(pages), np.uint8)
    for i in range(page_slots.size):
        words = pages[page_slots[i]]
        sound[page_slots[i]] = words[PAYLOAD_WORDS] == page_checksum(words, page_numbers[i], low, high)
    origin = np.int64(pages.ctypes.data)
    for i in range(piece_slots.size):
        r = targets[i] // record_bytes
        begin = targets[i] - r * record_bytes
        entry = origin + piece_slots[i] * PAGE_BYTES + offsets[i]
        if not sound[piece_slots[i]]:
            fates[r] = DAMAGED
        elif not is_entry_of(entry, keys[r], owners[r], identities, begin, record_bytes):
            fates[r] = max(fates[r], FOREIGN)
        else:
            copy_bytes(out + targets[i], entry + IDENTITY_BYTES, lengths[i])
