"""Weights of packed rows as float32, without torch: what training begins with, decoded row by row.

    element = weight * scale of its block [* global_scale]

in float32, one rounding for each product; for E4M3 under E8M0 the product is exact. The client's
`dequantize` does the same on tensors; tests hold the two together.
"""

from __future__ import annotations

import numpy as np

from engram_client.errors import BadRequest
from engram_client.spec import RowLayout

DECODABLE = ("float8_e4m3fn", "int8", "bfloat16", "float16", "float32")
SCALES = ("float8_e8m0fnu", "bfloat16", "float16", "float32")
LOW_HALF = 16  # bits of a float32 that a bfloat16 lacks
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF


def check_decodable(name: str, layout: RowLayout) -> None:
    """Raise BadRequest where nothing says which numbers these rows stand for."""
    weight = layout.field("weight")
    scales = [f for f in layout.fields if f.name == "scale"]
    if weight.dtype not in DECODABLE:
        raise BadRequest(
            f"table {name!r}: its weights are {weight.dtype}, which is opaque here (for instance IQ4_NL or "
            f"NF4); training begins with one of {', '.join(DECODABLE)}: convert them first"
        )
    for scale in scales:
        if scale.dtype not in SCALES or weight.count % scale.count:
            raise BadRequest(
                f"table {name!r}: {scale.count} scales of {scale.dtype} for {weight.count} weights cannot be "
                f"decoded; scales are {', '.join(SCALES)}, and divide the weights into equal blocks"
            )
    if len(layout.fields) > 1 + len(scales):
        have = ", ".join(f.name for f in layout.fields)
        raise BadRequest(f"table {name!r}: rows hold {have}; those that are decoded hold weight and scale")


def weights_of(layout: RowLayout, rows: np.ndarray) -> np.ndarray:
    """Rows uint8 [n, row_bytes] of a layout that `check_decodable` has passed, to float32 [n, dim]."""
    values = _numbers(layout, rows, "weight")
    if any(f.name == "scale" for f in layout.fields):
        scales = _numbers(layout, rows, "scale")
        blocks = values.reshape(len(rows), scales.shape[1], -1)
        values = (blocks * scales[:, :, None]).reshape(len(rows), -1)
    if layout.global_scale is not None:
        values = values * np.float32(layout.global_scale)
    return values


def column(rows: np.ndarray, layout: RowLayout, name: str) -> np.ndarray:
    """One field of rows uint8 [n, row_bytes]: uint8 [n, field bytes], C-contiguous."""
    start = layout.offset_bytes(name)
    return np.ascontiguousarray(rows[:, start : start + layout.field(name).bytes])


def bfloat16_of(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as uint16; NaN stays NaN."""
    bits = values.view(np.uint32)
    even = (bits >> LOW_HALF) & 1
    rounded = ((bits + (np.uint32(0x7FFF) + even)) >> LOW_HALF).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = ((bits[is_nan] >> LOW_HALF) | 0x40).astype(np.uint16)
    return rounded


def float32_of(halves: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 to float32."""
    return (halves.astype(np.uint32) << LOW_HALF).view(np.float32)


def _numbers(layout: RowLayout, rows: np.ndarray, name: str) -> np.ndarray:
    dtype, raw = layout.field(name).dtype, column(rows, layout, name)
    if dtype in _CODES:
        return _CODES[dtype][raw]
    if dtype == "bfloat16":
        return float32_of(raw.view(np.uint16))
    return raw.view({"int8": np.int8, "float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)


def _e4m3() -> np.ndarray:
    """Every number of 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities, one NaN a sign."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, (codes & 7) / 8
    sizes = np.where(exponents == 0, np.ldexp(mantissas, -6), np.ldexp(1 + mantissas, exponents - 7))
    sizes[codes & 0x7F == E4M3_NAN] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


def _e8m0() -> np.ndarray:
    """2^(code - 127); 255 is NaN (OCP MX v1.0)."""
    scales = np.ldexp(1.0, np.arange(256) - 127)
    scales[E8M0_NAN] = np.nan
    return scales.astype(np.float32)


_CODES = {"float8_e4m3fn": _e4m3(), "float8_e8m0fnu": _e8m0()}
