"""The header parser: what it reads, and that nothing malformed gets past it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engram_client.errors import FormatError, StorageError
from tierstore.format.sources.safetensors import read_header


def file_of(folder: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_finds_what_the_published_library_wrote(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5, dtype=np.int64),
        "c": np.zeros((0, 4), np.uint8),
        "d": np.full((), 7, np.float16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    found = read_header(path)
    raw = path.read_bytes()
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        tensor = found[name]
        assert tensor.shape == array.shape
        assert raw[tensor.offset : tensor.offset + tensor.bytes] == array.tobytes()


def test_keeps_dtypes_it_does_not_know(tmp_path: Path) -> None:
    found = read_header(file_of(tmp_path, {"x": entry(0, 3, [6], "F4_E9")}, b"abc"))
    assert (found["x"].dtype, found["x"].bytes) == ("F4_E9", 3)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{not json", b"", "not JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b'"text"', b"", "not a JSON object"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": {"x": 1}, "a": {"x": 2}}', b"", "occurs twice"),
        ({"a": 5}, b"", "expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"", "expected dtype, shape and data_offsets"),
        ({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 1]}}, b"x", "dtype must be a name"),
        ({"a": entry(0, 4, [-4])}, b"abcd", "shape must be"),
        ({"a": entry(0, 1, [True])}, b"a", "shape must be"),
        ({"a": entry(0, 4, [1.5])}, b"abcd", "shape must be"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 0]}}, b"ab", "data_offsets must be"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2, 4]}}, b"ab", "data_offsets must be"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [-2, 0]}}, b"ab", "data_offsets must be"),
        ({"a": entry(0, 4, [3])}, b"abcd", "takes 3 bytes"),
        ({"a": entry(0, 6, [4], "F32")}, b"abcdef", "takes 16 bytes"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"abcdef", "overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"abcd", "overlaps"),
        ({"a": entry(0, 2), "b": entry(4, 6)}, b"abcdef", "leaves a hole"),
        ({"a": entry(2, 4)}, b"abcd", "leaves a hole"),
        ({"a": entry(0, 8)}, b"abcd", "truncated"),
        ({"a": entry(0, 2)}, b"abcd", "followed by foreign bytes"),
    ],
)
def test_refuses(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = file_of(tmp_path, header, data)
    with pytest.raises(FormatError, match=says) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((2**63).to_bytes(8, "little") + b"{}", "header length"),
        ((500).to_bytes(8, "little") + b"{}", "truncated"),
        (b"PK\x03\x04 a pickle in a zip", "header length"),
    ],
)
def test_refuses_foreign_and_short_files(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=says):
        read_header(path)


def test_a_missing_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.safetensors"):
        read_header(tmp_path / "absent.safetensors")


VALID = json.dumps({"__metadata__": {"format": "pt"}, "a": entry(0, 8, [2, 4]), "b": entry(8, 12)}).encode()


@given(at=st.integers(0, 8 + len(VALID) - 1), value=st.integers(0, 255), cut=st.integers(0, 20))
def test_a_damaged_header_is_refused_or_still_covers_the_file(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int
) -> None:
    raw = bytearray(len(VALID).to_bytes(8, "little") + VALID + bytes(12))
    raw[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw[: len(raw) - cut])
    try:
        found = read_header(path)
    except FormatError:
        return
    spans = sorted((t.offset, t.offset + t.bytes) for t in found.values())
    assert spans[-1][1] == len(raw) - cut
    assert all(first[1] == second[0] for first, second in pairwise(spans))


@given(raw=st.binary(max_size=200), header=st.booleans())
def test_random_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes((len(raw).to_bytes(8, "little") if header else b"") + raw)
    with pytest.raises(FormatError):
        read_header(path)
