"""A trained row under an optimizer's hands: where its fields lie, and how it is written unseen.

    row = weight | master | state of the optimizer

`weight` is what readers get: float32, or bfloat16, which is rounded to the nearest even from `master`
(float32) where the row has one. Optimizers compute in float32 and never see the difference: `weights_of`
gives them the row's own float32 field, or a decoded copy, and `finish` rounds what came of it.

A row in the arena is written under its set's sequence, so that readers see it before or after and
never torn; `guard` is the address of that sequence, 0 for a row in private memory. Writers of
one arena hold its lock.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from engram_client.arena.atomics import (
    fence_release,
    float_pointer,
    half_pointer,
    load_word,
    prefetch_line,
    store_release,
    store_word,
)
from engram_client.arena.read import CACHE_LINE_BYTES, ask_for
from engram_client.jit import inline_kernel

# Words of the places array: elements of the weight, where fields begin in bytes (-1: there is none).
DIM, WEIGHT_AT, MASTER_AT, ROUNDED, ROW_BYTES, STATE_AT = range(6)  # ROUNDED: 1 where weights are bfloat16
STATES = 3  # fields of state an optimizer may have; STATE_AT + i is where number i begins
PLACES = STATE_AT + STATES
AHEAD = 12  # rows on their way from memory while one is computed


@inline_kernel
def floats_at(address, count):
    return carray(float_pointer(address), (count,))


@inline_kernel
def ask_ahead(rows, guards, places, i):
    """Have a row that is soon to be updated come closer, and the sequence that guards it."""
    ahead = i + AHEAD
    if ahead < rows.size and rows[ahead] != 0:
        ask_for(rows[ahead], rows[ahead] + places[ROW_BYTES])
        if guards[ahead] != 0:
            prefetch_line(guards[ahead] & -CACHE_LINE_BYTES)


@inline_kernel
def begin(guard):
    """From here on readers throw their copies away."""
    if guard != 0:
        store_word(guard, load_word(guard) + 1)
        fence_release()


@inline_kernel
def end(guard):
    if guard != 0:
        store_release(guard, load_word(guard) + 1)


@inline_kernel
def weights_of(row, places, scratch):
    """The float32 weights to compute with: a field of the row, or `scratch` with decoded ones."""
    dim = places[DIM]
    if places[ROUNDED] == 0:
        return floats_at(row + places[WEIGHT_AT], dim)
    if places[MASTER_AT] >= 0:
        return floats_at(row + places[MASTER_AT], dim)
    rounded = carray(half_pointer(row + places[WEIGHT_AT]), (dim,))
    bits = scratch.view(np.uint32)
    for j in range(dim):
        bits[j] = np.uint32(rounded[j]) << np.uint32(16)
    return scratch


@inline_kernel
def finish(row, places, weights):
    """Round computed weights into the field that readers get, where that is not the same one."""
    if places[ROUNDED] != 0:
        rounded = carray(half_pointer(row + places[WEIGHT_AT]), (weights.size,))
        bits = weights.view(np.uint32)
        for j in range(weights.size):
            value = bits[j]
            even = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            rounded[j] = np.uint16(0x7FC0) if nan else np.uint16(even)
