"""The hot loops of hashing: tokens to n-gram keys, keys to row ids, row ids back to keys.

Free functions on contiguous arrays, compiled once for one set of types: int64 ids, bool masks,
uint64 head sizes. Each answers with the flat index of the first input it refuses, or -1; its
caller words the error. Output past a refused input is undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_client.jit import inline_kernel, kernel

Array = Any  # what numba compiles has types of its own; the docstrings give dtypes and shapes
Index = Any  # an int64

KEY_MAX = np.uint64(2**63 - 1)


@inline_kernel
def _push(window: Array, folded: int) -> None:
    """Make `folded` the newest id of the window; the oldest falls out."""
    for back in range(window.size - 1, 0, -1):
        window[back] = window[back - 1]
    window[0] = folded


@inline_kernel
def _replay(window: Array, history: Array, fold: Array, eos: int) -> Index:
    """Fill the window from the ids before this chunk, oldest first; -1 means none.

    Returns the reach: how many ids, counted back from the chunk's start, shifts may read.
    """
    reach = 0
    for raw in history:
        if raw < 0:
            reach = 0
            continue
        _push(window, fold[raw] if fold.size else raw)
        reach = 0 if raw == eos else reach + 1
    return reach


@kernel
def hash_tokens(
    tokens: Array, dead: Array, history: Array, fold: Array, limits: Array, multipliers: Array, keys: Array
) -> Index:
    """N-gram keys of whole sequences or of chunks of them.

    tokens int64 [B,T]; dead bool [B,T], or [0,0] where none is; history int64 [B,L] raw ids
    before the chunk with -1 for none, or [0,0] at the start; fold int64 [vocab], or [0] where
    raw ids are hashed; limits int64 (raw vocabulary size, filler id as hashed, raw EOS or -1);
    multipliers int64 [n]; keys int64 [B,T,n-1] is written.
    """
    sequences, length = tokens.shape
    vocab_size, filler, eos = limits[0], limits[1], limits[2]
    window = np.empty(multipliers.size, np.int64)
    for b in range(sequences):
        reach = _replay(window, history[b], fold, eos) if history.size else 0
        for t in range(length):
            raw = tokens[b, t]
            alive = dead.size == 0 or not dead[b, t]
            if alive and (raw < 0 or raw >= vocab_size):
                return b * length + t
            if alive:
                _push(window, fold[raw] if fold.size else raw)
            else:
                reach = 0
            mixed = (window[0] if alive else filler) * multipliers[0]
            for back in range(1, multipliers.size):
                mixed ^= (window[back] if back <= reach else filler) * multipliers[back]
                keys[b, t, back - 1] = mixed
            reach = reach + 1 if alive and raw != eos else 0
    return -1


@kernel
def step_over(tokens: Array, dead: Array, counts: Array, vocab_size: int, ids: Array) -> Index:
    """Move each sequence's window of raw ids over its new tokens, or change nothing.

    tokens int64 [B,T]; dead bool [B,T] or [0,0]; counts int64 [B], how many tokens of each
    sequence to step over, or [0] for all; ids int64 [B,L], newest last, is changed.
    """
    sequences, length = tokens.shape
    span = ids.shape[1]
    for b in range(sequences):
        for t in range(counts[b] if counts.size else length):
            alive = dead.size == 0 or not dead[b, t]
            if alive and (tokens[b, t] < 0 or tokens[b, t] >= vocab_size):
                return b * length + t
    for b in range(sequences):
        count = counts[b] if counts.size else length
        for place in range(span):
            t = count - span + place
            if t < 0:
                ids[b, place] = ids[b, place + count]
            else:
                ids[b, place] = tokens[b, t] if dead.size == 0 or not dead[b, t] else -1
    return -1


@kernel
def rows_of_keys(keys: Array, sizes: Array, offsets: Array, rows: Array) -> Index:
    """Row ids of n-gram keys: key mod size + offset; a key of -1 gives rows of -1.

    keys int64 [N,orders]; sizes uint64 and offsets int64 [orders,heads];
    rows int64 [N,orders,heads] is written.
    """
    count, orders = keys.shape
    heads = sizes.shape[1]
    for n in range(count):
        for o in range(orders):
            key = keys[n, o]
            if key < -1:
                return n * orders + o
            for h in range(heads):
                rest = np.int64(np.uint64(key) % sizes[o, h])
                rows[n, o, h] = rest + offsets[o, h] if key >= 0 else -1
    return -1


@inline_kernel
def _recover_one(rows: Array, plan: tuple[Array, ...], n: int, o: int, rests: Array) -> Index:
    """The key of record (n, o); -1 where all its rows are -1; -2 where they are no one n-gram's."""
    sizes, offsets, order, counts, inverses, digit_max = plan
    heads = sizes.shape[1]
    absent = 0
    for i in range(heads):
        row = rows[n, o, order[o, i]]
        rest = row - offsets[o, i]
        if row == -1:
            absent += 1
        elif rest < 0 or np.uint64(rest) >= sizes[o, i]:
            return -2
        rests[i] = np.uint64(rest)
    if absent:
        return -1 if absent == heads else -2
    value, radix = rests[0], sizes[o, 0]
    for i in range(1, counts[o]):
        size = sizes[o, i]
        digit = (rests[i] + size - value % size) * inverses[o, i] % size
        if digit > digit_max[o, i]:
            return -2
        value += digit * radix
        radix *= size
    if value > KEY_MAX:
        return -2
    for i in range(counts[o], heads):
        if value % sizes[o, i] != rests[i]:
            return -2
    return np.int64(value)


@kernel
def keys_of_rows(rows: Array, plan: tuple[Array, ...], keys: Array) -> Index:
    """N-gram keys of whole records of row ids.

    Mixed radix: key = v0 + v1*p0 + v2*p0*p1 + ..., each digit found modulo its own head size.
    Only the last product can pass 2^63; `digit_max` refuses it before it is formed.

    rows int64 [N,orders,heads]; keys int64 [N,orders] is written; plan holds, per order, the
    heads with those first that determine the key: sizes uint64 and offsets int64
    [orders,heads] in that order, the order itself int64 [orders,heads], how many determine the
    key int64 [orders], and for these, uint64 [orders,heads], the inverse of the product of the
    sizes before modulo the size, and the largest digit that keeps below 2^63.
    """
    count, orders, heads = rows.shape
    rests = np.empty(heads, np.uint64)
    for n in range(count):
        for o in range(orders):
            key = _recover_one(rows, plan, n, o, rests)
            if key == -2:
                return n * orders + o
            keys[n, o] = key
    return -1
