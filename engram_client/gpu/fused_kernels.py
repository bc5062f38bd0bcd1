"""Triton: rows to numbers, and V4.1's gate, each in one pass over memory. `fused.py` launches and tries them.

Checked under Triton's interpreter and by compiling for sm_90; never run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _e4m3(codes):
    """int32 codes of FP8 E4M3FN to float32, exactly."""
    exponents, digits = (codes >> 3) & 15, codes & 7
    normal = ((exponents + 120) << 23) | (digits << 20)
    values = normal.to(tl.float32, bitcast=True)
    values = tl.where(exponents == 0, digits.to(tl.float32) * 0.001953125, values)  # 2^-9
    values = tl.where((codes & 127) == 127, float("nan"), values)
    return tl.where((codes & 128) != 0, -values, values)


@triton.jit
def _e8m0(codes):
    """int32 codes of E8M0 to float32: 2^(code - 127), NaN for 255."""
    bits = codes << 23
    bits = tl.where(codes == 0, 0x00400000, bits)  # 2^-127 lies below the smallest normal number
    bits = tl.where(codes == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_rows(
    rows, index, out, count, global_scale,
    ROW_BYTES: tl.constexpr, WEIGHT_AT: tl.constexpr, SCALE_AT: tl.constexpr,
    WEIGHTS: tl.constexpr, SCALE_BLOCK: tl.constexpr, GROUP: tl.constexpr, INDEXED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """FP8 E4M3 rows, wherever they lie, to numbers one after another. ROWS of `out` a program.

    rows   uint8, row r at r * ROW_BYTES; weights at byte WEIGHT_AT of it, E8M0 scales at SCALE_AT, one for
           each SCALE_BLOCK weights; none where SCALE_BLOCK is 0
    index  int64: row n of `out` is row index[n // GROUP] * GROUP + n % GROUP; without INDEXED row n
    out    [count, WEIGHTS] of a floating dtype; every number is also multiplied by `global_scale`
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted = n < count
    source = n
    if INDEXED:
        source = tl.load(index + n // GROUP, mask=wanted, other=0) * GROUP + n % GROUP
    lanes = tl.arange(0, TILE)
    inside = wanted[:, None] & (lanes < WEIGHTS)[None, :]
    row = rows + source[:, None] * ROW_BYTES
    codes = tl.load(row + WEIGHT_AT + lanes[None, :], mask=inside, other=0).to(tl.int32)
    values = _e4m3(codes)
    if SCALE_BLOCK:
        scales = tl.load(row + SCALE_AT + (lanes // SCALE_BLOCK)[None, :], mask=inside, other=127)
        values = values * _e8m0(scales.to(tl.int32))
    values = values * global_scale
    tl.store(out + n[:, None] * WEIGHTS + lanes[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate(
    x, projected, query_weight, key_weight, dead, out, root_of_width, eps,
    STREAMS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, HAS_DEAD: tl.constexpr,
):  # fmt: skip
    """out_h = x_h + sigmoid(signed root of the normed dot of x_h and key_h) * value; one program a stream.

    x, out            [n, STREAMS, WIDTH]
    projected         [n, STREAMS + 1, WIDTH]: the keys, and the value
    query_weight, key_weight [STREAMS, WIDTH]
    dead              bool [n]: positions that pass unchanged
    The arithmetic is float32.
    """
    position, stream = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, TILE)
    inside = lanes < WIDTH
    at = (position * STREAMS + stream) * WIDTH + lanes
    line = projected + position * (STREAMS + 1) * WIDTH
    streams = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    keys = tl.load(line + stream * WIDTH + lanes, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(query_weight + stream * WIDTH + lanes, mask=inside, other=0.0).to(tl.float32)
    weight *= tl.load(key_weight + stream * WIDTH + lanes, mask=inside, other=0.0).to(tl.float32)
    dot = tl.sum(streams * weight * keys, axis=0)
    of_streams = tl.sqrt_rn(tl.sum(streams * streams, axis=0) / WIDTH + eps)
    of_keys = tl.sqrt_rn(tl.sum(keys * keys, axis=0) / WIDTH + eps)
    similarity = dot / of_streams / of_keys / root_of_width
    root = tl.sqrt_rn(tl.maximum(tl.abs(similarity), 1e-6))
    root = tl.where(similarity < 0, -root, tl.where(similarity > 0, root, similarity))
    let_in = 1.0 / (1.0 + tl.exp(-root))
    if HAS_DEAD:
        let_in = tl.where(tl.load(dead + position) != 0, 0.0, let_in)
    value = tl.load(line + STREAMS * WIDTH + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (streams + let_in * value).to(out.dtype.element_ty), mask=inside)
