"""Token ids to n-gram keys on a device, in Triton; the twins of `device.hash_tokens`.

A key needs the last few ids of its position and nothing else: no lane talks to another. `_read_back` reads
one of those ids and tells what it ends and whether it is foreign; `hash_all` makes every key of a position,
`key_of` those of one order each, for a look-up that hashes what it looks up. Ids are read as they are,
int32 or int64; what follows is signed 64-bit arithmetic that never overflows (`check_scheme`).

    rules int64 [3 + n]   raw vocabulary size, filler id as hashed, raw EOS or -1, then the n multipliers

Interpreted and compiled for sm_90 by the tests, not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

REFUSED = tl.constexpr(-2)


@triton.jit
def _read_back(
    tokens,
    dead,
    history,
    fold,
    vocabulary,
    sequence,
    at,
    length,
    valid,
    HAS_DEAD: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_FOLD: tl.constexpr,
):
    """The id at place `at` of its sequence, negative before the chunk: raw, absent, foreign, as hashed."""
    inside = at >= 0
    absent = ~inside
    raw = tl.load(tokens + sequence * length + at, mask=valid & inside, other=-1).to(tl.int64)
    if SPAN > 0:
        before = valid & ~inside & (at >= -SPAN)
        raw = tl.where(inside, raw, tl.load(history + sequence * SPAN + SPAN + at, mask=before, other=-1))
        absent = ~inside & (raw == -1)
    if HAS_DEAD:
        silent = tl.load(dead + sequence * length + at, mask=valid & inside, other=0)
        absent = absent | (silent != 0)
    foreign = (raw < 0) | (raw >= vocabulary)
    hashed = raw
    if HAS_FOLD:
        hashed = tl.load(fold + raw, mask=valid & ~foreign, other=0)
    return raw, absent, foreign, hashed


@triton.jit
def key_of(
    tokens,
    dead,
    history,
    fold,
    rules,
    sequence,
    place,
    order,
    length,
    valid,
    HAS_DEAD: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_FOLD: tl.constexpr,
    NGRAM: tl.constexpr,
):
    """The keys of orders `order` (0 for bigrams) at places of sequences; all of one shape."""
    vocabulary, filler, eos = tl.load(rules), tl.load(rules + 1), tl.load(rules + 2)
    readable = valid
    wrong = valid & ~valid
    mixed = tl.zeros_like(place)
    for back in tl.static_range(NGRAM):
        raw, absent, foreign, hashed = _read_back(
            tokens, dead, history, fold, vocabulary, sequence, place - back, length, valid,
            HAS_DEAD, SPAN, HAS_FOLD,
        )  # fmt: skip
        if back == 0:
            readable = readable & ~absent
        else:
            readable = readable & ~absent & ~((eos >= 0) & (raw == eos))
        counts = back <= order + 1
        wrong = wrong | (counts & readable & foreign)
        term = tl.where(readable, hashed, filler) * tl.load(rules + 3 + back)
        mixed = mixed ^ tl.where(counts, term, 0)
    return tl.where(wrong, REFUSED, mixed)


@triton.jit(do_not_specialize=["positions", "length"])
def hash_all(
    tokens,
    dead,
    history,
    fold,
    rules,
    keys,
    positions,
    length,
    HAS_DEAD: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_FOLD: tl.constexpr,
    NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """keys int64 [positions, NGRAM - 1] of tokens [positions / length, length]."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = position < positions
    sequence, place = position // length, position % length
    vocabulary, filler, eos = tl.load(rules), tl.load(rules + 1), tl.load(rules + 2)
    readable = valid
    wrong = valid & ~valid
    mixed = tl.zeros_like(position)
    for back in tl.static_range(NGRAM):
        raw, absent, foreign, hashed = _read_back(
            tokens, dead, history, fold, vocabulary, sequence, place - back, length, valid,
            HAS_DEAD, SPAN, HAS_FOLD,
        )  # fmt: skip
        if back == 0:
            readable = readable & ~absent
        else:
            readable = readable & ~absent & ~((eos >= 0) & (raw == eos))
        wrong = wrong | (readable & foreign)
        mixed = mixed ^ (tl.where(readable, hashed, filler) * tl.load(rules + 3 + back))
        if back > 0:
            key = tl.where(wrong, REFUSED, mixed)
            tl.store(keys + position * (NGRAM - 1) + back - 1, key, mask=valid)
