"""Text and token traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench.corpus import load_trace, save_trace, stdlib_text, tokenize_corpus

from engram_client.errors import BadRequest, FormatError, StorageError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "import": 1, "def": 2, "return": 3}
    tiny = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tiny.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tiny.save(str(path))
    return path


def test_text_is_python_and_always_the_same() -> None:
    documents = stdlib_text(200_000)
    size = sum(len(d.encode()) for d in documents)
    assert size >= 200_000
    assert size - len(documents[-1].encode()) < 200_000
    assert documents == stdlib_text(200_000)
    assert sum("import" in d for d in documents) > len(documents) // 2


def test_more_text_than_there_is() -> None:
    with pytest.raises(BadRequest, match="were asked for"):
        stdlib_text(1 << 40)


def test_documents_keep_their_order_and_bounds(tokenizer: Path) -> None:
    documents = ["import def", "", "return"] + ["def"] * 200
    ids, off = tokenize_corpus(tokenizer, documents)
    assert ids.dtype == np.uint32
    assert off.dtype == np.int64
    assert off[:4].tolist() == [0, 2, 2, 3]
    assert ids[:4].tolist() == [1, 2, 3, 2]
    assert (len(off), off[-1]) == (204, len(ids))


def test_no_documents(tokenizer: Path) -> None:
    ids, off = tokenize_corpus(tokenizer, [])
    assert (ids.tolist(), off.tolist()) == ([], [0])


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    ids, off = np.array([5, 6, 7], np.uint32), np.array([0, 1, 3])
    save_trace(tmp_path / "trace", ids, off)
    got_ids, got_off = load_trace(tmp_path / "trace")
    assert (got_ids.tolist(), got_off.tolist()) == ([5, 6, 7], [0, 1, 3])


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.zeros(3, np.uint32)},
        {"ids": np.zeros(3, np.int64), "off": np.array([0, 3])},
        {"ids": np.zeros(3, np.uint32), "off": np.array([0, 4])},
        {"ids": np.zeros(3, np.uint32), "off": np.array([1, 3])},
        {"ids": np.zeros(3, np.uint32), "off": np.array([0, 5, 3])},
        {"ids": np.zeros(3, np.uint32), "off": np.zeros(0, np.int64)},
        {"ids": np.array([{}], object), "off": np.array([0, 1])},
    ],
)
def test_foreign_arrays_are_no_trace(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, **arrays)
    with pytest.raises(FormatError, match=r"trace\.npz"):
        load_trace(path)


@pytest.mark.parametrize("raw", [b"", b"text", b"PK\x03\x04 broken", b"\x93NUMPY"])
def test_foreign_files_are_no_trace(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="not a token trace"):
        load_trace(path)


def test_a_missing_trace_and_a_foreign_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        load_trace(tmp_path / "absent.npz")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(FormatError, match=r"not a tokenizer\.json"):
        tokenize_corpus(tmp_path / "t.json", ["x"])
