"""Look-ups and admissions of the HBM tier, in Triton: one launch each.

`look_up` has one program for `RECORDS` records. It makes their keys, or reads them; finds their ways;
copies their records, or decodes them, straight into the output; and lists what is missing. Each lane copies
16 bytes at a time where records are multiples of that: `HEAD` words, the largest power of two that a record
holds, and then `TAIL`.

Admissions run at the same time on another stream, and a captured graph waits for nobody. So a look-up notes
the sequence of its set, which is odd while somebody writes there, probes only if it is even, reads the
record into registers, and stores it only if the sequence is still the same. Else the record is missing,
which costs a look-up further down and never a wrong row. Three things make that order hold on a device:

 * the number of the set that is probed depends on the sequence, so the keys cannot be read before it;
 * the record's loads come before a barrier, the second look at the sequence after it, as an atomic with
   acquire and release;
 * all of it bypasses the caches of single processors (.cg), which do not learn of others' writes.

`admit` has one program for each newcomer, of which the first of a set takes in all of that set, one after
another, as `replacement.admit_plainly` does. One admission runs at a time: they all go to one stream.

    found int64 [3 + 2 n]    how many are missing, then for each its place in the batch, and its key; in any
    order
    counters int64 [6]       asked, misses, masked, admitted, evicted, left out

Interpreted and compiled for sm_90 by the tests, not yet run on a GPU: what the order rests on is read from
NVIDIA's memory model, not measured. `tests/gpu/test_hbm_on_a_gpu.py` is there to try it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engram_client.hashing.device_kernels import key_of
from engram_client.hbm import index, replacement
from engram_client.hbm.decoding import decode_rows, store_rows

WAYS = tl.constexpr(index.WAYS)
BITS_31 = tl.constexpr(index.BITS_31)
BITS_32 = tl.constexpr(index.BITS_32)
PRINT_MASK = tl.constexpr(index.PRINT_MASK)
OWNER_FACTOR = tl.constexpr(index.OWNER_FACTOR)
LOW_0, HIGH_0 = (tl.constexpr(number) for number in index.ROUNDS[0])
LOW_1, HIGH_1 = (tl.constexpr(number) for number in index.ROUNDS[1])
UNREAD, READ = tl.constexpr(replacement.UNREAD), tl.constexpr(replacement.READ)
MAIN, MAIN_READ = tl.constexpr(replacement.MAIN), tl.constexpr(replacement.MAIN_READ)
PINNED, NEWEST = tl.constexpr(replacement.PINNED), tl.constexpr(replacement.NEWEST)
TRIAL_WAYS = tl.constexpr(replacement.TRIAL_WAYS)


@triton.jit
def mix(key, owner):
    """`index.mix`, for int64 and integers of any kind."""
    mixed = key ^ (owner.to(tl.int64) * OWNER_FACTOR)
    mixed = ((mixed & BITS_32) * LOW_0) ^ ((mixed >> 32) * HIGH_0)
    mixed = mixed ^ (mixed >> 29)
    mixed = ((mixed & BITS_32) * LOW_1) ^ ((mixed >> 32) * HIGH_1)
    return mixed ^ (mixed >> 29)


@triton.jit
def find(index_keys, index_owners, sequences, sets, key, owner, CHECKED: tl.constexpr):
    """Slot, whether the record is there, set and its sequence, for keys [R]."""
    known = key >= 0
    line = (((mix(tl.where(known, key, 0), owner) >> 31) & BITS_31) * sets) >> 31
    line = tl.where(known, line, sets)
    sequence = tl.zeros_like(line).to(tl.int32)
    if CHECKED:
        sequence = tl.load(sequences + line, cache_modifier=".cg")
        line = tl.where((sequence & 1) == 0, line, sets)
    ways = tl.arange(0, WAYS)
    places = line[:, None] * WAYS + ways[None, :]
    same = tl.load(index_keys + places, cache_modifier=".cg") == key[:, None]
    same = same & (tl.load(index_owners + places, cache_modifier=".cg") == owner[:, None])
    way = tl.max(tl.where(same & known[:, None], ways[None, :] + 1, 0), 1) - 1
    return line * WAYS + tl.maximum(way, 0), way >= 0, line, sequence


@triton.jit
def load_words(source, line, wanted, WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Records `line` [R] in registers: words [R, HEAD] and [R, TAIL], zeros where they are not wanted."""
    start = source + line[:, None] * WORDS
    head = tl.load(start + tl.arange(0, HEAD)[None, :], mask=wanted[:, None], other=0, cache_modifier=".cg")
    tail = head
    if TAIL > 0:
        last = HEAD + tl.arange(0, TAIL)[None, :]
        tail = tl.load(start + last, mask=wanted[:, None] & (last < WORDS), other=0, cache_modifier=".cg")
    return head, tail


@triton.jit
def store_words(
    out, line, valid, good, head, tail, WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Write them to records `line` of `out`; zeros where they are not good."""
    start = out + line[:, None] * WORDS
    tl.store(start + tl.arange(0, HEAD)[None, :], tl.where(good[:, None], head, 0), mask=valid[:, None])
    if TAIL > 0:
        last = HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(start + last, tl.where(good[:, None], tail, 0), mask=valid[:, None] & (last < WORDS))


@triton.jit
def list_missing(found, counters, place, key, valid, missing):
    """Note what a program did not find, and what it was not asked for."""
    count = tl.sum(missing.to(tl.int64), 0)
    if count > 0:
        start = tl.atomic_add(found, count, sem="relaxed")
        at = 1 + 2 * (start + tl.cumsum(missing.to(tl.int64), 0) - 1)
        tl.store(found + at, place, mask=missing)
        tl.store(found + at + 1, key, mask=missing)
        tl.atomic_add(counters + 1, count, sem="relaxed")
    masked = tl.sum((valid & (key == -1)).to(tl.int64), 0)
    if masked > 0:
        tl.atomic_add(counters + 2, masked, sem="relaxed")


@triton.jit(do_not_specialize=["first_owner", "sets", "n", "length"])
def look_up(
    keys, tokens, dead, history, fold, rules,
    index_keys, index_owners, touched, sequences, records, records_as_bytes,
    out, found, counters, global_scale, first_owner, sets, n, length,
    WIDTH: tl.constexpr, RECORDS: tl.constexpr, WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    CHECKED: tl.constexpr, HASHED: tl.constexpr, HAS_DEAD: tl.constexpr, SPAN: tl.constexpr,
    HAS_FOLD: tl.constexpr, DECODED: tl.constexpr, ROWS: tl.constexpr, ROWS_2: tl.constexpr,
    ROW_BYTES: tl.constexpr, WEIGHT_AT: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, SCALE_AT: tl.constexpr, HAS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Record i is that of keys[i] and owner first_owner + i % WIDTH; HASHED makes the keys, and "
    "writes them."""
    place = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    valid = place < n
    if HASHED:
        key = key_of(
            tokens, dead, history, fold, rules, place // WIDTH // length, place // WIDTH % length,
            place % WIDTH, length, valid, HAS_DEAD, SPAN, HAS_FOLD, WIDTH + 1,
        )  # fmt: skip
        if HAS_DEAD:  # no rows are wanted there
            key = tl.where(tl.load(dead + place // WIDTH, mask=valid, other=0) != 0, -1, key)
        tl.store(keys + place, key, mask=valid)
        tl.debug_barrier()  # what follows wants keys in several layouts, and would hash for each of them
    key = tl.load(keys + place, mask=valid, other=-1)
    owner = (first_owner + place % WIDTH).to(tl.int16)
    slot, there, line, sequence = find(index_keys, index_owners, sequences, sets, key, owner, CHECKED)
    if DECODED:
        numbers = decode_rows(
            records_as_bytes, slot, there, global_scale, RECORDS, ROWS, ROWS_2, ROW_BYTES, WEIGHT_AT, DIM,
            BLOCKS, BLOCK, SCALE_AT, HAS_GLOBAL,
        )  # fmt: skip
    else:
        head, tail = load_words(records, slot, there, WORDS, HEAD, TAIL)
    good = there
    if CHECKED:
        tl.debug_barrier()
        now = tl.atomic_add(sequences + line, 0, mask=there, sem="acq_rel")
        good = there & (now == sequence)
    if DECODED:
        numbers = tl.where(good[:, None, None, None], numbers, 0.0)
        store_rows(out, place, valid, numbers, ROWS, ROWS_2, DIM, BLOCKS, BLOCK)
    else:
        store_words(out, place, valid, good, head, tail, WORDS, HEAD, TAIL)
    seen = tl.load(touched + slot, mask=good, other=1)
    tl.store(touched + slot, tl.full([RECORDS], 1, tl.uint8), mask=good & (seen == 0))
    list_missing(found, counters, place, key, valid, valid & ~good & (key != -1))
    if tl.program_id(0) == 0:
        tl.atomic_add(counters, n, sem="relaxed")


@triton.jit
def scatter(
    source, source_as_bytes, lines, out, places, global_scale, n,
    RECORDS: tl.constexpr, WORDS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    DECODED: tl.constexpr, ROWS: tl.constexpr, ROWS_2: tl.constexpr, ROW_BYTES: tl.constexpr,
    WEIGHT_AT: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_AT: tl.constexpr, HAS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Record lines[i] of the source to record places[i] of `out`, decoded or not."""
    item = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    valid = item < n
    line = tl.load(lines + item, mask=valid, other=0)
    place = tl.load(places + item, mask=valid, other=0)
    if DECODED:
        numbers = decode_rows(
            source_as_bytes, line, valid, global_scale, RECORDS, ROWS, ROWS_2, ROW_BYTES, WEIGHT_AT, DIM,
            BLOCKS, BLOCK, SCALE_AT, HAS_GLOBAL,
        )  # fmt: skip
        store_rows(out, place, valid, numbers, ROWS, ROWS_2, DIM, BLOCKS, BLOCK)
    else:
        head, tail = load_words(source, line, valid, WORDS, HEAD, TAIL)
        store_words(out, place, valid, valid, head, tail, WORDS, HEAD, TAIL)
