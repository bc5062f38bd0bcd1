"""Rows of FP8 E4M3, with E8M0 scales or none, to BF16 while a kernel has them in registers.

The arithmetic is `engram_client.dequantize`'s: weight times scale in float32, times the global scale, rounded
once. The sign and the seven other bits of E4M3, moved to where float32 has them, are the number times 2^-120,
subnormals included; so one multiplication by a power of two decodes it exactly. 0x7F is NaN.

    tile [RECORDS, ROWS_2, BLOCKS, BLOCK]    rows of a record and elements of a block padded to powers of two
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _from_e4m3(code):
    bits = code.to(tl.int32)
    number = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number * 1.329227995784916e36)  # 2^120


@triton.jit
def _from_e8m0(code):
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def decode_rows(
    data, line, there, global_scale,
    RECORDS: tl.constexpr, ROWS: tl.constexpr, ROWS_2: tl.constexpr, ROW_BYTES: tl.constexpr,
    WEIGHT_AT: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_AT: tl.constexpr, HAS_GLOBAL: tl.constexpr,
):  # fmt: skip
    """The numbers of records `line` [RECORDS] of `data` uint8 [lines, ROWS * ROW_BYTES], BF16."""
    row = tl.arange(0, ROWS_2)
    start = (line[:, None] * ROWS + row[None, :]) * ROW_BYTES
    wanted = there[:, None] & (row < ROWS)[None, :]
    element = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    code = tl.load(
        data + start[:, :, None, None] + WEIGHT_AT + element[None, None, :, :],
        mask=wanted[:, :, None, None] & (element < DIM)[None, None, :, :], other=0, cache_modifier=".cg",
    )  # fmt: skip
    numbers = _from_e4m3(code)
    if SCALE_AT > 0:
        at = data + start[:, :, None] + SCALE_AT + tl.arange(0, BLOCKS)[None, None, :]
        scale = tl.load(at, mask=wanted[:, :, None], other=127, cache_modifier=".cg")
        numbers = numbers * _from_e8m0(scale)[:, :, :, None]
    if HAS_GLOBAL:
        numbers = numbers * global_scale
    return numbers.to(tl.bfloat16)


@triton.jit
def store_rows(
    out, place, valid, numbers,
    ROWS: tl.constexpr, ROWS_2: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a tile to records `place` of `out` bfloat16 [n, ROWS, DIM]."""
    row = tl.arange(0, ROWS_2)
    start = (place[:, None] * ROWS + row[None, :]) * DIM
    wanted = valid[:, None] & (row < ROWS)[None, :]
    element = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(
        out + start[:, :, None, None] + element[None, None, :, :], numbers,
        mask=wanted[:, :, None, None] & (element < DIM)[None, None, :, :],
    )  # fmt: skip
