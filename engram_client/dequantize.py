"""Opaque row bytes to numbers: the weights of a row, times its scales, as a torch tensor.

A row is its fields one after another without padding, little-endian. For DeepSeek-V4.1:

    byte 0                            256       264
         | 256 weights, FP8 E4M3       | 8 scales, E8M0 |
           element i is scaled by scale i // 32

    element = weight * 2^(scale - 127) [* global_scale]

Rows need no alignment (264 B and 90 B rows are not multiples of anything useful): a field that
does not lie on its element's boundary is copied out first, the others are read where they are.
The arithmetic runs in float32 (float64 when that is asked for) and is rounded once to the result;
for E4M3 with E8M0 scales the product is exact, so the result is the nearest number there is.
E8M0 is decoded by integer operations because its torch dtype is younger than the torch we support.

On a CPU, one-byte weights without scales or under one-byte scales take no arithmetic at all: a table
made by it holds every result there can be (`kernels/decode.py`). For a decode step's few rows torch's
ten operations cost far more to start than to do. One kernel call also picks lines out of fewer
distinct ones, so what was read once for several positions is written once for each, as numbers.

On a GPU one kernel does FP8 rows, picking included (`engram_client/gpu/fused.py`), where Triton is there.

Not promised: formats a row layout cannot describe. A `uint8` weight is opaque (IQ4_NL, NF4) and
is the caller's to decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import BadRequest, FormatError
from engram_client.gpu import fused
from engram_client.kernels.decode import decode_rows
from engram_client.spec import ELEMENT_BYTES, Field, RowLayout

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
RESULT_DTYPE: dict[str, torch.dtype] = {
    "float8_e4m3fn": torch.bfloat16,
    "int8": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
SCALE_DTYPES = ("float8_e8m0fnu", "float32", "float16", "bfloat16")
RESULT_CHOICES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_BITS: dict[int, torch.dtype] = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UINT8 = np.dtype(np.uint8)
_ONE_TO_ONE = np.zeros(0, np.int64)  # as the kernel takes "no picking"

# On a CPU the temporaries of one block stay in its cache; a device takes all rows at once.
_BLOCK_ELEMENTS = 1 << 18


def dequantize(
    layout: RowLayout,
    rows: np.ndarray | Tensor,
    *,
    dtype: torch.dtype | None = None,
    index: np.ndarray | None = None,
) -> Tensor:
    """Rows as a look-up returns them, uint8 [..., row_bytes], to a tensor [..., embedding_dim].

    The result lives where the rows live (numpy: on the CPU) and never shares memory with them.
    `dtype` defaults to bfloat16 for FP8, INT8 and BF16 rows, float16 for FP16, float32 for FP32.
    With `index` int64 [...], rows are distinct lines [n, H, row_bytes] and the result is that of
    `rows[index]`, [..., H, embedding_dim].
    Raises BadRequest where rows have another dtype or width than the layout says, where the
    layout's weights are opaque, `dtype` is not a floating type of 16 bits or more, or `index` names
    lines that are not there.
    """
    result, table = _plan(layout, dtype)
    data = _as_bytes(layout, rows)
    if index is not None:
        _check_index(index, data)
    if table is not None and data.device.type == "cpu":
        return _by_table_of_all(table, data, result, index)
    picks = None if index is None else torch.from_numpy(index).to(data.device)
    if fused.decodes(layout, result, data.device):
        return fused.decode(layout, data, result, picks)
    return by_arithmetic(layout, data if picks is None else data[picks], result)


@dataclass(frozen=True)
class _TableOfAll:
    """Every number there can be, as bits [256 or 1, 256] by scale and weight, and where in a row both lie."""

    bits: np.ndarray
    places: tuple[int, int, int, int]  # row_bytes, first byte of the weights, of the scales, scales
    weights: int


@lru_cache(maxsize=64)
def _plan(layout: RowLayout, dtype: torch.dtype | None) -> tuple[torch.dtype, _TableOfAll | None]:
    """The result's dtype, and the table where one-byte weights stand alone or under one-byte scales."""
    weight, scale = _decodable_fields(layout)
    result = RESULT_DTYPE[weight.dtype] if dtype is None else dtype
    if result not in RESULT_CHOICES:
        choices = ", ".join(str(c) for c in RESULT_CHOICES)
        raise BadRequest(f"dequantize: dtype must be one of {choices}; got {dtype}")
    if ELEMENT_BYTES[weight.dtype] > 1 or (scale is not None and ELEMENT_BYTES[scale.dtype] > 1):
        return result, None
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    rows, fields = codes.unsqueeze(0), [Field("weight", weight.dtype, 256)]
    scale_at, scales = 0, 0
    if scale is not None:
        rows = torch.cat((codes.expand(256, 256), codes.unsqueeze(1)), dim=1)
        fields.append(Field("scale", scale.dtype, 1))
        scale_at, scales = layout.offset_bytes("scale"), scale.count
    numbers = by_arithmetic(RowLayout(tuple(fields), layout.global_scale), rows, result)
    places = (layout.row_bytes, layout.offset_bytes("weight"), scale_at, scales)
    return result, _TableOfAll(numbers.view(_BITS[result.itemsize]).numpy(), places, weight.count)


def _check_index(index: np.ndarray, lines: Tensor) -> None:
    fits = index.dtype == np.int64 and lines.ndim == 3
    if not fits or (index.size and not 0 <= index.min() <= index.max() < len(lines)):
        raise BadRequest(
            f"dequantize: index must be int64 numbers of lines in rows [n, H, row_bytes], got {index.dtype} "
            f"for rows {list(lines.shape)}"
        )


def by_arithmetic(layout: RowLayout, data: Tensor, result: torch.dtype) -> Tensor:
    """Rows uint8 [..., row_bytes] to [..., embedding_dim] by torch's operations, on any device."""
    weight, scale = _decodable_fields(layout)
    flat = data.reshape(-1, layout.row_bytes)
    step = max(1, _BLOCK_ELEMENTS // weight.count) if flat.device.type == "cpu" else flat.shape[0]
    if flat.shape[0] <= step:
        out = _decode(layout, weight, scale, flat, result)
    else:
        out = torch.empty((flat.shape[0], weight.count), dtype=result, device=flat.device)
        for start in range(0, flat.shape[0], step):
            block = slice(start, start + step)
            out[block] = _decode(layout, weight, scale, flat[block], result)
    return out.reshape(*data.shape[:-1], weight.count)


def _by_table_of_all(
    table: _TableOfAll, data: Tensor, result: torch.dtype, index: np.ndarray | None
) -> Tensor:
    """`by_arithmetic(layout, data[index], result)` for the layout of the table."""
    lines: tuple[int, ...] = data.shape[:-1]
    picks, group = _ONE_TO_ONE, 1
    if index is not None:
        lines, picks, group = (*index.shape, data.shape[1]), index.reshape(-1), data.shape[1]
    out = np.empty((*lines, table.weights), table.bits.dtype)
    flat = data.contiguous().numpy().reshape(-1)
    decode_rows(flat, picks, index is not None, (*table.places, group), table.bits, out.reshape(-1))
    return torch.from_numpy(out).view(result)


def e8m0_to_float32(codes: Tensor) -> Tensor:
    """uint8 exponents to 2^(code - 127) as float32; 255 is NaN (OCP MX v1.0, E8M0)."""
    exponents = codes.to(torch.int32)
    bits = exponents << 23
    # 2^-127 is below the smallest normal float32 and 255 would read as infinity.
    bits = torch.where(exponents == 0, torch.full_like(bits, 0x00400000), bits)
    bits = torch.where(exponents == 255, torch.full_like(bits, 0x7FC00000), bits)
    return bits.view(torch.float32)


def _decodable_fields(layout: RowLayout) -> tuple[Field, Field | None]:
    weight = layout.field("weight")
    scale = next((f for f in layout.fields if f.name == "scale"), None)
    if weight.dtype == "uint8":
        raise BadRequest(
            "dequantize: the weights of this row layout are uint8, which is opaque (for instance IQ4_NL "
            "or NF4); decode the row bytes with the code of the format they were packed from"
        )
    if weight.dtype not in TORCH_DTYPE:
        raise FormatError(f"row layout: weights cannot be {weight.dtype}; known: {', '.join(TORCH_DTYPE)}")
    if scale is not None and scale.dtype not in SCALE_DTYPES:
        raise FormatError(f"row layout: scales cannot be {scale.dtype}; known: {', '.join(SCALE_DTYPES)}")
    if scale is not None and weight.count % scale.count:
        raise FormatError(
            f"row layout: {scale.count} scales do not divide {weight.count} weights into equal blocks"
        )
    return weight, scale


def _is_plain(layout: RowLayout, rows: np.ndarray | Tensor) -> bool:
    """Whether these are rows as a look-up returns them."""
    return (
        type(rows) is np.ndarray
        and rows.dtype is _UINT8
        and rows.shape[-1:] == (layout.row_bytes,)
        and rows.flags.carray
    )


def _as_bytes(layout: RowLayout, rows: np.ndarray | Tensor) -> Tensor:
    if _is_plain(layout, rows):  # what follows takes longer than to decode a few rows
        return torch.from_numpy(rows)
    if not isinstance(rows, np.ndarray | Tensor):
        raise BadRequest(f"dequantize: rows must be a numpy array or torch tensor, got {type(rows).__name__}")
    if str(rows.dtype).removeprefix("torch.") != "uint8":
        raise BadRequest(
            f"dequantize: rows must be uint8 as a look-up returns them, got {rows.dtype}; pass the row "
            "bytes, not numbers that are already decoded"
        )
    if rows.ndim == 0 or rows.shape[-1] != layout.row_bytes:
        got = "no dimensions" if rows.ndim == 0 else f"{rows.shape[-1]} (shape {tuple(rows.shape)})"
        raise BadRequest(
            f"dequantize: the last dimension of rows must be row_bytes = {layout.row_bytes}, got {got}; "
            "are these rows of another table?"
        )
    if isinstance(rows, Tensor):
        return rows
    # torch cannot hold read-only or backward arrays; a copy of bytes costs little beside decoding them.
    usable = rows.flags.writeable and all(stride >= 0 for stride in rows.strides)
    return torch.from_numpy(rows if usable else rows.copy())


def _decode(
    layout: RowLayout, weight: Field, scale: Field | None, rows: Tensor, result: torch.dtype
) -> Tensor:
    """One block of rows [n, row_bytes] to [n, embedding_dim], in memory of its own."""
    compute = torch.float64 if result == torch.float64 else torch.float32
    values = _numbers(weight, _field_bytes(layout, weight, rows))
    if scale is None and layout.global_scale is None:
        return values.to(result, copy=values.dtype == result)  # where no cast copies, a copy does
    values = values.to(compute)
    if scale is not None:
        scales = _numbers(scale, _field_bytes(layout, scale, rows)).to(compute)
        blocks = values.reshape(-1, scale.count, weight.count // scale.count)
        values = (blocks * scales.unsqueeze(-1)).reshape(-1, weight.count)
    if layout.global_scale is not None:
        values = values * layout.global_scale
    return values.to(result)


def _field_bytes(layout: RowLayout, field: Field, rows: Tensor) -> Tensor:
    start = layout.offset_bytes(field.name)
    return rows[:, start : start + field.bytes]


def _numbers(field: Field, data: Tensor) -> Tensor:
    """uint8 [n, bytes] of one field to its numbers [n, count]; may be a view of `data`."""
    if field.dtype in _CODES:
        by_table = data.device.type == "cpu"
        return _by_table(field.dtype, data) if by_table else _CODES[field.dtype](data)
    dtype = TORCH_DTYPE[field.dtype]
    aligned = (data.data_ptr() | data.stride(0)) % dtype.itemsize == 0 and data.stride(1) == 1
    return (data if aligned else data.clone(memory_format=torch.contiguous_format)).view(dtype)


def _e4m3_to_float32(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


_CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "float8_e4m3fn": _e4m3_to_float32,
    "float8_e8m0fnu": e8m0_to_float32,
}


def _by_table(dtype: str, codes: Tensor) -> Tensor:
    """One-byte codes to float32 by a table of all 256: on CPUs four times as fast as torch's cast."""
    return _table(dtype).index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


@cache
def _table(dtype: str) -> Tensor:
    return _CODES[dtype](torch.arange(256, dtype=torch.uint8, device="cpu"))
