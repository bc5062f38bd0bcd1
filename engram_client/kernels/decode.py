"""One-byte weights to numbers by a table of all there are: one load an element, no arithmetic.

A weight of one byte under a scale of one byte is one of 65,536 numbers, a weight alone one of 256. The
table holds their bits as torch's own arithmetic gives them, so this cannot differ from it. Neighbouring
scales use a few lines of the table, which therefore stay in the nearest cache.
"""

from __future__ import annotations

from typing import Any

from engram_client.jit import kernel

Array = Any  # what numba compiles has types of its own; the docstrings give dtypes and shapes


@kernel
def decode_rows(rows: Array, picks: Array, picking: bool, places: Array, table: Array, out: Array) -> None:
    """rows uint8 [m, row_bytes] -> out int16, int32 or int64 [n, weights], bits of numbers.

    picks int64 [n / group] names, for each group of rows of `out`, the group of `rows` it is decoded
    from; without `picking` rows go one to one. places int64 (row_bytes, first byte of the weights,
    first byte of the scales, scales, rows of a group); table [256, 256] by scale and weight, or
    [1, 256] where there are no scales. rows and out are flat and contiguous.
    """
    row_bytes, weight_at, scale_at, scales, group = places[0], places[1], places[2], places[3], places[4]
    count = picks.size * group if picking else rows.size // row_bytes
    weights = out.size // max(count, 1)
    block = weights // max(scales, 1)
    for n in range(count):
        source = picks[n // group] * group + n % group if picking else n
        start = source * row_bytes
        for b in range(max(scales, 1)):
            part = table[rows[start + scale_at + b] if scales else 0]
            codes = rows[start + weight_at + b * block :][:block]
            numbers = out[n * weights + b * block :][:block]
            for e in range(block):
                numbers[e] = part[codes[e]]
