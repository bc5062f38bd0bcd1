"""Writes safetensors files by hand, so that the reader under test is judged by other code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Entry = tuple[str, list[int], bytes]
Writer = Callable[[Path, Mapping[str, Entry]], Path]


@pytest.fixture
def write_file() -> Writer:
    """`write_file(path, {name: (dtype, shape, bytes)})`, tensors in the given order."""

    def write(path: Path, tensors: Mapping[str, Entry]) -> Path:
        header, data = {}, b""
        for name, (dtype, shape, raw) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def write_sparse() -> Callable[[Path, Mapping[str, tuple[str, list[int], int]]], Path]:
    """`write_sparse(path, {name: (dtype, shape, element_bytes)})`: a file of holes, of any size."""

    def write(path: Path, tensors: Mapping[str, tuple[str, list[int], int]]) -> Path:
        header, end = {}, 0
        for name, (dtype, shape, element_bytes) in tensors.items():
            size = element_bytes
            for length in shape:
                size *= length
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with open(path, "r+b") as file:
            file.truncate(8 + len(text) + end)
        return path

    return write


@pytest.fixture
def tiny_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json of six tokens that fold to four compressed ids."""
    from tokenizers import Tokenizer, models

    words = {"[UNK]": 0, "apple": 1, "Apple": 2, "pear": 3, "PEAR": 4, "plum": 5}
    path = tmp_path / "tiny-tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    return path
