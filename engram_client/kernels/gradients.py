"""Gradients of the same row put together: in the order they come, so that runs repeat bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_client.jit import kernel
from engram_client.kernels.distinct import distinct_lines

Array = Any  # what numba compiles has types of its own; the docstrings give dtypes and shapes
Count = Any  # an int64

EXPONENT = np.uint32(0x7F800000)  # all of it set: an infinity or not a number


@kernel
def add_rows(gradients: Array, inverse: Array, sums: Array) -> None:
    """sums[inverse[i]] += gradients[i] for i in order; float32 [n, dim], int64 [n], float32 [d, dim].

    An entry whose inverse is -1 belongs to no row.
    """
    for i in range(inverse.size):
        row = inverse[i]
        if row >= 0:
            for j in range(gradients.shape[1]):
                sums[row, j] += gradients[i, j]


@kernel
def mark_not_finite(gradients: Array, marks: Array) -> Count:
    """Set marks bool [n] where a row of float32 [n, dim] holds an infinity or NaN; how many such rows."""
    found = 0
    for i in range(gradients.shape[0]):
        bits = gradients[i].view(np.uint32)
        bad = np.uint32(0)
        for j in range(bits.size):
            bad |= np.uint32((bits[j] & EXPONENT) == EXPONENT)
        if bad:
            marks[i] = True
            found += 1
    return found


def as_float32(gradients: np.ndarray) -> np.ndarray:
    """float32 [n, dim], C-contiguous, of float32, float16 or the bits of bfloat16; not copied if it is
    that."""
    if gradients.dtype == np.uint16:
        return (gradients.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(gradients, np.float32)


def distinct_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ids other than -1 in order of first appearance, and the place of each among them.

    int64 [n] -> int64 [d], int64 [n] (-1 for -1).
    """
    wanted = ids if (whole := not (ids == -1).any()) else ids[ids != -1]
    bits = max(1, (2 * wanted.size).bit_length())
    table = np.full(1 << bits, -1, np.int64)
    lines, places = np.empty((wanted.size, 1), np.int64), np.empty(wanted.size, np.int64)
    found = distinct_lines(wanted.reshape(-1, 1), table, 64 - bits, lines, places)
    if whole:
        return lines[:found, 0], places
    inverse = np.full(ids.size, -1, np.int64)
    inverse[ids != -1] = places
    return lines[:found, 0], inverse


def sum_by_row(ids: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids int64 [d] and their summed gradients [d, dim], of [n] and [n, dim] as `as_float32` takes
    them.

    Where every id is another one these are what was given; else the sums are float32.
    """
    distinct, inverse = distinct_ids(ids)
    if distinct.size == ids.size and ids.size:
        return ids, gradients
    sums = np.zeros((distinct.size, gradients.shape[1]), np.float32)
    add_rows(as_float32(gradients), inverse, sums)
    return distinct, sums
