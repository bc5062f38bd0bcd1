"""Dequantization against numbers worked out here from the definitions of the formats, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engram_client.dequantize import dequantize, e8m0_to_float32
from engram_client.errors import BadRequest, FormatError
from engram_client.spec import Field, RowLayout

V41 = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)))


def e4m3(code: int) -> float:
    """OCP FP8 E4M3: bias 7, no infinities, NaN where all exponent and mantissa bits are set."""
    code = int(code)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, -9)
    return sign * math.ldexp(8 + mantissa, exponent - 10)


def e8m0(code: int) -> float:
    return math.nan if code == 255 else math.ldexp(1.0, int(code) - 127)


def to_binary(x: np.ndarray, *, digits: int, smallest_exponent: int, limit: float) -> np.ndarray:
    """float64 rounded half-to-even to a format of `digits` significant bits; past `limit` infinite."""
    _, exponent = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(exponent - digits, smallest_exponent))
    rounded = np.rint(x / quantum) * quantum
    return np.where(np.abs(rounded) > limit, np.copysign(np.inf, x), rounded)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return to_binary(x, digits=8, smallest_exponent=-133, limit=math.ldexp(255, 120))


def to_float16(x: np.ndarray) -> np.ndarray:
    return to_binary(x, digits=11, smallest_exponent=-24, limit=65504.0)


def to_float32(x: np.ndarray) -> np.ndarray:
    return to_binary(x, digits=24, smallest_exponent=-149, limit=math.ldexp(2**24 - 1, 104))


def packed(*parts: np.ndarray) -> np.ndarray:
    """Fields [rows, count] of any dtype to rows of bytes."""
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)


def bfloat16_bytes(values: np.ndarray) -> np.ndarray:
    """float64 values that bfloat16 can hold to its bits, which are float32's upper half."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_every_weight_under_every_scale() -> None:
    codes, scales = np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    rows = packed(np.tile(codes, (256, 1)), np.repeat(scales[:, None], 8, axis=1))
    exact = np.outer([e8m0(s) for s in range(256)], [e4m3(c) for c in range(256)])
    result = dequantize(V41, rows)
    assert result.dtype == torch.bfloat16
    np.testing.assert_array_equal(result.double().numpy(), to_bfloat16(exact))
    np.testing.assert_array_equal(dequantize(V41, rows, dtype=torch.float32).double(), to_float32(exact))
    np.testing.assert_array_equal(dequantize(V41, rows, dtype=torch.float64), exact)
    np.testing.assert_array_equal(dequantize(V41, rows, dtype=torch.float16).double(), to_float16(exact))


def test_each_block_has_its_own_scale() -> None:
    rng = np.random.default_rng(41)
    codes = rng.integers(0, 256, (50, 256), dtype=np.uint8)
    scales = rng.integers(100, 140, (50, 8), dtype=np.uint8)
    weights = np.vectorize(e4m3)(codes)
    exact = weights * np.repeat(np.vectorize(e8m0)(scales), 32, axis=1)
    result = dequantize(V41, packed(codes, scales).reshape(2, 25, 264))
    assert result.shape == (2, 25, 256)
    np.testing.assert_array_equal(result.double().reshape(50, 256), to_bfloat16(exact))


def test_e8m0_is_a_power_of_two_everywhere() -> None:
    decoded = e8m0_to_float32(torch.arange(256, dtype=torch.uint8)).double().numpy()
    np.testing.assert_array_equal(decoded, [e8m0(code) for code in range(256)])


def test_fp8_with_one_scale_for_the_table() -> None:
    scale = 0.0123
    layout = RowLayout((Field("weight", "float8_e4m3fn", 160),), global_scale=scale)
    codes = np.arange(320, dtype=np.uint8).reshape(2, 160)
    weights = np.vectorize(e4m3)(codes)
    product = to_float32(weights * float(np.float32(scale)))
    np.testing.assert_array_equal(dequantize(layout, codes).double(), to_bfloat16(product))


def test_unscaled_formats_are_read_bit_for_bit() -> None:
    values = np.random.default_rng(1).standard_normal((7, 45))
    bf16 = to_bfloat16(values)
    cases = [
        ("bfloat16", bfloat16_bytes(bf16), bf16, torch.bfloat16),
        ("float16", values.astype(np.float16), to_float16(values), torch.float16),
        ("float32", values.astype(np.float32), to_float32(values), torch.float32),
    ]
    for name, data, expected, dtype in cases:
        result = dequantize(RowLayout((Field("weight", name, 45),)), packed(data))
        assert result.dtype == dtype
        np.testing.assert_array_equal(result.double(), expected)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16", "float8_e8m0fnu"])
def test_int8_with_block_scales_of_any_dtype(scale_dtype: str) -> None:
    rng = np.random.default_rng(8)
    weights = rng.integers(-128, 128, (9, 64), dtype=np.int8)
    scales = np.ldexp(1.0, rng.integers(-9, 9, (9, 4)))
    data = {
        "float32": scales.astype(np.float32),
        "float16": scales.astype(np.float16),
        "bfloat16": bfloat16_bytes(scales),
        "float8_e8m0fnu": (np.log2(scales) + 127).astype(np.uint8),
    }[scale_dtype]
    layout = RowLayout((Field("weight", "int8", 64), Field("scale", scale_dtype, 4)), global_scale=0.5)
    exact = weights * np.repeat(scales, 16, axis=1) * 0.5
    result = dequantize(layout, packed(weights, data))
    np.testing.assert_array_equal(result.double(), to_bfloat16(exact))


def test_fields_off_their_boundaries() -> None:
    """A scale before an odd number of weights: nothing in the 21-byte rows is aligned."""
    layout = RowLayout(
        (Field("mark", "uint8", 1), Field("scale", "float32", 1), Field("weight", "float16", 8))
    )
    rng = np.random.default_rng(3)
    scales = np.ldexp(1.0, rng.integers(-5, 5, (6, 1))).astype(np.float32)
    weights = rng.standard_normal((6, 8)).astype(np.float16)
    rows = packed(np.zeros((6, 1), np.uint8), scales, weights)
    expected = to_float16(weights.astype(np.float64) * scales)
    np.testing.assert_array_equal(dequantize(layout, rows).double(), expected)
    np.testing.assert_array_equal(dequantize(layout, torch.from_numpy(rows)).double(), expected)


def test_rows_may_lie_in_memory_in_any_way() -> None:
    layout = RowLayout((Field("weight", "bfloat16", 45),))  # 90-byte rows
    values = to_bfloat16(np.random.default_rng(5).standard_normal((12, 45)))
    rows = packed(bfloat16_bytes(values))
    shifted = np.empty(rows.size + 1, dtype=np.uint8)[1:].reshape(rows.shape)
    shifted[:] = rows
    wide = np.zeros((12, 97), dtype=np.uint8)
    wide[:, 3:93] = rows
    frozen = rows.copy()
    frozen.flags.writeable = False
    for given in (shifted, wide[:, 3:93], frozen, np.asfortranarray(rows), torch.from_numpy(wide)[:, 3:93]):
        np.testing.assert_array_equal(dequantize(layout, given).double(), values)
    np.testing.assert_array_equal(dequantize(layout, rows[::-1]).double(), values[::-1])
    np.testing.assert_array_equal(dequantize(layout, rows[::2]).double(), values[::2])


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_the_result_never_shares_memory_with_the_rows(name: str) -> None:
    """Staging buffers are reused: a view would change under the caller."""
    layout = RowLayout((Field("weight", name, 16),))
    rows = np.full((4, layout.row_bytes), 0x3C, dtype=np.uint8)
    for given in (rows, torch.from_numpy(rows)):
        rows[:] = 0x3C
        result = dequantize(layout, given)
        before = result.clone()
        rows[:] = 0
        assert torch.equal(result, before)


def test_large_batches_are_decoded_block_by_block_alike() -> None:
    rows = np.random.default_rng(7).integers(0, 256, (3000, 264), dtype=np.uint8)
    whole = dequantize(V41, rows, dtype=torch.float32)
    single = torch.stack([dequantize(V41, row, dtype=torch.float32) for row in rows[::100]])
    np.testing.assert_array_equal(whole[::100], single)


HALVES = RowLayout((Field("weight", "float16", 132),))


@pytest.mark.parametrize("layout", [V41, RowLayout((Field("weight", "int8", 264),), 0.25), HALVES])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_an_index_hands_lines_to_positions(layout: RowLayout, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(11)
    lines = rng.integers(0, 256, (4, 3, 264), dtype=np.uint8)
    index = rng.integers(0, 4, shape)
    for given in (lines, torch.from_numpy(lines), torch.from_numpy(lines.repeat(2, axis=2))[..., :264]):
        plain = given.numpy() if isinstance(given, torch.Tensor) else given
        result = dequantize(layout, given, index=index)
        expected = dequantize(layout, plain[index])
        assert result.shape == expected.shape
        np.testing.assert_array_equal(result.double(), expected.double())


@pytest.mark.parametrize("index", [[4], [-1], [0, 9]])
def test_an_index_names_lines_that_are_there(index: list[int]) -> None:
    with pytest.raises(BadRequest, match="index must be"):
        dequantize(V41, np.zeros((4, 2, 264), np.uint8), index=np.array(index))
    with pytest.raises(BadRequest, match="int32"):
        dequantize(V41, np.zeros((4, 2, 264), np.uint8), index=np.zeros(1, np.int32))
    with pytest.raises(BadRequest, match=r"rows \[4, 264\]"):
        dequantize(V41, np.zeros((4, 264), np.uint8), index=np.zeros(1, np.int64))


def test_no_rows_give_no_numbers() -> None:
    assert dequantize(V41, np.zeros((3, 0, 264), dtype=np.uint8)).shape == (3, 0, 256)
    assert dequantize(V41, torch.zeros((0, 264), dtype=torch.uint8)).shape == (0, 256)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 263), np.uint8), r"row_bytes = 264, got 263"),
        (np.zeros((2, 264), np.int8), r"must be uint8 .* got int8"),
        (torch.zeros((2, 264)), r"must be uint8 .* got torch.float32"),
        (np.zeros((), np.uint8), r"row_bytes = 264, got no dimensions"),
        ([[0] * 264], r"numpy array or torch tensor, got list"),
    ],
)
def test_rows_that_cannot_be_meant(rows: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        dequantize(V41, rows)  # type: ignore[arg-type]


def test_result_dtype_must_hold_numbers() -> None:
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(BadRequest, match="dtype must be one of"):
            dequantize(V41, np.zeros((1, 264), np.uint8), dtype=dtype)


def test_opaque_rows_are_the_callers_to_decode() -> None:
    with pytest.raises(BadRequest, match="opaque"):
        dequantize(RowLayout((Field("weight", "uint8", 90),)), np.zeros((1, 90), np.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((Field("weight", "int8", 10), Field("scale", "float32", 3)), "3 scales do not divide 10"),
        ((Field("weight", "int8", 8), Field("scale", "int8", 2)), "scales cannot be int8"),
        ((Field("weight", "float8_e8m0fnu", 8),), "weights cannot be float8_e8m0fnu"),
        ((Field("scale", "float32", 3),), "no field 'weight'"),
    ],
)
def test_layouts_that_cannot_be_decoded(fields: tuple[Field, ...], message: str) -> None:
    layout = RowLayout(fields)
    with pytest.raises(FormatError, match=message):
        dequantize(layout, np.zeros((1, layout.row_bytes), np.uint8))


def test_rows_are_not_moved_to_another_device() -> None:
    rows = torch.zeros((3, 264), dtype=torch.uint8, device="meta")
    assert dequantize(V41, rows).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits() -> None:
    rows = torch.from_numpy(np.random.default_rng(9).integers(0, 256, (500, 264), dtype=np.uint8))
    on_device = dequantize(V41, rows.cuda())
    assert on_device.device.type == "cuda"
    np.testing.assert_array_equal(on_device.cpu().float(), dequantize(V41, rows).float())
